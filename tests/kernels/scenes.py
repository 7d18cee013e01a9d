"""Steps for the kernel tests, and what they must give: dense attention in float64, one row at a time.

The reference turns **keys** forward to their global positions, as the model would have; the kernel
turns queries back. Equal outputs prove the identity as well as the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from decode_worker.attention.triton_segments import TritonSegmentAttention
from decode_worker.step import Piece
from shared.engine.rotation import Rotation, RotationKind

LAYERS = 2
SEGMENT = 16
NONE = Rotation(RotationKind.NONE, torch.zeros(0))
# Relative RMS distance. Turned queries, weights and outputs are each rounded to the storage type once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@dataclass(frozen=True)
class Ask:
    """One request in a step: its blocks by index, tokens of its tail already written, and its new rows."""

    blocks: Sequence[int]
    filled: int = 0
    rows: int = 1


@dataclass(frozen=True)
class Heads:
    """Shape of a layer's attention."""

    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


def rotation(kind: RotationKind = RotationKind.HALF, rotary_dim: int = 16) -> Rotation:
    """A rotation with the usual spread of frequencies."""
    if kind is RotationKind.NONE:
        return NONE
    return Rotation(kind, 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim))


@dataclass
class Scene:
    """A step: an arena with blocks and tails at scattered places, queries, and pieces.

    Attributes:
        asks: Requests of the step.
        lengths: Tokens of each block.
        heads: Shape of the attention.
        turn: Rotation of every layer.
        dtype: Storage type.
        seed: Of all values, and of where extents lie.
        start: Global position of the first block of every request.
    """

    asks: Sequence[Ask]
    lengths: Sequence[int]
    heads: Heads = field(default_factory=Heads)
    turn: Rotation = field(default_factory=rotation)
    dtype: torch.dtype = torch.float32
    seed: int = 0
    start: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pieces: list[Piece] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._top = 0
        self._lay_blocks()
        self._lay_tails()
        generator = torch.Generator().manual_seed(self.seed)
        width = 2 * self.heads.kv_heads * self.heads.head_dim
        self.records = torch.randn(self._top, width, generator=generator).to(self.device, self.dtype)
        q = torch.randn(self.heads.heads, len(self.positions), self.heads.head_dim, generator=generator) * 2
        self.q = q.to(self.device, self.dtype)
        self.scale = self.heads.head_dim**-0.5

    def _extent(self, tokens: int) -> int:
        first = self._top + int(self._rng.integers(0, 5))
        self._top = first + LAYERS * tokens
        return first

    def _lay_blocks(self) -> None:
        uses: list[tuple[list[int], list[int]]] = [([], []) for _ in self.lengths]
        row = 0
        for ask in self.asks:
            base = self.start
            for block in ask.blocks:
                uses[block][0].extend(range(row, row + ask.rows))
                uses[block][1].extend([base] * ask.rows)
                base += self.lengths[block]
            self.positions.extend(range(base + ask.filled, base + ask.filled + ask.rows))
            row += ask.rows
        for length, (rows, bases) in zip(self.lengths, uses, strict=True):
            if rows:
                self.pieces.append(
                    Piece(self._extent(length), length, length, local=True, causal=False, rows=rows, bases=bases)
                )

    def _lay_tails(self) -> None:
        row = 0
        for ask in self.asks:
            tail = self.positions[row] - ask.filled
            for begin in range(0, ask.filled + ask.rows, SEGMENT):
                keys = min(SEGMENT, ask.filled + ask.rows - begin)
                # Rows before the segment's first key see none of it.
                rows = list(range(row + max(0, begin - ask.filled), row + ask.rows))
                bases = [tail + begin] * len(rows)
                # Some of its keys are of earlier steps, so `causal` does not describe it; the kernel goes by positions.
                first = self._extent(SEGMENT)
                self.pieces.append(Piece(first, SEGMENT, keys, local=False, causal=True, rows=rows, bases=bases))
            row += ask.rows

    def attention(self, most_partials: int | None = None, processors: int = 4) -> TritonSegmentAttention:
        """The kernel with a workspace poisoned by NaN."""
        most = most_partials or 4 * sum(len(piece.rows) for piece in self.pieces)
        attention = TritonSegmentAttention(
            self.records,
            heads=self.heads.heads,
            kv_heads=self.heads.kv_heads,
            head_dim=self.heads.head_dim,
            rotations=[self.turn] * LAYERS,
            most_partials=most,
            processors=processors,
        )
        attention.reserve(most)
        attention._outs.fill_(float("nan"))
        attention._lses.fill_(float("nan"))
        return attention

    def expected(self, layer: int, window: int | None = None) -> torch.Tensor:
        """float64 [rows, heads, head_dim]."""
        return dense(self.records, self.pieces, self.positions, self.q, self.turn, layer, self.scale, window)

    def check(self, window: int | None = None) -> None:
        """Runs the kernel on the last layer and compares."""
        attention = self.attention()
        step = attention.prepare(self.pieces, self.positions)
        out = attention.attend(step, LAYERS - 1, self.q, self.scale, window)
        assert out.dtype == self.dtype
        assert_near(out, self.expected(LAYERS - 1, window), self.dtype)


def assert_near(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Relative RMS distance within the storage type's tolerance; NaN never passes."""
    assert out.shape == expected.shape
    distance = float((out.cpu().double() - expected).norm() / expected.norm())
    assert distance <= TOLERANCE[dtype], f"relative distance {distance:.1e}"


def dense(
    records: torch.Tensor,
    pieces: Sequence[Piece],
    positions: Sequence[int],
    q: torch.Tensor,
    turn: Rotation,
    layer: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Dense attention of each row to every key that its position and the window let it see; zeros if none."""
    heads, rows, width = q.shape
    stored = records.cpu().double().unflatten(1, (2, -1, width))
    seen: list[list[torch.Tensor]] = [[] for _ in positions]
    for piece in pieces:
        first = piece.first + layer * piece.stride
        kv = stored[first : first + piece.keys]
        at: dict[int, torch.Tensor] = {}
        for row, base in zip(piece.rows, piece.bases, strict=True):
            if base not in at:
                at[base] = torch.stack((turned(kv[:, 0], turn, base), kv[:, 1]), dim=1) if piece.local else kv
            # Positions rise: what is seen is one run of keys.
            reach = positions[row] - base
            lowest = max(0, reach - (window or 1 << 30) + 1)
            seen[row].append(at[base][lowest : max(reach + 1, lowest)])
    queries = q.cpu().double()
    out = torch.zeros(rows, heads, width, dtype=torch.float64)
    for row, parts in enumerate(seen):
        keys, values = (torch.cat(parts) if parts else stored[:0]).unbind(1)
        if len(keys):
            grouped = queries[:, row].view(keys.shape[1], -1, width)
            weights = torch.einsum("kgd,nkd->kgn", grouped, keys).mul(scale).softmax(dim=-1)
            out[row] = torch.einsum("kgn,nkd->kgd", weights, values).flatten(0, 1)
    return out


def turned(x: torch.Tensor, turn: Rotation, by: int) -> torch.Tensor:
    """`x` [..., head_dim] moved by whole positions, as complex numbers."""
    if turn.kind is RotationKind.NONE:
        return x
    half = turn.rotary_dim // 2
    turning, still = x[..., : 2 * half], x[..., 2 * half :]
    interleaved = turn.kind is RotationKind.INTERLEAVED
    pairs = turning.unflatten(-1, (half, 2) if interleaved else (2, half))
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    angle = turn.inv_freq.double() * (-by if turn.kind is RotationKind.HALF_NEGATIVE else by)
    moved = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle))
    moved = moved if interleaved else moved.transpose(-1, -2)
    return torch.cat((moved.flatten(-2), still), dim=-1)
