"""How the segment kernel's work is cut: tiles for a model and a step, and items that end together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
# What an item costs besides its keys (its rows, its partials), in tiles of keys; measured, roughly.
_ITEM_TILES = 2
_HALF_BYTES = 2
# Fewest rows of a matrix product; the largest head of which 64 half-precision keys leave room for three programs.
_NARROW = 16
_SMALL_DIM = 128


class StepTooLargeError(ValueError):
    """A step needs more than the workspace or the captured launch holds; says what and how much."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch is cut; equal tilings share one compiled kernel.

    Attributes:
        tile_rows: Query heads times stacked rows of a tile, at least 16.
        tile_keys: Keys read at a time.
        programs: Programs that run at once, over all KV heads; items are cut to fill them evenly.
        min_keys: Keys below which an item is not made shorter: a partial costs as much as a few dozen keys.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
        join: False gives every piece items of its own: for measuring what joining saves.
    """

    tile_rows: int
    tile_keys: int
    programs: int
    min_keys: int = 256
    warps: int = 4
    stages: int = 3
    join: bool = True


def choose_tiling(group: int, head_dim: int, item_bytes: int, most_rows: int, processors: int) -> Tiling:
    """Tiles for a model and a step: narrow for decoding, wide for question chunks.

    The largest that compile for sm_90 without spilling registers (`tests/kernels/test_triton_compile.py`).
    Narrow half-precision tiles of 64 keys leave room for three programs on a multiprocessor, others for two:
    an H200 was fastest with just as many in all. Float32 is multiplied exactly and not by the matrix units,
    which takes more registers.
    """
    half, small = item_bytes == _HALF_BYTES, padded_dim(head_dim) <= _SMALL_DIM
    lines = min(64 if half else 32, _power_of_two(group * most_rows))
    lines = max(_NARROW, lines, _power_of_two(group))
    if half:
        keys, warps = (64, 4) if small else (32, 4 if lines <= 2 * _NARROW else 8)
    else:
        keys, warps = (32 if small and lines == _NARROW else 16, 8)
    at_once = 3 if half and small and lines == _NARROW else 2
    return Tiling(lines, keys, at_once * processors, warps=warps)


def padded_dim(head_dim: int) -> int:
    """The next power of two, at least 16: what a tile's matrix product takes."""
    return max(16, _power_of_two(head_dim))


def cut_items(
    tiles: Ints, counts: Ints, tiling: Tiling, *, group: int, kv_heads: int, partials: int
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Cuts stretches of `tiles[i]` tiles of keys, which `counts[i]` rows read, into items, longest first.

    Items of a stretch differ by at most one tile of keys; their length is the one with which all programs
    should end soonest. Programs start in order, so longest first leaves the short ones to fill the end of
    the wave; row tiles that read the same keys are adjacent, so that the cache serves all but the first.

    Returns:
        Of each item its stretch, first tile of keys, tile past the last, first row, and rows.
    """
    if (needed := int(counts.sum())) > partials:
        raise StepTooLargeError(f"step needs {needed} partials, room is for {partials}")
    tile = tiling.tile_rows // group
    row_tiles = -(-counts // tile)
    least = max(tiling.min_keys // tiling.tile_keys, 1)
    splits = _splits(tiles, counts, row_tiles * kv_heads, least, tiling.programs, partials)
    of_stretch = row_tiles * splits
    stretch = np.repeat(np.arange(len(tiles)), of_stretch)
    index = np.arange(len(stretch)) - np.repeat(np.cumsum(of_stretch) - of_stretch, of_stretch)
    split, row = index // row_tiles[stretch], index % row_tiles[stretch] * tile
    begin = split * tiles[stretch] // splits[stretch]
    end = (split + 1) * tiles[stretch] // splits[stretch]
    taken = np.minimum(counts[stretch] - row, tile)
    order = np.argsort(begin - end, kind="stable")
    return stretch[order], begin[order], end[order], row[order], taken[order]


def _splits(tiles: Ints, counts: Ints, lanes: Ints, least: int, programs: int, partials: int) -> Ints:
    """Parts of each stretch. `lanes[i]` programs read a part of stretch i; `programs` run at once.

    Estimated for every length from `least` to three times an equal share: a wave of whole items, or all the
    work evenly spread, whichever is longer. An item costs a few tiles more than its keys.
    """
    share = -(-int((lanes * tiles).sum()) // programs)
    best, soonest = -(-tiles // max(least, share)), None
    for length in dict.fromkeys(max(least, share * eighths // 8) for eighths in range(4, 25)):
        splits = -(-tiles // length)
        costs = -(-tiles // np.maximum(splits, 1)) + _ITEM_TILES
        long = costs > max(costs, default=0) // 2
        wave = -(-int((lanes * splits)[long].sum()) // programs) * int(max(costs, default=0))
        spread = int((lanes * splits * costs).sum()) / programs
        if soonest is None or max(wave, spread) < soonest:
            best, soonest = splits, max(wave, spread)
    while int((counts * best).sum()) > partials:
        best = -(-best // 2)
    return best


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
