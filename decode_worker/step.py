"""What the rows of one step attend to: every run of keys once, with the rows that read it.

Rows of all requests in the step are packed into one sequence. A **piece** is one run of keys and the
rows that attend to it: a block with the stacked rows of every request that uses it, each rotated back
by its own offset; or a part of a tail, unrotated, which several samples or turns of a conversation may
share.

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

from decode_worker.arena import Extent
from decode_worker.tail import SEGMENT_TOKENS, Tail


@dataclass(frozen=True, slots=True)
class Placement:
    """A block laid into a prompt: its extent and its offset in tokens."""

    key: bytes
    extent: Extent
    offset: int


@dataclass(frozen=True, slots=True)
class RowSpan:
    """One sample's rows in a step: its next `len(token_ids)` tokens."""

    token_ids: Sequence[int]
    placements: Sequence[Placement]
    tail: Tail

    @property
    def position(self) -> int:
        """Global position of the first row."""
        return self.tail.start + self.tail.filled


@dataclass(slots=True)
class Piece:
    """A run of keys and the rows that attend to it.

    Attributes:
        first: Record of its first key in layer 0.
        stride: Records from one layer to the next.
        keys: Keys in the run.
        local: Keys lie at local positions: row i's query is turned back by `bases[i]`. Else they lie at global ones.
        causal: Row i sees keys 0..i, and rows past the last key see all. Else every row sees every key.
        rows: Query rows, in packed order.
        bases: Global position of the first key, for each row.
    """

    first: int
    stride: int
    keys: int
    local: bool
    causal: bool
    rows: list[int] = field(default_factory=list)
    bases: list[int] = field(default_factory=list)

    def view(self, records: torch.Tensor, layer: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each [keys, kv_heads, head_dim], sharing the arena's memory."""
        start = self.first + layer * self.stride
        kv = records[start : start + self.keys].view(self.keys, 2, kv_heads, -1)
        return kv[:, 0], kv[:, 1]


class StepPlan:
    """One step, laid out for whichever backend runs it. Made anew for each step.

    Args:
        spans: Rows by sample.
        share: False gives every sample a piece of its own for each block: for measuring what sharing saves.

    Attributes:
        token_ids: int64 [rows].
        positions: int64 [rows], global.
        slots: int64 [rows]: record of each row's own KV in layer 0; layer l lies `l * SEGMENT_TOKENS` further.
        pieces: Those with local keys first.
        rows: int64 [stacked]: query row of each stacked row; stacked rows follow the pieces' order.
        bases: int64 [stacked].
        turned: Stacked rows whose queries are turned; they come first.
        most_rows: Rows of the piece that has most.
    """

    def __init__(self, spans: Sequence[RowSpan], *, share: bool = True) -> None:
        self.token_ids = torch.tensor([token for span in spans for token in span.token_ids])
        starts = [(span.position, len(span.token_ids)) for span in spans]
        self.positions = torch.cat([torch.arange(start, start + count) for start, count in starts])
        self.slots = torch.cat([span.tail.slots(len(span.token_ids)) for span in spans])
        blocks = _block_pieces(spans, share=share)
        self.pieces = [*blocks, *_tail_pieces(spans, share=share)]
        self.turned = sum(len(piece.rows) for piece in blocks)
        self.rows = torch.tensor([row for piece in self.pieces for row in piece.rows])
        self.bases = torch.tensor([base for piece in self.pieces for base in piece.bases])
        self.most_rows = max(len(piece.rows) for piece in self.pieces)

    def merge_table(self) -> torch.Tensor:
        """int64 [rows, most]: the stacked rows of each query row, padded with the empty one past the last."""
        of_row: list[list[int]] = [[] for _ in range(len(self.token_ids))]
        stacked = 0
        for piece in self.pieces:
            for row in piece.rows:
                of_row[row].append(stacked)
                stacked += 1
        most = max(len(partials) for partials in of_row)
        return torch.tensor([[*partials, *[stacked] * (most - len(partials))] for partials in of_row])


def _block_pieces(spans: Sequence[RowSpan], *, share: bool) -> list[Piece]:
    pieces: dict[object, Piece] = {}
    first = 0
    for number, span in enumerate(spans):
        rows = range(first, first + len(span.token_ids))
        for placement in span.placements:
            extent, key = placement.extent, placement.key if share else (number, placement.offset)
            piece = pieces.get(key)
            if piece is None:
                pieces[key] = piece = Piece(extent.start, extent.tokens, extent.tokens, local=True, causal=False)
            piece.rows.extend(rows)
            piece.bases.extend([placement.offset] * len(rows))
        first = rows.stop
    return list(pieces.values())


def _tail_pieces(spans: Sequence[RowSpan], *, share: bool) -> list[Piece]:
    pieces: list[Piece] = []
    # Full segments that several samples read: samples of one question, turns of one conversation.
    full: dict[int, Piece] = {}
    first = 0
    for span in spans:
        count, filled, extents = len(span.token_ids), span.tail.filled, span.tail.extents
        for segment in range(-(-(filled + count) // SEGMENT_TOKENS)):
            begin = segment * SEGMENT_TOKENS
            end = min(begin + SEGMENT_TOKENS, filled + count)
            record, base = extents[segment].start, span.tail.start + begin
            # Keys of earlier steps: every row sees them all.
            seen = min(filled, end) - begin
            if seen > 0:
                piece = full.get(record) if seen == SEGMENT_TOKENS and share else None
                if piece is None:
                    piece = Piece(record, SEGMENT_TOKENS, seen, local=False, causal=False)
                    pieces.append(piece)
                    if seen == SEGMENT_TOKENS:
                        full[record] = piece
                piece.rows.extend(range(first, first + count))
                piece.bases.extend([base] * count)
            # Keys of this step: row i of the rest sees keys 0..i, and rows past the segment's end see all.
            own = max(filled, begin)
            if own < end:
                rows = list(range(first + own - filled, first + count))
                new = Piece(record + own - begin, SEGMENT_TOKENS, end - own, local=False, causal=len(rows) > 1)
                new.rows, new.bases = rows, [span.tail.start + own] * len(rows)
                pieces.append(new)
        first += count
    return pieces
