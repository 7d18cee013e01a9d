"""The planner, which needs no triton: every key of every row once, room respected, shares about equal."""

from __future__ import annotations

import heapq
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_worker.attention.triton_plan import (
    ITEM_FIELDS,
    Counts,
    Sections,
    SegmentPiece,
    StepTooLargeError,
    Tiling,
    cut_items,
    plan_step,
)

H200 = 132
SIZES = st.lists(st.tuples(st.integers(1, 600), st.integers(1, 40)), min_size=1, max_size=8)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@given(SIZES, st.integers(1, 64), st.sampled_from([1, 3, 4, 8]), st.integers(0, 200))
def test_every_row_meets_every_key_once(sizes: list[tuple[int, int]], programs: int, group: int, spare: int) -> None:
    keys, counts = ints(*(key for key, _ in sizes)), ints(*(rows for _, rows in sizes))
    room = int(counts.sum()) + spare
    tiling = Tiling(16, 16, programs, min_keys=32)
    piece, begin, end, row, taken = cut_items(keys, counts, tiling, group=group, kv_heads=2, partials=room)
    met: Counter[tuple[int, int, int]] = Counter()
    for i, b, e, r, n in zip(piece, begin, end, row, taken, strict=True):
        assert 0 < n <= 16 // group
        assert b < e
        assert b % tiling.tile_keys == 0
        met.update((int(i), line, key) for line in range(r, r + n) for key in range(b, e, tiling.tile_keys))
    wanted = {
        (i, line, key)
        for i, (length, rows) in enumerate(sizes)
        for line in range(rows)
        for key in range(0, length, tiling.tile_keys)
    }
    assert set(met) == wanted
    assert set(met.values()) == {1}
    assert int(taken.sum()) <= room
    lengths = end - begin
    assert (lengths[:-1] >= lengths[1:]).all(), "longest first"


def test_row_tiles_of_the_same_keys_are_adjacent() -> None:
    tiling = Tiling(16, 64, 12, min_keys=64)
    _, begin, _, row, _ = cut_items(ints(512), ints(12), tiling, group=4, kv_heads=1, partials=1000)
    assert [int(start) for start in begin[:3]] == [0, 0, 0]
    assert [int(first) for first in row[:3]] == [0, 4, 8]


def test_splits_give_way_to_the_room_for_partials() -> None:
    tiling = Tiling(16, 64, 4 * H200)
    keys, counts = ints(32_768), ints(4)
    free = cut_items(keys, counts, tiling, group=4, kv_heads=8, partials=10_000)[0]
    tight = cut_items(keys, counts, tiling, group=4, kv_heads=8, partials=40)[0]
    assert len(tight) <= 10 < len(free)
    with pytest.raises(StepTooLargeError, match="4 stacked rows, room is for 3"):
        cut_items(keys, counts, tiling, group=4, kv_heads=8, partials=3)


@pytest.mark.parametrize(
    ("name", "keys", "rows"),
    [
        ("one long block", [32_768], [1]),
        ("sixteen passages", [2_048] * 16, [1] * 16),
        ("ragged passages", [100, 9_000, 731, 4_096, 2, 1_500, 17_000, 339], [1] * 8),
        ("shared by a batch", [900, 1_100, 4_000, 26_768], [16, 8, 3, 1]),
        ("a question chunk", [2_048] * 16, [256] * 16),
    ],
)
def test_the_last_processor_is_busy_little_longer_than_the_mean(name: str, keys: list[int], rows: list[int]) -> None:
    tiling = Tiling(16, 64, 4 * H200)
    _, begin, end, _, _ = cut_items(ints(*keys), ints(*rows), tiling, group=4, kv_heads=8, partials=1 << 20)
    # Two programs at a time on each processor; a program costs its keys and a start of about 32 more.
    slots = [0] * (2 * H200)
    costs = [int(cost) + 32 for cost in np.repeat(end - begin, 8)]
    for cost in costs:
        heapq.heappush(slots, heapq.heappop(slots) + cost)
    assert max(slots) <= 1.25 * sum(costs) / len(slots), name


def test_tables_of_a_step() -> None:
    pieces = [
        SegmentPiece(first=1000, layer_stride=40, keys=40, rows=[0, 1, 2, 2], bases=[7, 7, 0, 50], local=True),
        SegmentPiece(first=5, layer_stride=16, keys=2, rows=[0, 1], bases=[60, 60], local=False),
    ]
    plan = plan_step(pieces, [60, 61, 99], Tiling(16, 16, 1), heads=8, kv_heads=2, partials=12)
    assert plan.counts == Counts(rows=3, stacked=6, items=2, partials=6, turns=3)
    assert plan.rows.tolist() == [0, 1, 2, 2, 0, 1]
    assert plan.reaches.tolist() == [53, 54, 99, 49, 0, 1]
    assert plan.limits.tolist() == [40, 40, 40, 40, 1, 2], "a tail is causal because of where its rows are"
    assert plan.deltas[0] == 0
    assert plan.deltas[plan.turns].tolist() == [-7, -7, 0, -50, 0, 0], "blocks turn back, tails stay"
    assert plan.items.tolist() == [[1000, 40, 0, 40, 0, 4, 0, 0], [5, 16, 0, 2, 4, 2, 4, 0]]
    parts = [plan.members[start:end].tolist() for start, end in zip(plan.offsets, plan.offsets[1:], strict=False)]
    assert parts == [[0, 4], [1, 5], [2, 3]]


def test_padded_tables_have_no_work_and_no_members() -> None:
    pieces = [SegmentPiece(9, 3, 3, [0], [4], local=True)]
    plan = plan_step(pieces, [20], Tiling(16, 16, 1), heads=2, kv_heads=2, partials=4)
    padded = Counts(rows=4, stacked=6, items=3, partials=5, turns=4)
    sections = Sections.of(padded)
    table = np.full(sections.size + 3, -1, np.int32)
    plan.pack(padded, table)
    assert (table[sections.size :] == -1).all()
    items = table[sections.items : sections.rows].reshape(-1, ITEM_FIELDS)
    assert [int(rows) for rows in items[:, 5]][:3] == [1, 0, 0]
    assert table[sections.offsets : sections.offsets + 5].tolist() == [0, 1, 1, 1, 1]
    assert all(start % 4 == 0 for start in (sections.rows, sections.offsets, sections.members, sections.size))
    with pytest.raises(StepTooLargeError, match="does not fit a launch"):
        plan.pack(Counts(1, 1, 1, 1, 1), table)


def test_a_step_without_pieces_is_empty() -> None:
    plan = plan_step([], [3, 4], Tiling(16, 16, 1), heads=2, kv_heads=1, partials=1)
    assert plan.counts == Counts(rows=2, stacked=0, items=0, partials=0, turns=1)
    assert plan.offsets.tolist() == [0, 0, 0]
