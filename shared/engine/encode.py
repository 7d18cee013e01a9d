"""Encoding a block: its KV alone, at local positions, straight into its extent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import torch

from shared.engine.partials import causal_partial, causal_runs, dense_partial, masked_partial, merge_partials
from shared.engine.served_model import ServedModel
from shared.kv.layout import KvShape

if TYPE_CHECKING:
    from shared.engine.native.encoder import NativeEncoder

CHUNK_TOKENS = 512
# Rows of a forward over several blocks: enough to fill a large GPU, few enough to bound activations.
PACK_TOKENS = 8192
# A block's token ids and its extent.
Block = tuple[Sequence[int], torch.Tensor]


class Progress(Protocol):
    """Told, on the thread that encodes, which layers of an extent are final: finite, and not written again."""

    @property
    def stops(self) -> Sequence[int]:
        """Counts of layers at which it wants to be told, rising; the last is all layers."""
        ...

    def layers_done(self, count: int) -> None:
        """Layers [0, count) of all tokens are final; called for each stop, for the last when the forward has ended."""
        ...


def new_extent(shape: KvShape, tokens: int) -> torch.Tensor:
    """A fresh extent [layers, tokens, 2, kv_heads, head_dim]: the forward writes it and ZeroMQ sends it, uncopied."""
    return torch.empty(shape.layers, tokens, 2, shape.kv_heads, shape.head_dim, dtype=getattr(torch, shape.dtype))


def encode_block(
    model: ServedModel,
    token_ids: list[int],
    extent: torch.Tensor,
    chunk_tokens: int = CHUNK_TOKENS,
    native: NativeEncoder | None = None,
    progress: Progress | None = None,
) -> None:
    """Fills `extent` with the KV of `token_ids` at positions 0..n-1, in causal chunks of `chunk_tokens`.

    Args:
        model: The model; the caller's thread must own it.
        token_ids: The block's tokens, n of them.
        extent: [layers, n, 2, kv_heads, head_dim], written whole. Where it lies on another device than the model,
            the KV is made beside the model and copied over as `progress` is told of it, the rest at the end.
        chunk_tokens: Rows of one forward pass; bounds activations, not the result.
        native: Computes the chunks instead of transformers' forward, where it was proved for this model.
        progress: Told of layers while later ones are computed, in the last chunk: before it none is final.

    Raises:
        ArithmeticError: The KV holds infinities or NaN; served, they would spoil every later answer.
    """
    ids = torch.tensor(token_ids, device=model.device)
    made = extent if extent.device == model.device else torch.empty_like(extent, device=model.device)
    final = _Final(made, extent, progress)
    for start in range(0, len(token_ids), chunk_tokens):
        end = min(start + chunk_tokens, len(token_ids))
        stops = final.stops if end == len(token_ids) else ()
        if native is not None:
            native.encode_chunk(ids[start:end], start, made, stops, final.layers)
            continue
        positions = torch.arange(start, end, device=model.device)
        model.forward_kv(ids[start:end], positions, _ChunkContext(made, start, end, stops, final.layers))
    final.layers(len(extent))


def encode_blocks(
    model: ServedModel,
    blocks: Sequence[Block],
    pack_tokens: int = PACK_TOKENS,
    progress: Sequence[Progress | None] | None = None,
) -> list[ArithmeticError | None]:
    """Fills the extents of several blocks; on CUDA in half precision, many in one forward.

    A short block leaves a GPU idle while Python launches the next layer; packed, launches are shared. On a CPU
    blocks are encoded one by one, which is faster there (docs/measurements.md).

    Args:
        model: The model; the caller's thread must own it.
        blocks: Token ids and extents, as `encode_block` takes them.
        pack_tokens: Most rows of one forward; a longer block is encoded alone, in chunks.
        progress: For each block; told of those that share a forward when it has ended, of one after the other.

    Returns:
        For each block None, or why its KV cannot be served.
    """
    errors: list[ArithmeticError | None] = [None] * len(blocks)
    packs = model.device.type == "cuda" and model.dtype != torch.float32
    for pack in _packs(blocks, pack_tokens if packs else 0):
        told = [progress[index] if progress is not None else None for index in pack]
        if len(pack) > 1 and _encode_pack(model, [blocks[index] for index in pack], told):
            continue
        for index, one in zip(pack, told, strict=True):
            ids, extent = blocks[index]
            try:
                encode_block(model, list(ids), extent, progress=one)
            except ArithmeticError as error:
                errors[index] = error
    return errors


def _packs(blocks: Sequence[Block], tokens: int) -> Iterator[list[int]]:
    """Indexes of blocks that share a forward."""
    pack: list[int] = []
    rows = 0
    for index, (ids, _) in enumerate(blocks):
        if pack and rows + len(ids) > tokens:
            yield pack
            pack, rows = [], 0
        pack.append(index)
        rows += len(ids)
    if pack:
        yield pack


def _encode_pack(model: ServedModel, blocks: Sequence[Block], progress: Sequence[Progress | None]) -> bool:
    """Encodes blocks together; False, with nothing written, when any of the KV is not finite."""
    bounds = [0, *accumulate(len(ids) for ids, _ in blocks)]
    extent = blocks[0][1]
    made = torch.empty(len(extent), bounds[-1], *extent.shape[2:], dtype=extent.dtype, device=model.device)
    ids = torch.tensor([token for ids, _ in blocks for token in ids], device=model.device)
    positions = torch.cat([torch.arange(len(ids)) for ids, _ in blocks]).to(model.device)
    starts = torch.tensor(bounds, dtype=torch.int32, device=model.device)
    model.forward_kv(ids, positions, _PackContext(made, starts))
    if not bool(torch.isfinite(made).all()):
        return False
    for (_, into), told, start, end in zip(blocks, progress, bounds, bounds[1:], strict=False):
        into.copy_(made[:, start:end])
        if told is not None:
            for stop in told.stops:
                told.layers_done(stop)
    return True


@dataclass(slots=True)
class _Final:
    """How far the layers of a block are final: found finite, in the extent, and told of.

    The last layers are never told of before the forward has ended: of a forward that fails no block is ever whole.
    """

    made: torch.Tensor
    extent: torch.Tensor
    progress: Progress | None
    count: int = 0

    @property
    def stops(self) -> Sequence[int]:
        """Counts of layers after which a forward calls `layers`; it goes on with the next."""
        return () if self.progress is None else self.progress.stops[:-1]

    def layers(self, count: int) -> None:
        """Layers [0, count) have been written."""
        fresh = self.made[self.count : count]
        if not bool(torch.isfinite(fresh).all()):
            tokens = self.extent.shape[1]
            raise ArithmeticError(f"the KV of a block of {tokens} tokens is not finite in {self.extent.dtype}")
        if self.made is not self.extent:
            self.extent[self.count : count].copy_(fresh)
        self.count = count
        if self.progress is not None:
            self.progress.layers_done(count)


@dataclass(frozen=True, slots=True)
class _PackContext:
    """Rows of several blocks, end to end: each sees its own block, causally."""

    made: torch.Tensor
    bounds: torch.Tensor

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        rows = self.made[layer]
        rows[:, 0] = k[0].transpose(0, 1)
        rows[:, 1] = v[0].transpose(0, 1)
        return causal_runs(q[0], rows[:, 0], rows[:, 1], self.bounds, scale, window).transpose(0, 1)[None]


@dataclass(frozen=True, slots=True)
class _ChunkContext:
    """Rows [start, end) of a block: they see the block's earlier rows, and one another causally.

    `done` is called with each of `stops`, counts of layers, when so many layers have these rows.
    """

    extent: torch.Tensor
    start: int
    end: int
    stops: Sequence[int]
    done: Callable[[int], None]

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        rows = self.extent[layer]
        rows[self.start : self.end, 0] = k[0].transpose(0, 1)
        rows[self.start : self.end, 1] = v[0].transpose(0, 1)
        if layer + 1 in self.stops:
            self.done(layer + 1)
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
