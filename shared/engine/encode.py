"""Encoding a block: its KV alone, at local positions, straight into its extent."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.engine.partials import causal_partial, dense_partial, masked_partial, merge_partials
from shared.engine.served_model import ServedModel
from shared.kv.layout import KvShape

CHUNK_TOKENS = 512


def new_extent(shape: KvShape, tokens: int) -> torch.Tensor:
    """A fresh extent [layers, tokens, 2, kv_heads, head_dim]: the forward writes it and ZeroMQ sends it, uncopied."""
    return torch.empty(shape.layers, tokens, 2, shape.kv_heads, shape.head_dim, dtype=getattr(torch, shape.dtype))


def encode_block(
    model: ServedModel, token_ids: list[int], extent: torch.Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> None:
    """Fills `extent` with the KV of `token_ids` at positions 0..n-1, in causal chunks of `chunk_tokens`.

    Args:
        model: The model; the caller's thread must own it.
        token_ids: The block's tokens, n of them.
        extent: [layers, n, 2, kv_heads, head_dim], written whole.
        chunk_tokens: Rows of one forward pass; bounds activations, not the result.

    Raises:
        ArithmeticError: The KV holds infinities or NaN; served, they would spoil every later answer.
    """
    ids = torch.tensor(token_ids, device=model.device)
    for start in range(0, len(token_ids), chunk_tokens):
        end = min(start + chunk_tokens, len(token_ids))
        positions = torch.arange(start, end, device=model.device)
        model.forward_kv(ids[start:end], positions, _ChunkContext(extent, start, end))
    if not bool(torch.isfinite(extent).all()):
        raise ArithmeticError(f"the KV of a block of {len(token_ids)} tokens is not finite in {extent.dtype}")


@dataclass(frozen=True, slots=True)
class _ChunkContext:
    """Rows [start, end) of a block: they see the block's earlier rows, and one another causally."""

    extent: torch.Tensor
    start: int
    end: int

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        rows = self.extent[layer]
        rows[self.start : self.end, 0] = k[0].transpose(0, 1)
        rows[self.start : self.end, 1] = v[0].transpose(0, 1)
        keys, values = rows[: self.end, 0], rows[: self.end, 1]
        if window is not None and self.end > window:
            out, _ = masked_partial(q[0], keys, values, scale, self._visible(window, q.device))
        elif self.start == 0:
            out, _ = causal_partial(q[0], keys, values, scale)
        else:
            out = self._past_and_own(q[0], keys, values, scale)
        return out.transpose(0, 1)[None].to(q.dtype)

    def _visible(self, window: int, device: torch.device) -> torch.Tensor:
        distance = torch.arange(self.start, self.end, device=device)[:, None] - torch.arange(self.end, device=device)
        return (distance >= 0) & (distance < window)

    def _past_and_own(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        past = dense_partial(q, keys[: self.start], values[: self.start], scale)
        own = causal_partial(q, keys[self.start :], values[self.start :], scale)
        rows = self.end - self.start
        outs = torch.cat((past[0], own[0]), dim=1).to(torch.float32)
        table = torch.arange(rows, device=q.device)[:, None] + torch.tensor([0, rows], device=q.device)
        return merge_partials(outs, torch.cat((past[1], own[1]), dim=1), table)
