"""Routing as pure functions: every gateway decides alike, loads stay bounded, few keys move."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import given

from gateway.routing import LOAD_FACTOR, decode_choice, prefill_order, rendezvous_order

WORKERS = [f"prefill-{number}" for number in range(5)]
KEYS = [bytes([number, number // 7]) * 16 for number in range(250)]


def test_the_order_is_fixed_for_ever() -> None:
    # Another release that ordered otherwise would encode every block again.
    assert rendezvous_order(b"k" * 32, WORKERS) == ["prefill-4", "prefill-3", "prefill-1", "prefill-0", "prefill-2"]


@given(st.permutations(WORKERS))
def test_the_order_does_not_depend_on_how_workers_are_listed(listed: list[str]) -> None:
    assert rendezvous_order(KEYS[3], listed) == rendezvous_order(KEYS[3], WORKERS)


def test_keys_spread_evenly_and_only_the_leavers_keys_move() -> None:
    first = {key: rendezvous_order(key, WORKERS)[0] for key in KEYS}
    counts = Counter(first.values())
    assert set(counts) == set(WORKERS)
    assert max(counts.values()) < 2 * len(KEYS) / len(WORKERS)
    left = WORKERS[1:]
    for key, worker in first.items():
        now = rendezvous_order(key, left)
        assert now[0] == worker or worker == WORKERS[0]
        assert now == [name for name in rendezvous_order(key, WORKERS) if name != WORKERS[0]]


@given(st.dictionaries(st.sampled_from(WORKERS), st.integers(0, 50), min_size=1), st.sampled_from(KEYS))
def test_the_bounded_order_names_everyone_once_and_puts_the_overloaded_last(loads: dict[str, int], key: bytes) -> None:
    order = prefill_order(key, loads)
    assert sorted(order) == sorted(loads)
    bound = LOAD_FACTOR * (sum(loads.values()) + 1) / len(loads)
    assert loads[order[0]] <= bound
    if max(loads.values()) < bound:
        assert order == rendezvous_order(key, list(loads))


def test_a_burst_on_one_key_spreads_within_the_bound() -> None:
    loads = dict.fromkeys(WORKERS, 0)
    for _ in range(100):
        loads[prefill_order(KEYS[0], loads)[0]] += 1
    assert max(loads.values()) <= LOAD_FACTOR * 101 / len(WORKERS) + 1


def test_residency_against_load() -> None:
    assert decode_choice({"a": 0, "b": 0}, {"b": 10}, 100) == "b"
    assert decode_choice({"a": 0, "b": 1}, {"b": 90}, 100) == "a"
    assert decode_choice({"a": 1, "b": 2}, {"a": 0, "b": 100}, 100) == "a"
    assert decode_choice({"b": 0, "a": 0}, {}, 0) == "a"
