"""The one seam to transformers: an attention function that hands each layer to our own context.

transformers' attention modules apply RoPE and then call the registered function with
`q [1, heads, rows, d]`, `k, v [1, kv_heads, rows, d]` and every extra keyword of the model call
(engine-notes: held over transformers 5.10 to 5.23). Registration is transformers' own global table;
the function registered has no state.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import AttentionInterface

NAME = "drystone"


class AttentionContext(Protocol):
    """What one forward pass attends to."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention of one layer.

        Args:
            layer: Index of the layer.
            q: [1, heads, rows, d], after RoPE.
            k: [1, kv_heads, rows, d], after RoPE.
            v: [1, kv_heads, rows, d].
            scale: Factor of the scores.
            window: Keys at this distance or farther are not seen; None for no window.

        Returns:
            [1, rows, heads, d] in q's dtype.
        """
        ...


class UnsupportedAttentionError(Exception):
    """A layer asks for something that block attention here cannot give exactly."""


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    drystone: AttentionContext,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if extra.get(name) is not None:
            raise UnsupportedAttentionError(f"layer {module.layer_idx}: {name} is not supported")
    if attention_mask is not None:
        raise UnsupportedAttentionError(f"layer {module.layer_idx}: the model builds an attention mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return drystone.attend(module.layer_idx, query, key, value, scale, sliding_window), None


def register() -> None:
    """Makes `attn_implementation="drystone"` known to transformers. Safe to repeat."""
    AttentionInterface.register(NAME, _attention)
