"""Books of a pair: bandwidth counts busy time alone, and a snapshot keeps what it saw."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drystone.v1.operations_pb2 import PairDirection, PairState
from shared.transfer.pair_stats import Bandwidth, PairStats

MIB = 1 << 20


def stats() -> PairStats:
    return PairStats("decode-1", "tcp://h:1", PairDirection.PAIR_DIRECTION_SEND, "zmq-tcp", curve=True)


def test_nothing_measured_is_no_bandwidth():
    assert Bandwidth().bytes_per_second == 0.0


def test_overlapping_chunks_share_the_time_of_the_wire():
    bandwidth = Bandwidth()
    shares = [bandwidth.answered(MIB, 0.0, now) for now in (0.1, 0.2, 0.3)]
    assert shares == pytest.approx([0.1, 0.1, 0.1])
    assert bandwidth.bytes_per_second == pytest.approx(10 * MIB, rel=0.01)


def test_idle_time_between_chunks_is_not_busy():
    bandwidth = Bandwidth()
    bandwidth.answered(MIB, 0.0, 0.1)
    assert bandwidth.answered(MIB, 1000.0, 1000.1) == pytest.approx(0.1)
    assert bandwidth.bytes_per_second == pytest.approx(10 * MIB, rel=0.01)


def test_a_stalled_wire_is_busy_and_slow():
    bandwidth = Bandwidth()
    bandwidth.answered(MIB, 0.0, 0.1)
    bandwidth.answered(MIB, 0.0, 10.0)
    assert bandwidth.bytes_per_second < MIB


def test_what_is_recent_outweighs_what_was():
    bandwidth = Bandwidth()
    for second in range(20):
        bandwidth.answered(MIB, second, second + 1)
    for second in range(20, 60):
        bandwidth.answered(4 * MIB, second, second + 1)
    assert bandwidth.bytes_per_second == pytest.approx(4 * MIB, rel=0.05)


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 5)), min_size=1, max_size=30))
def test_shares_never_sum_to_more_than_the_time_that_passed(chunks: list[tuple[float, float]]):
    """Whatever the order in which chunks were sent and answered."""
    answers = sorted((sent + took, sent) for sent, took in chunks)
    bandwidth = Bandwidth()
    shares = [bandwidth.answered(1, sent, now) for now, sent in answers]
    assert min(shares) >= 0.0
    assert sum(shares) <= answers[-1][0] - min(sent for _, sent in answers) + 1e-6


def test_a_snapshot_is_what_was_and_not_what_is():
    books = stats()
    books.state = PairState.PAIR_STATE_OPEN
    books.bytes_total, books.chunks_total, books.resent_total = 3 * MIB, 3, 1
    books.outstanding_bytes, books.credit_free_bytes = -1, 15 * MIB
    books.last_error = "x" * 1000
    books.bandwidth.answered(MIB, 0.0, 0.5)
    told = books.snapshot()
    books.bytes_total = 0
    assert (told.peer, told.address, told.transport, told.curve) == ("decode-1", "tcp://h:1", "zmq-tcp", True)
    assert (told.direction, told.state) == (PairDirection.PAIR_DIRECTION_SEND, PairState.PAIR_STATE_OPEN)
    assert (told.bytes_total, told.chunks_total, told.resent_total) == (3 * MIB, 3, 1)
    assert (told.outstanding_bytes, told.credit_free_bytes) == (0, 15 * MIB)
    assert told.bandwidth_bytes_per_second == pytest.approx(2 * MIB)
    assert len(told.last_error) == 200
    assert told.age_seconds >= 0.0
