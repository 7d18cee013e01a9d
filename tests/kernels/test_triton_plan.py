"""The planner, which needs no triton: every key of every row once, room respected, shares about equal."""

from __future__ import annotations

import heapq
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_worker.attention.triton_cut import StepTooLargeError, Tiling, cut_items
from decode_worker.attention.triton_plan import ITEM_FIELDS, RUN_FIELDS, Counts, Sections, plan_tables
from decode_worker.step import Piece

H200 = 132
SIZES = st.lists(st.tuples(st.integers(1, 600), st.integers(1, 40)), min_size=1, max_size=8)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def piece(keys: int, rows: list[int], first: int = 0, *, bases: list[int] | None = None, local: bool = True) -> Piece:
    return Piece(first, keys, keys, local=local, causal=not local, rows=rows, bases=bases or [0] * len(rows))


@given(
    sizes=SIZES,
    programs=st.integers(1, 64),
    group=st.sampled_from([1, 3, 4, 8]),
    spare=st.integers(0, 200),
    join=st.booleans(),
)
def test_every_row_meets_every_key_once(
    *, sizes: list[tuple[int, int]], programs: int, group: int, spare: int, join: bool
) -> None:
    """Rows 0..n-1 read a piece, so that pieces with as many rows are joined."""
    room = sum(rows for _, rows in sizes) + spare
    tiling = Tiling(16, 16, programs, min_keys=32, join=join)
    pieces = [piece(keys, list(range(rows)), first=1000 * i) for i, (keys, rows) in enumerate(sizes)]
    tables = plan_tables(pieces, [10_000] * 40, tiling, heads=2 * group, kv_heads=2, partials=room)
    met: Counter[tuple[int, int, int]] = Counter()
    for run_begin, run_end, row, taken, _ in tables.items.tolist():
        assert 0 < taken <= 16 // group
        assert run_begin < run_end
        for first, _, begin, end, stacked_first in tables.runs[run_begin:run_end].tolist():
            assert begin < end
            assert begin % tiling.tile_keys == 0
            lines = tables.rows[stacked_first + row : stacked_first + row + taken].tolist()
            met.update((first // 1000, line, key) for line in lines for key in range(begin, end))
    wanted = {(i, line, key) for i, (keys, rows) in enumerate(sizes) for line in range(rows) for key in range(keys)}
    assert set(met) == wanted
    assert set(met.values()) == {1}
    assert tables.counts.partials <= room
    assert tables.counts.runs <= len(pieces) + tables.counts.items
    assert Counts.most(rows=40, stacked=tables.counts.stacked, partials=room).holds(tables.counts)
    if join:
        groups = len({rows for _, rows in sizes})
        fewest = sum(rows for rows in {rows for _, rows in sizes})
        assert groups <= tables.counts.items
        assert fewest <= tables.counts.partials


def test_items_are_longest_first_and_their_row_tiles_adjacent() -> None:
    tiling = Tiling(16, 64, 12, min_keys=64)
    _, begin, end, row, _ = cut_items(ints(2, 1), ints(12, 1), tiling, group=4, kv_heads=1, partials=1000)
    lengths = [int(length) for length in end - begin]
    assert lengths == sorted(lengths, reverse=True)
    assert [int(start) for start in begin[:3]] == [0, 0, 0]
    assert [int(first) for first in row[:3]] == [0, 4, 8]


def test_splits_give_way_to_the_room_for_partials() -> None:
    tiling = Tiling(16, 64, 4 * H200)
    tiles, counts = ints(512), ints(4)
    free = cut_items(tiles, counts, tiling, group=4, kv_heads=8, partials=10_000)[0]
    tight = cut_items(tiles, counts, tiling, group=4, kv_heads=8, partials=40)[0]
    assert len(tight) <= 10 < len(free)
    with pytest.raises(StepTooLargeError, match="needs 4 partials, room is for 3"):
        cut_items(tiles, counts, tiling, group=4, kv_heads=8, partials=3)


@pytest.mark.parametrize("blocks", [1, 16, 200])
def test_joined_blocks_cost_as_few_partials_as_one_long_one(blocks: int) -> None:
    """64 requests over the same 32,768 tokens: what they leave does not depend on how many blocks those are."""
    tiling = Tiling(64, 64, 4 * H200)
    pieces = [piece(32_768 // blocks, list(range(64)), first=i) for i in range(blocks)]
    tables = plan_tables(pieces, [40_000] * 64, tiling, heads=32, kv_heads=8, partials=1 << 14)
    assert tables.counts.partials <= 64 * 24


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
    tiling = Tiling(16, 64, 3 * H200)
    tiles = -(-ints(*keys) // tiling.tile_keys)
    _, begin, end, _, _ = cut_items(tiles, ints(*rows), tiling, group=4, kv_heads=8, partials=1 << 20)
    # Three programs at a time on each processor; a program costs its keys and a start of about 64 more.
    slots = [0] * (3 * H200)
    costs = [int(cost) + 64 for cost in np.repeat((end - begin) * tiling.tile_keys, 8)]
    for cost in costs:
        heapq.heappush(slots, heapq.heappop(slots) + cost)
    assert max(slots) <= 1.25 * sum(costs) / len(slots), name


def test_tables_of_a_step() -> None:
    pieces = [
        Piece(1000, 40, 40, local=True, causal=False, rows=[0, 1, 2, 2], bases=[7, 7, 0, 50]),
        Piece(5, 16, 2, local=False, causal=True, rows=[0, 1], bases=[60, 60]),
        Piece(77, 9, 9, local=True, causal=False, rows=[0, 1], bases=[47, 47]),
    ]
    plan = plan_tables(pieces, [60, 61, 99], Tiling(16, 16, 1), heads=8, kv_heads=2, partials=12)
    assert plan.counts == Counts(rows=3, stacked=8, runs=3, items=2, partials=6, turns=4)
    assert plan.rows.tolist() == [0, 1, 2, 2, 0, 1, 0, 1]
    assert plan.reaches.tolist() == [53, 54, 99, 49, 0, 1, 13, 14]
    assert plan.limits.tolist() == [40, 40, 40, 40, 1, 2, 9, 9], "a tail is causal because of where its rows are"
    assert plan.deltas[0] == 0
    assert plan.deltas[plan.turns].tolist() == [-7, -7, 0, -50, 0, 0, -47, -47], "blocks turn back, tails stay"
    assert plan.runs.tolist() == [[1000, 40, 0, 40, 0], [5, 16, 0, 2, 4], [77, 9, 0, 9, 6]]
    assert plan.items.tolist() == [[0, 1, 0, 4, 0], [1, 3, 0, 2, 4]], "what rows 0 and 1 read is one item"
    parts = [plan.members[start:end].tolist() for start, end in zip(plan.offsets, plan.offsets[1:], strict=False)]
    assert parts == [[0, 4], [1, 5], [2, 3]]


def test_padded_tables_have_no_work_and_no_members() -> None:
    plan = plan_tables([piece(3, [0], 9, bases=[4])], [20], Tiling(16, 16, 1), heads=2, kv_heads=2, partials=4)
    padded = Counts(rows=4, stacked=6, runs=5, items=3, partials=5, turns=4)
    sections = Sections.of(padded)
    table = np.full(sections.size + 3, -1, np.int32)
    plan.pack(padded, table)
    assert (table[sections.size :] == -1).all()
    items = table[sections.items : sections.items + 3 * ITEM_FIELDS].reshape(-1, ITEM_FIELDS)
    assert [int(rows) for rows in items[:, 3]] == [1, 0, 0]
    assert table[sections.runs : sections.runs + RUN_FIELDS].tolist() == [9, 3, 0, 3, 0]
    assert table[sections.offsets : sections.offsets + 5].tolist() == [0, 1, 1, 1, 1]
    assert all(start % 4 == 0 for start in (sections.rows, sections.offsets, sections.members, sections.size))
    with pytest.raises(StepTooLargeError, match="does not fit a launch"):
        plan.pack(Counts(1, 1, 1, 1, 1, 1), table)


def test_a_step_without_pieces_is_empty() -> None:
    plan = plan_tables([], [3, 4], Tiling(16, 16, 1), heads=2, kv_heads=1, partials=1)
    assert plan.counts == Counts(rows=2, stacked=0, runs=0, items=0, partials=0, turns=1)
    assert plan.offsets.tolist() == [0, 0, 0]
