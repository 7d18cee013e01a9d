"""RoPE as bare rotations: what moves a query or key by whole positions.

⟨R(p)q, R(o+j)k⟩ = ⟨R(p-o)q, R(j)k⟩ (RoFormer, arXiv 2104.09864, eq. 16), so a block that was
encoded at local positions is laid at offset o by rotating the query back by o. The rotation is
bare: cosines and sines without YaRN's attention scaling, which q already carries.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum

import torch


class RotationKind(Enum):
    """How pairs of elements are formed, and which way they turn."""

    NONE = "none"
    HALF = "half"
    INTERLEAVED = "interleaved"
    HALF_NEGATIVE = "half-negative"


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """The rotation that one layer applies to queries and keys.

    Attributes:
        kind: Pairing and direction.
        inv_freq: float32 [rotary_dim / 2], radians per position; empty for NONE.
    """

    kind: RotationKind
    inv_freq: torch.Tensor

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that rotate; the rest pass through."""
        return 2 * self.inv_freq.numel()

    def digest(self) -> bytes:
        """32 bytes that are equal exactly when two rotations are."""
        raw = self.inv_freq.to(torch.float32).cpu().numpy().tobytes()
        return hashlib.blake2b(self.kind.value.encode() + b"\0" + raw, digest_size=32).digest()

    def tables(self, deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for moving by `deltas` positions (int64 [n]); float32 [n, rotary_dim] on their device.

        Angles are formed in float64: at long offsets float32 angles would round more than the
        model's own do.
        """
        angles = deltas.to(torch.float64)[:, None] * self.inv_freq.to(deltas.device, torch.float64)
        if self.kind is RotationKind.HALF_NEGATIVE:
            angles = -angles
        if self.kind is RotationKind.INTERLEAVED:
            angles = angles.repeat_interleave(2, dim=-1)
        else:
            angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(torch.float32), angles.sin().to(torch.float32)

    def apply(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotates `x` [..., n, head_dim] by tables [n, rotary_dim] in float32; returns float32."""
        x = x.to(torch.float32)
        if self.kind is RotationKind.NONE:
            return x
        width = self.rotary_dim
        turning = x if width == x.shape[-1] else x[..., :width]
        turned = turning * cos + _quarter_turn(turning, self.kind) * sin
        return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


def _quarter_turn(x: torch.Tensor, kind: RotationKind) -> torch.Tensor:
    if kind is RotationKind.INTERLEAVED:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
