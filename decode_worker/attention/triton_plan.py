"""What the segment kernel is told of a step: pieces joined and cut into work items, rows and partials numbered.

Pieces that the same rows read are laid end to end, and the whole is cut into **items** of about equal
length: what one program of the kernel does per KV head, for as many rows as fit one tile. An item's part of
one piece is a **run**. A **partial** is what an item leaves for one row; a row's partials are merged
afterwards. Joined pieces are what keeps partials few where blocks are short and rows many.

    three pieces that the same 5 rows read, tiles of 4 rows and of 64 keys

             a: 300 keys     b: 420 keys              c: 160
    rows    ├───────────────┼──────────╎─────────────┼────────┤
    0-3     │          item 0          ╎        item 2        │      runs of items 0 and 1: a 0..300, b 0..128
    4       │          item 1          ╎        item 3        │      runs of items 2 and 3: b 128..420, c 0..160
            └──────────────────────────╎──────────────────────┘

Everything is one int32 buffer, so that a step costs one copy to the device:

    items    [items, 5]   first run, run past the last, first row of the tile, rows, first partial
    runs     [runs, 5]    first, stride, key begin, key end, first stacked row of the piece
    rows     [stacked]    query row
    turns    [stacked]    line of the angle tables; line 0 does not turn
    limits   [stacked]    keys before this one are visible: causality, and the end of the piece
    reaches  [stacked]    distance from the piece's key 0 to the row; a window hides keys <= reach - window
    deltas   [turns]      positions by which a line of the angle tables turns
    offsets  [rows + 1]   a row's partials are members[offsets[row] : offsets[row + 1]]
    members  [partials]

Sections begin at multiples of 16 bytes and lie where the counts alone say. A launch captured with padded
counts therefore finds the tables of any later step that fits them: padded items have no rows and padded
rows no partials. Row order, and so which keys are causal, follows from positions alone: a key is seen by
the rows at or after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from itertools import chain

import numpy as np
import numpy.typing as npt

from decode_worker.attention.triton_cut import Ints, StepTooLargeError, Tiling, cut_items
from decode_worker.step import Piece

ITEM_FIELDS = 5
RUN_FIELDS = 5
_ALIGN = 4


@dataclass(frozen=True, slots=True)
class Counts:
    """Sizes of a step's tables: what a captured launch fixes."""

    rows: int
    stacked: int
    runs: int
    items: int
    partials: int
    turns: int

    @classmethod
    def most(cls, *, rows: int, stacked: int, partials: int) -> Counts:
        """Counts that hold every step of so many rows, stacked rows and partials."""
        # An item has a partial of its own, a piece a stacked row; a run begins where a piece or an item does.
        return cls(rows, stacked, stacked + partials, partials, partials, stacked + 1)

    def holds(self, other: Counts) -> bool:
        """True when tables of these counts have room for those of `other`."""
        return all(mine >= its for mine, its in zip(astuple(self), astuple(other), strict=True))


@dataclass(frozen=True, slots=True)
class Sections:
    """Where each table begins in the buffer, in int32 elements; follows from the counts."""

    items: int
    runs: int
    rows: int
    turns: int
    limits: int
    reaches: int
    deltas: int
    offsets: int
    members: int
    size: int

    @classmethod
    def of(cls, counts: Counts) -> Sections:
        """The sections of tables with these counts."""
        sizes = [counts.items * ITEM_FIELDS, counts.runs * RUN_FIELDS, *[counts.stacked] * 4]
        sizes += [counts.turns, counts.rows + 1, counts.partials]
        padded = [-(-size // _ALIGN) * _ALIGN for size in sizes]
        return cls(*(int(start) for start in np.cumsum([0, *padded])))


@dataclass(frozen=True, slots=True, eq=False)
class StepTables:
    """The tables of a step, unpadded."""

    counts: Counts
    items: Ints
    runs: Ints
    rows: Ints
    turns: Ints
    limits: Ints
    reaches: Ints
    deltas: Ints
    offsets: Ints
    members: Ints

    def pack(self, counts: Counts, into: npt.NDArray[np.int32]) -> None:
        """Writes the tables into a buffer laid out for `counts`, which must hold this step."""
        if not counts.holds(self.counts):
            raise StepTooLargeError(f"step {self.counts} does not fit a launch of {counts}")
        sections = Sections.of(counts)
        into[: sections.size] = 0
        for section in fields(sections)[:-1]:
            table = getattr(self, section.name).reshape(-1)
            start = getattr(sections, section.name)
            into[start : start + table.size] = table
        end = sections.offsets + counts.rows + 1
        into[sections.offsets + self.offsets.size : end] = self.counts.partials


def plan_tables(
    pieces: Sequence[Piece],
    positions: Sequence[int] | Ints,
    tiling: Tiling,
    *,
    heads: int,
    kv_heads: int,
    partials: int,
) -> StepTables:
    """Numbers a step's stacked rows, runs, items and partials.

    Args:
        pieces: In any order; stacked rows are numbered in it.
        positions: Global position of each query row.
        tiling: How to cut.
        heads: Query heads.
        kv_heads: KV heads; each item is done once for each.
        partials: Most partials there is room for; items are made longer to stay within it.

    Raises:
        StepTooLargeError: Even with the longest items there are more partials than that.
    """
    keys, counts, firsts, strides = (
        np.fromiter(values, np.int64, len(pieces))
        for values in (
            (piece.keys for piece in pieces),
            (len(piece.rows) for piece in pieces),
            (piece.first for piece in pieces),
            (piece.stride for piece in pieces),
        )
    )
    stacked = int(counts.sum())
    stacked_first = np.cumsum(counts) - counts
    rows = np.fromiter(chain.from_iterable(piece.rows for piece in pieces), np.int64, stacked)
    bases = np.fromiter(chain.from_iterable(piece.bases for piece in pieces), np.int64, stacked)
    local = np.repeat(np.fromiter((piece.local for piece in pieces), bool, len(pieces)), counts)
    reaches = np.asarray(positions, np.int64)[rows] - bases
    limits = np.clip(reaches + 1, 0, np.repeat(keys, counts))
    deltas, turns = _turns(np.where(local, -bases, 0))

    joined = _joined(rows, stacked_first, counts) if tiling.join else np.arange(len(pieces))
    # Pieces in the order in which they are laid end to end; `starts` in tiles of keys over all of them.
    order = np.argsort(joined, kind="stable")
    tiles = -(-keys // tiling.tile_keys)
    starts = np.cumsum(tiles[order]) - tiles[order]
    leads = np.flatnonzero(np.diff(joined[order], prepend=-1))
    lengths = np.add.reduceat(tiles[order], leads) if len(leads) else tiles
    cut = cut_items(
        lengths, counts[order[leads]], tiling, group=heads // kv_heads, kv_heads=kv_heads, partials=partials
    )
    of, begin, end, row, taken = cut
    begin, end = starts[leads][of] + begin, starts[leads][of] + end
    edges = np.union1d(starts, begin)
    within = np.searchsorted(starts, edges, side="right") - 1
    piece, past = order[within], np.append(edges, tiles.sum())[1:]
    key_begin = (edges - starts[within]) * tiling.tile_keys
    key_end = np.minimum((past - starts[within]) * tiling.tile_keys, keys[piece])
    runs = np.stack((firsts[piece], strides[piece], key_begin, key_end, stacked_first[piece]), axis=1)
    partial_first = np.cumsum(taken) - taken
    run_begin, run_end = np.searchsorted(edges, begin), np.searchsorted(edges, end)
    items = np.stack((run_begin, run_end, row, taken, partial_first), axis=1)

    total = int(taken.sum())
    first_row = stacked_first[order[leads]][of] + row
    row_of = rows[np.arange(total) + np.repeat(first_row - partial_first, taken)]
    offsets = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=len(positions)))))
    members = np.argsort(row_of, kind="stable")
    sizes = Counts(len(positions), stacked, len(runs), len(items), total, len(deltas))
    return StepTables(sizes, items, runs, rows, turns, limits, reaches, deltas, offsets, members)


def _turns(by: Ints) -> tuple[Ints, Ints]:
    """Distinct turns, and each stacked row's line among them. Line 0 does not turn, whatever sorts before it."""
    deltas, turns = np.unique(np.concatenate(([0], by)), return_inverse=True)
    still = int(turns[0])
    deltas[[0, still]] = deltas[[still, 0]]
    return deltas, np.where(turns == still, 0, np.where(turns == 0, still, turns))[1:]


def _joined(rows: Ints, stacked_first: Ints, counts: Ints) -> Ints:
    """Number of the stretch that each piece belongs to: one for all pieces that the same rows read."""
    numbers: dict[bytes, int] = {}
    ends = stacked_first + counts
    spans = zip(stacked_first, ends, strict=True)
    return np.array([numbers.setdefault(rows[a:b].tobytes(), len(numbers)) for a, b in spans], np.int64)
