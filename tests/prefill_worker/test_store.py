"""The prefill worker's memory: a budget that holds, the least recently used first out, pins respected."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from prefill_worker.store import RamStore, StoredBlock
from tests.support.wire import SHAPE, make_block

TOKENS = 2
SIZE = SHAPE.extent_bytes(TOKENS)


def block(number: int, tokens: int = TOKENS) -> StoredBlock:
    return make_block(number, tokens)


def names(store: RamStore) -> list[int]:
    return [int.from_bytes(one.key, "big") for one in store.all()]


def test_the_least_recently_used_goes_first() -> None:
    store = RamStore(3 * SIZE)
    for number in (1, 2, 3):
        store.put(block(number))
    assert store.get(block(1).key) is not None
    assert store.peek(block(2).key) is not None
    store.put(block(4))
    assert names(store) == [3, 1, 4]
    assert store.used_bytes == 3 * SIZE
    assert store.get(block(2).key) is None


def test_pinned_blocks_stay_and_what_is_too_large_is_not_kept() -> None:
    store = RamStore(2 * SIZE)
    first, second = block(1), block(2)
    first.pinned = second.pinned = True
    store.put(first)
    store.put(second)
    store.put(block(3))
    assert names(store) == [1, 2]
    store.put(block(4, 5))
    assert names(store) == [1, 2]
    RamStore(0).put(block(1))


def test_the_same_key_is_kept_once() -> None:
    store = RamStore(5 * SIZE)
    kept = block(1)
    store.put(kept)
    store.put(block(1))
    assert store.peek(kept.key) is kept
    assert store.used_bytes == SIZE
    assert store.delete(kept.key) == SIZE
    assert store.delete(kept.key) == 0
    assert (store.used_bytes, len(store)) == (0, 0)


def test_hits_count_uses_alone() -> None:
    store = RamStore(SIZE)
    store.put(block(1))
    for _ in range(3):
        store.get(block(1).key)
    store.peek(block(1).key)
    assert store.all()[0].hits == 3


@given(st.lists(st.tuples(st.sampled_from("pgd"), st.integers(0, 6), st.integers(1, 4)), max_size=30))
def test_the_budget_holds_whatever_happens(steps: list[tuple[str, int, int]]) -> None:
    store = RamStore(5 * SIZE)
    for step, number, tokens in steps:
        match step:
            case "p":
                store.put(block(number, tokens))
            case "g":
                store.get(number.to_bytes(32, "big"))
            case _:
                store.delete(number.to_bytes(32, "big"))
        assert store.used_bytes == sum(one.bytes for one in store.all()) <= store.budget_bytes


@pytest.mark.parametrize("pinned", [True, False])
def test_a_new_block_gives_way_only_to_pinned_ones(*, pinned: bool) -> None:
    store = RamStore(SIZE)
    old = block(1)
    old.pinned = pinned
    store.put(old)
    store.put(block(2))
    assert names(store) == ([1] if pinned else [2])
