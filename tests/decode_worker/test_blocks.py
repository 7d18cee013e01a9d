"""Resident blocks: pins, eviction order, blocks that go with their last user, drops while in use."""

from __future__ import annotations

import pytest

from decode_worker.arena import Arena
from decode_worker.blocks import Block, BlockTable
from decode_worker.eviction import LeastFrequentlyUsed, LeastRecentlyUsed
from tests.support.decode_parts import SHAPE, make_arena

TOKENS = 2


@pytest.fixture
def arena() -> Arena:
    return make_arena(20)


@pytest.fixture
def table(arena: Arena) -> BlockTable:
    return BlockTable(arena, LeastRecentlyUsed())


def add(table: BlockTable, arena: Arena, name: str, *, store: bool = True) -> Block:
    extent = arena.allocate(TOKENS)
    assert extent is not None
    return table.add(name.encode(), extent, store=store)


def names(table: BlockTable) -> str:
    return "".join(block.key.decode() for block in table.all())


def test_a_pin_counts_and_closes_once(arena: Arena, table: BlockTable) -> None:
    block = add(table, arena, "a")
    first, second = table.pin(b"a"), table.pin(b"a")
    assert first is not None
    assert second is not None
    assert (block.pins, block.hits, table.pins) == (2, 0, 2)
    first.close()
    first.close()
    assert block.pins == 1
    second.close()
    assert block.pins == 0
    assert b"a" in table
    assert table.pin(b"b") is None


def test_the_least_recently_used_goes_first(arena: Arena, table: BlockTable) -> None:
    for name in "abc":
        add(table, arena, name)
    pin = table.pin(b"a")
    assert pin is not None
    pin.close()
    assert table.evict_one()
    assert names(table) == "ac"
    assert table.evict_one()
    assert names(table) == "a"
    assert table.evictions == 2


def test_used_and_held_blocks_stay(arena: Arena, table: BlockTable) -> None:
    used, held = add(table, arena, "u"), add(table, arena, "h")
    pin = table.pin(b"u")
    table.hold(held, held=True)
    assert not table.evict_one()
    assert table.evictable_records() == 0
    assert table.pinned_records == used.extent.records
    assert pin is not None
    pin.close()
    assert table.evict_one()
    assert names(table) == "h"


def test_a_transient_block_goes_with_its_last_user(arena: Arena, table: BlockTable) -> None:
    add(table, arena, "t", store=False)
    first, second = table.pin(b"t"), table.pin(b"t")
    assert first is not None
    assert second is not None
    first.close()
    assert b"t" in table
    second.close()
    assert b"t" not in table
    assert arena.free_records == arena.capacity_records


def test_a_transient_block_that_is_held_stays(arena: Arena, table: BlockTable) -> None:
    block = add(table, arena, "t", store=False)
    pin = table.pin(b"t")
    table.hold(block, held=True)
    assert pin is not None
    pin.close()
    assert b"t" in table


def test_drop(arena: Arena, table: BlockTable) -> None:
    add(table, arena, "a")
    assert table.drop(b"a") == SHAPE.extent_bytes(TOKENS)
    assert table.drop(b"a") is None
    assert arena.free_records == arena.capacity_records


@pytest.mark.parametrize("store", [True, False])
def test_drop_while_in_use(arena: Arena, table: BlockTable, *, store: bool) -> None:
    dropped = add(table, arena, "a", store=store)
    pin = table.pin(b"a")
    assert pin is not None
    assert table.drop(b"a") == 0
    assert b"a" not in table
    assert table.pin(b"a") is None
    assert table.pins == 1
    arena.check_integrity(table.extents())
    # The same key may come again while the old block still has its user.
    again = add(table, arena, "a")
    assert again.extent != dropped.extent
    pin.close()
    assert table.extents() == [again.extent]
    arena.check_integrity(table.extents())
    assert not table.pins


def test_the_least_frequently_used_goes_first_and_old_fame_fades(arena: Arena) -> None:
    table = BlockTable(arena, LeastFrequentlyUsed())
    for name, uses in (("a", 3), ("b", 1), ("c", 2)):
        add(table, arena, name)
        for _ in range(uses):
            pin = table.pin(name.encode())
            assert pin is not None
            table.used(pin.block)
            pin.close()
    assert table.evict_one()
    assert names(table) == "ac"
    assert table.evict_one()
    assert names(table) == "a"
    # What comes now stands on the age of what has gone, so that "a" with its old uses does not stay for ever.
    for name in "de":
        add(table, arena, name)
        for _ in range(2):
            pin = table.pin(name.encode())
            assert pin is not None
            table.used(pin.block)
            pin.close()
    assert table.evict_one()
    assert names(table) == "de"


def test_a_hold_keeps_and_lets_go(arena: Arena, table: BlockTable) -> None:
    block = add(table, arena, "a")
    table.hold(block, held=True)
    table.check_integrity()
    assert not table.evict_one()
    table.hold(block, held=False)
    table.check_integrity()
    assert table.evictable_records() == block.extent.records
    assert table.drop(b"a") == SHAPE.extent_bytes(TOKENS)
    table.check_integrity()
    held = add(table, arena, "h")
    table.hold(held, held=True)
    assert table.drop(b"h") == SHAPE.extent_bytes(TOKENS)
    assert arena.free_records == arena.capacity_records


def test_the_heap_of_the_resting_does_not_grow_with_uses(arena: Arena, table: BlockTable) -> None:
    add(table, arena, "a")
    for _ in range(1000):
        pin = table.pin(b"a")
        assert pin is not None
        pin.close()
    assert len(table._resting) < 100
    table.check_integrity()
