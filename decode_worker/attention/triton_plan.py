"""What the segment kernel is told of a step: pieces cut into work items, rows and partials numbered.

A **piece** is one run of keys and the stacked rows that attend to it. An **item** is what one program
of the kernel does per KV head: some of a piece's keys for as many of its rows as fit one tile. A
**partial** is what an item leaves for one row; a row's partials are merged afterwards.

    piece, 5 rows, 700 keys                  items with tiles of 4 rows, splits of at most 256 keys
            keys 0 ....................700          0..256     256..512    512..700
    rows 0-3 ┌────────────────────────┐      rows 0-3 │ item 0  │  item 2   │ item 4 │
    row  4   └────────────────────────┘      row  4   │ item 1  │  item 3   │ item 5 │

Everything is one int32 buffer, so that a step costs one copy to the device:

    items    [items, 8]   first, layer_stride, key_begin, key_end, stacked_first, rows, partial_first, 0
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

ITEM_FIELDS = 8
_ALIGN = 4
Ints = npt.NDArray[np.int64]


class StepTooLargeError(ValueError):
    """A step needs more than the workspace or the captured launch holds; says what and how much."""


@dataclass(frozen=True, slots=True)
class SegmentPiece:
    """A run of adjacent records in every layer, and the rows that attend to it.

    Attributes:
        first: Record of its first key in layer 0.
        layer_stride: Records from one layer to the next.
        keys: Written keys in the run.
        rows: Query rows of the step; one occurs again for every place at which its prompt lays the block.
        bases: Global position of the first key, for each row.
        local: Keys are rotated at 0..keys-1, so that a row turns back by its base; else at global positions.
    """

    first: int
    layer_stride: int
    keys: int
    rows: Sequence[int]
    bases: Sequence[int]
    local: bool


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch is cut; equal tilings share one compiled kernel.

    Attributes:
        tile_rows: Query heads times stacked rows of a tile, at least 16.
        tile_keys: Keys read at a time.
        programs: Programs that should run at once, over all KV heads; what splits aim at.
        min_keys: Keys below which a piece is not split further: a partial costs as much as a few dozen keys.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
    """

    tile_rows: int
    tile_keys: int
    programs: int
    min_keys: int = 256
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, slots=True)
class Counts:
    """Sizes of a step's tables: what a captured launch fixes."""

    rows: int
    stacked: int
    items: int
    partials: int
    turns: int

    def holds(self, other: Counts) -> bool:
        """True when tables of these counts have room for those of `other`."""
        return all(mine >= its for mine, its in zip(astuple(self), astuple(other), strict=True))


@dataclass(frozen=True, slots=True)
class Sections:
    """Where each table begins in the buffer, in int32 elements; follows from the counts."""

    items: int
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
        sizes = [counts.items * ITEM_FIELDS, *[counts.stacked] * 4, counts.turns, counts.rows + 1, counts.partials]
        padded = [-(-size // _ALIGN) * _ALIGN for size in sizes]
        return cls(*(int(start) for start in np.cumsum([0, *padded])))


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """The tables of a step, unpadded."""

    counts: Counts
    items: Ints
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


def plan_step(
    pieces: Sequence[SegmentPiece],
    positions: Sequence[int],
    tiling: Tiling,
    *,
    heads: int,
    kv_heads: int,
    partials: int,
) -> StepPlan:
    """Numbers a step's stacked rows, items and partials.

    Args:
        pieces: In any order; stacked rows are numbered in it.
        positions: Global position of each query row.
        tiling: How to cut.
        heads: Query heads.
        kv_heads: KV heads; each item is done once for each.
        partials: Most partials there is room for; splits are made longer to stay within it.
    """
    keys, counts, firsts, strides = (
        np.fromiter(values, np.int64, len(pieces))
        for values in (
            (piece.keys for piece in pieces),
            (len(piece.rows) for piece in pieces),
            (piece.first for piece in pieces),
            (piece.layer_stride for piece in pieces),
        )
    )
    stacked = int(counts.sum())
    rows = np.fromiter(chain.from_iterable(piece.rows for piece in pieces), np.int64, stacked)
    bases = np.fromiter(chain.from_iterable(piece.bases for piece in pieces), np.int64, stacked)
    local = np.repeat(np.fromiter((piece.local for piece in pieces), bool, len(pieces)), counts)
    reaches = np.asarray(positions, np.int64)[rows] - bases
    limits = np.clip(reaches + 1, 0, np.repeat(keys, counts))
    deltas, turns = np.unique(np.concatenate(([0], np.where(local, -bases, 0))), return_inverse=True)
    # Line 0 is the one that does not turn, whatever sorts before it.
    still = int(turns[0])
    deltas[[0, still]] = deltas[[still, 0]]
    turns = np.where(turns == still, 0, np.where(turns == 0, still, turns))[1:]

    cut = cut_items(keys, counts, tiling, group=heads // kv_heads, kv_heads=kv_heads, partials=partials)
    piece, begin, end, row, taken = cut
    partial_first = np.cumsum(taken) - taken
    stacked_first = (np.cumsum(counts) - counts)[piece] + row
    items = np.stack(
        (firsts[piece], strides[piece], begin, end, stacked_first, taken, partial_first, np.zeros_like(taken)), axis=1
    )
    total = int(taken.sum())
    row_of = rows[np.arange(total) + np.repeat(stacked_first - partial_first, taken)]
    offsets = np.concatenate(([0], np.cumsum(np.bincount(row_of, minlength=len(positions)))))
    sizes = Counts(rows=len(positions), stacked=stacked, items=len(items), partials=total, turns=len(deltas))
    members = np.argsort(row_of, kind="stable")
    return StepPlan(sizes, items, rows, turns, limits, reaches, deltas, offsets, members)


def cut_items(
    keys: Ints, counts: Ints, tiling: Tiling, *, group: int, kv_heads: int, partials: int
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Cuts pieces into items: piece, key begin, key end, first row of the piece, rows; longest first.

    Pieces of `keys[i]` keys and `counts[i]` rows. Splits of a piece differ by at most one tile of keys,
    and aim at the length at which `tiling.programs` programs have about equal shares of all keys. Programs
    start in order, so longest first leaves the short ones to fill the end of the wave; row tiles that
    read the same keys are adjacent, so that the cache serves all but the first.
    """
    if (needed := int(counts.sum())) > partials:
        raise StepTooLargeError(f"step has {needed} stacked rows, room is for {partials} partials")
    tile = tiling.tile_rows // group
    tiles, blocks = -(-counts // tile), -(-keys // tiling.tile_keys)
    share = max(-(-int((tiles * blocks).sum()) * kv_heads // tiling.programs), tiling.min_keys // tiling.tile_keys, 1)
    splits = -(-blocks // share)
    while int((counts * splits).sum()) > partials:
        share *= 2
        splits = -(-blocks // share)
    of_piece = tiles * splits
    piece = np.repeat(np.arange(len(keys)), of_piece)
    index = np.arange(len(piece)) - np.repeat(np.cumsum(of_piece) - of_piece, of_piece)
    split, row = index // tiles[piece], index % tiles[piece] * tile
    begin = split * blocks[piece] // splits[piece] * tiling.tile_keys
    end = np.minimum((split + 1) * blocks[piece] // splits[piece] * tiling.tile_keys, keys[piece])
    taken = np.minimum(counts[piece] - row, tile)
    order = np.argsort(begin - end, kind="stable")
    return piece[order], begin[order], end[order], row[order], taken[order]
