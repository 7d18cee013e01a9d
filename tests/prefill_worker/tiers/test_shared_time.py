"""Reads at once share the time that they take together."""

from __future__ import annotations

import pytest

from prefill_worker.tiers.shared_time import SharedTime


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_one_alone_has_all_of_it() -> None:
    clock = Clock()
    shared = SharedTime(clock)
    clock.now += 5.0  # nothing is under way
    begun = shared.begin()
    clock.now += 2.0
    assert shared.end(begun) == pytest.approx(2.0)


def test_many_at_once_have_a_part_each() -> None:
    clock = Clock()
    shared = SharedTime(clock)
    begun = [shared.begin() for _ in range(24)]
    clock.now += 0.024
    assert [shared.end(one) for one in begun] == pytest.approx([0.001] * 24)


def test_who_comes_later_shares_from_then_on() -> None:
    clock = Clock()
    shared = SharedTime(clock)
    first = shared.begin()
    clock.now += 1.0
    second = shared.begin()
    clock.now += 1.0
    assert shared.end(first) == pytest.approx(1.5)
    clock.now += 1.0
    assert shared.end(second) == pytest.approx(1.5)
