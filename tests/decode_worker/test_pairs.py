"""Books of senders: windows shared among many, limits that only rise, greetings told twice."""

from __future__ import annotations

from decode_worker.receiving.pairs import LEAST_WINDOW_BYTES, MAX_PAIRS, PAIR_WINDOW_BYTES, Pair, Pairs
from shared.internal.v1.common_pb2 import WorkerIdentity

SENDER = WorkerIdentity(worker_id="prefill-0", incarnation=1)


def welcome(pairs: Pairs, peer: bytes = b"a", session: int = 1) -> Pair:
    return pairs.welcome(peer, session, SENDER, "zmq-tcp", curve=False)


def test_a_pair_may_go_a_window_beyond_what_was_seen() -> None:
    pairs = Pairs(1 << 30)
    pair = welcome(pairs)
    assert pair.credit_limit == PAIR_WINDOW_BYTES
    assert pair.saw(PAIR_WINDOW_BYTES)
    assert pairs.granted(pair) == 2 * PAIR_WINDOW_BYTES
    assert not pair.saw(2 * PAIR_WINDOW_BYTES + 1)
    assert pair.seen_bytes == PAIR_WINDOW_BYTES
    assert pair.saw(5), "late is not wrong"
    assert pair.seen_bytes == PAIR_WINDOW_BYTES


def test_many_pairs_share_the_budget_and_what_was_granted_stays() -> None:
    pairs = Pairs(4 * PAIR_WINDOW_BYTES)
    first = welcome(pairs, b"0")
    for number in range(1, 8):
        welcome(pairs, b"%d" % number)
    assert pairs.window_bytes == PAIR_WINDOW_BYTES // 2
    assert pairs.granted(first) == PAIR_WINDOW_BYTES
    for number in range(1000):
        welcome(pairs, b"many %d" % number)
    assert pairs.window_bytes == LEAST_WINDOW_BYTES


def test_a_greeting_told_twice_keeps_the_books_and_a_new_session_begins_new_ones() -> None:
    pairs = Pairs(1 << 30)
    pair = welcome(pairs)
    pair.saw(1000)
    assert welcome(pairs) is pair
    assert pair.seen_bytes == 1000
    again = welcome(pairs, session=2)
    assert again is not pair
    assert (again.seen_bytes, again.credit_limit) == (0, PAIR_WINDOW_BYTES)


def test_a_crowd_is_bounded_and_the_silent_go_first() -> None:
    pairs = Pairs(1 << 30)
    for number in range(MAX_PAIRS):
        welcome(pairs, b"%d" % number)
    assert pairs.heard(b"0") is not None
    welcome(pairs, b"one more")
    assert len(pairs) == MAX_PAIRS
    assert pairs.heard(b"0") is not None
    assert pairs.heard(b"1") is None
    pairs.forget_silent(-1.0)
    assert len(pairs) == 0
    pairs.forget(b"nobody")


def test_status_says_who_and_how_much() -> None:
    pairs = Pairs(1 << 30)
    pair = welcome(pairs)
    pair.saw(1 << 20)
    [status] = pairs.statuses()
    assert (status.peer, status.transport, status.curve) == ("prefill-0", "zmq-tcp", False)
    assert status.credit_free_bytes == PAIR_WINDOW_BYTES - (1 << 20)
