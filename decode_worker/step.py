"""One step's attention: every block's KV read once for all rows that use it, partials merged exactly.

Rows of all requests in the step are packed into one sequence. A **piece** is one run of keys and the
rows that attend to it: a block with the stacked rows of every request that uses it, each rotated back
by its own offset; or a part of one request's tail, unrotated.

    packed rows      r0 r1 r2 | r3 | r4              (request A's question, B, C decoding)
    block X  piece   r0 r1 r2   r3                   rotated back by A's offset, by B's offset
    block Y  piece              r3   r4
    tail A   piece   r0 r1 r2                        causal
    tail B   piece              r3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from decode_worker.arena import Arena
from decode_worker.attention.native import NativeKernel, Run
from decode_worker.tail import SEGMENT_TOKENS, Tail
from shared.engine.partials import causal_partial, dense_partial, masked_partial, merge_partials
from shared.engine.probe import LayerGeometry
from shared.engine.rotation import Rotation


@dataclass(frozen=True, slots=True)
class Placement:
    """A block laid into a prompt: its KV [layers, tokens, 2, kv_heads, head_dim] and its offset in tokens."""

    key: bytes
    kv: torch.Tensor
    offset: int


@dataclass(frozen=True, slots=True)
class RowSpan:
    """One request's rows in a step: its next `len(token_ids)` tokens."""

    token_ids: Sequence[int]
    placements: Sequence[Placement]
    tail: Tail

    @property
    def position(self) -> int:
        """Global position of the first row."""
        return self.tail.start + self.tail.filled


@dataclass(slots=True)
class _Piece:
    """A run of keys `kv [layers, n, 2, kv_heads, d]` whose first key lies at `bases[i]` for row `rows[i]`."""

    kv: torch.Tensor
    causal: bool
    rows: list[int] = field(default_factory=list)
    bases: list[int] = field(default_factory=list)


class StepContext:
    """Attention context of one step; built once, used by every layer, then dropped."""

    def __init__(
        self,
        arena: Arena,
        layers: Sequence[LayerGeometry],
        spans: Sequence[RowSpan],
        kernel: NativeKernel | None = None,
    ) -> None:
        self._records = arena.records
        self._layers = layers
        device = arena.records.device
        self.token_ids = torch.tensor([token for span in spans for token in span.token_ids], device=device)
        starts = [(span.position, len(span.token_ids)) for span in spans]
        self.positions = torch.cat([torch.arange(start, start + count) for start, count in starts]).to(device)
        self._slots = torch.cat([span.tail.slots(len(span.token_ids)) for span in spans]).to(device)
        blocks, tails = _block_pieces(spans), _tail_pieces(spans)
        self._pieces = [*blocks, *tails]
        self._turned = sum(len(piece.rows) for piece in blocks)
        self._rows = torch.tensor([row for piece in self._pieces for row in piece.rows], device=device)
        self._bases = torch.tensor([base for piece in self._pieces for base in piece.bases], device=device)
        self._table = _merge_table(self._pieces, len(self.token_ids)).to(device)
        self._kernel = kernel
        self._runs = kernel.pieces(_runs(self._pieces), arena.shape.record_elements) if kernel is not None else None
        self._most_rows = max(len(piece.rows) for piece in self._pieces)
        # Layers with equal rotations share one Rotation object (probe), hence identity as the key.
        self._angles: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Writes the rows' own KV into their tails, then attends to blocks and tails."""
        if self._kernel is not None and self._runs is not None and window is None:
            per_head = self._most_rows * q.shape[1] // k.shape[1]
            if self._kernel.takes(q.dtype, q.shape[3], per_head):
                return self._attend_natively(self._kernel, self._runs, layer, (q, k, v), scale)
        own = torch.cat((k[0], v[0]), dim=0).transpose(0, 1).reshape(k.shape[2], -1)
        self._records.index_copy_(0, self._slots + layer * SEGMENT_TOKENS, own)
        queries = self._stacked_queries(layer, q[0])
        heads, partials, width = queries.shape
        outs = torch.zeros(heads, partials + 1, width, dtype=torch.float32, device=q.device)
        lses = torch.full((heads, partials + 1), float("-inf"), device=q.device)
        start = 0
        for piece in self._pieces:
            end = start + len(piece.rows)
            keys, values = piece.kv[layer, :, 0], piece.kv[layer, :, 1]
            part = queries[:, start:end]
            if window is None or not self._cut(start, end, window):
                partial = causal_partial if piece.causal else dense_partial
                outs[:, start:end], lses[:, start:end] = partial(part, keys, values, scale)
            else:
                visible = self._visible(piece, start, end, window)
                if bool(visible.any()):
                    outs[:, start:end], lses[:, start:end] = masked_partial(part, keys, values, scale, visible)
            start = end
        merged = merge_partials(outs, lses, self._table)
        return merged.transpose(0, 1)[None].to(q.dtype)

    def _attend_natively(
        self,
        kernel: NativeKernel,
        runs: torch.Tensor,
        layer: int,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scale: float,
    ) -> torch.Tensor:
        rotation = self._layers[layer].rotation
        return kernel.attend(
            self._records,
            layer,
            qkv,
            self._slots,
            SEGMENT_TOKENS,
            runs,
            self._rows,
            rotation,
            self._tables(rotation),
            self._table,
            scale,
        )

    def _stacked_queries(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        stacked = q[:, self._rows]
        rotation = self._layers[layer].rotation
        if self._turned and rotation.rotary_dim:
            cos, sin = self._tables(rotation)
            stacked[:, : self._turned] = rotation.apply(stacked[:, : self._turned], cos, sin).to(q.dtype)
        return stacked

    def _tables(self, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        if id(rotation) not in self._angles:
            self._angles[id(rotation)] = rotation.tables(-self._bases[: self._turned])
        return self._angles[id(rotation)]

    def _cut(self, start: int, end: int, window: int) -> bool:
        """True when some row is too far from the piece's first key to see all of it."""
        farthest = self.positions[self._rows[start:end]] - self._bases[start:end]
        return int(farthest.max()) >= window

    def _visible(self, piece: _Piece, start: int, end: int, window: int) -> torch.Tensor:
        rows = self.positions[self._rows[start:end]][:, None]
        keys = self._bases[start:end, None] + torch.arange(piece.kv.shape[1], device=rows.device)
        return (rows - keys < window) & (rows >= keys)


def _runs(pieces: Sequence[_Piece]) -> list[Run]:
    runs, first = [], 0
    for piece in pieces:
        runs.append(Run(piece.kv, first, len(piece.rows), piece.causal))
        first += len(piece.rows)
    return runs


def _block_pieces(spans: Sequence[RowSpan]) -> list[_Piece]:
    pieces: dict[bytes, _Piece] = {}
    first = 0
    for span in spans:
        rows = range(first, first + len(span.token_ids))
        for placement in span.placements:
            piece = pieces.setdefault(placement.key, _Piece(placement.kv, causal=False))
            piece.rows.extend(rows)
            piece.bases.extend([placement.offset] * len(rows))
        first = rows.stop
    return list(pieces.values())


def _tail_pieces(spans: Sequence[RowSpan]) -> list[_Piece]:
    pieces = []
    first = 0
    for span in spans:
        count, filled = len(span.token_ids), span.tail.filled
        for segment in range(-(-(filled + count) // SEGMENT_TOKENS)):
            begin = segment * SEGMENT_TOKENS
            end = min(begin + SEGMENT_TOKENS, filled + count)
            view, base = span.tail.view(segment), span.tail.start + begin
            # Keys of earlier steps: every row sees them all.
            seen = min(filled, end) - begin
            if seen > 0:
                rows = list(range(first, first + count))
                pieces.append(_Piece(view[:, :seen], causal=False, rows=rows, bases=[base] * count))
            # Keys of this step: row i of the rest sees keys 0..i, and rows past the segment's end see all.
            own = max(filled, begin)
            if own < end:
                rows = list(range(first + own - filled, first + count))
                new = view[:, own - begin : end - begin]
                bases = [span.tail.start + own] * len(rows)
                pieces.append(_Piece(new, causal=len(rows) > 1, rows=rows, bases=bases))
        first += count
    return pieces


def _merge_table(pieces: Sequence[_Piece], rows: int) -> torch.Tensor:
    """int64 [rows, most]: for each row its partials, padded with the empty one past the last."""
    of_row: list[list[int]] = [[] for _ in range(rows)]
    partial = 0
    for piece in pieces:
        for row in piece.rows:
            of_row[row].append(partial)
            partial += 1
    most = max(len(partials) for partials in of_row)
    return torch.tensor([[*partials, *[partial] * (most - len(partials))] for partials in of_row])
