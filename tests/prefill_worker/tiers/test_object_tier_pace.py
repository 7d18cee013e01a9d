"""When reading pays, and when a failing store is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.tiers.breaker import FAILURES_IN_A_ROW, Breaker
from prefill_worker.tiers.pace import Pace
from tests.support.object_parts import Clock, make_block, make_tier

TOKEN_BYTES = 1000


def paced(encode: float | None, clock: Clock) -> Pace:
    """Encoding takes `encode` seconds a token."""
    return Pace(TOKEN_BYTES, lambda tokens: None if encode is None else encode * tokens, retry_seconds=30, clock=clock)


@given(
    st.floats(0, 0.1), st.floats(1e-9, 1e-6), st.lists(st.integers(1, 10_000), min_size=10, max_size=30, unique=True)
)
def test_latency_and_rate_are_found(latency: float, slope: float, sizes: list[int]) -> None:
    pace = paced(None, Clock())
    for size in sizes:
        pace.measured(1000 * size, latency + slope * 1000 * size)
    for size in (1000, 1_000_000, 10_000_000):
        assert pace.read_seconds(size) == pytest.approx(latency + slope * size, rel=0.02, abs=1e-4)


@given(st.lists(st.tuples(st.integers(1, 1 << 30), st.floats(0, 100)), min_size=4, max_size=40))
def test_no_measurements_make_a_read_take_less_than_no_time(reads: list[tuple[int, float]]) -> None:
    pace = paced(None, Clock())
    for size, seconds in reads:
        pace.measured(size, seconds)
    small, large = pace.read_seconds(0), pace.read_seconds(1 << 32)
    assert small is not None
    assert large is not None
    assert -1e-6 <= small <= large * (1 + 1e-9) + 1e-6


def test_until_both_are_measured_reading_pays() -> None:
    clock = Clock()
    unknown = paced(None, clock)
    known = paced(1e-6, clock)
    for _ in range(3):
        known.measured(1000, 5.0)
    for _ in range(20):
        unknown.measured(1000, 5.0)
    assert unknown.pays(1)
    assert known.pays(1), "three reads are not believed"
    known.measured(1000, 5.0)
    assert not known.pays(1)
    assert known.off


def test_while_it_is_off_one_read_is_let_through_now_and_then_and_it_comes_back() -> None:
    clock = Clock()
    pace = paced(0.001, clock)
    for _ in range(10):
        pace.measured(100_000, 1.0)
    assert not pace.pays(100)
    clock.now += 29.9
    assert not pace.pays(100)
    clock.now += 0.1
    assert pace.pays(100)
    assert not pace.pays(100), "one"
    assert pace.off
    tries = 1
    while pace.off:
        pace.measured(100_000, 0.001)
        clock.now += 30
        assert pace.pays(100)
        tries += 1
    assert tries < 100
    assert pace.pays(100)
    assert pace.pays(100)


def test_large_blocks_may_pay_where_small_ones_do_not() -> None:
    clock = Clock()
    # 50 ms to begin, 1 µs a token to read, 100 µs a token to encode.
    pace = paced(1e-4, clock)
    for tokens in (100, 5000, 200, 9000, 400):
        pace.measured(tokens * TOKEN_BYTES, 0.05 + 1e-6 * tokens)
    assert not pace.pays(100)
    assert pace.pays(5000)
    clock.now += 30
    assert pace.pays(100), "its try"
    assert not pace.pays(100)


async def test_a_tier_that_is_slower_than_encoding_is_off_and_still_holds(tmp_path: Path) -> None:
    tier = make_tier(tmp_path, encode_seconds=lambda _: 0.0)
    await tier.open()
    block = make_block(1)
    assert await tier.write(block, pinned=False)
    assert tier.pays(len(block.token_ids))
    for _ in range(4):
        assert await tier.read(block.key) is not None
    assert not tier.pays(len(block.token_ids))
    assert tier.off
    assert await tier.holds(block.key)
    await tier.close()


def test_a_try_that_never_reports_back_lets_the_next_one_try_later() -> None:
    clock = Clock()
    breaker = Breaker("disk", "reading", clock)
    for _ in range(FAILURES_IN_A_ROW):
        assert breaker.allows()
        breaker.failed(OSError("gone"))
    assert breaker.resting
    assert not breaker.allows()
    clock.now += 1.0
    assert breaker.allows()
    assert not any(breaker.allows() for _ in range(10))
    clock.now += 1.0
    assert breaker.allows()
    breaker.succeeded()
    assert not breaker.resting
    assert all(breaker.allows() for _ in range(10))


def test_failures_that_do_not_count_never_rest_and_success_starts_anew() -> None:
    breaker = Breaker("disk", "writing", Clock())
    for _ in range(20):
        breaker.failed(OSError("full"), counts=False)
    assert breaker.failing
    assert not breaker.resting
    for _ in range(20):
        breaker.failed(OSError("gone"))
        breaker.failed(OSError("gone"))
        breaker.succeeded()
    assert not breaker.resting
