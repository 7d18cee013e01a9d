"""The thread behind the sockets: it runs what it is handed, survives defects, and ends."""

from __future__ import annotations

import threading
import time

import pytest
import structlog
import zmq

from shared.transfer.reactor import Reactor


def until(condition: object, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator] # a callable
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_calls_run_on_the_thread_in_order_and_soon() -> None:
    reactor = Reactor("test-calls", lambda _: 5.0)
    seen: list[tuple[int, str]] = []
    reactor.start()
    for number in range(1000):
        reactor.call(lambda number=number: seen.append((number, threading.current_thread().name)))  # type: ignore[misc] # bound now
    until(lambda: len(seen) == 1000)
    assert seen == [(number, "test-calls") for number in range(1000)]
    assert reactor.stop()


def test_calls_from_many_threads_are_all_run() -> None:
    reactor = Reactor("test-many", lambda _: 5.0)
    count = [0]

    def add() -> None:
        count[0] += 1  # on the one thread

    reactor.start()
    threads = [threading.Thread(target=lambda: [reactor.call(add) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: count[0] == 2000)
    assert reactor.stop()


def test_a_defect_is_counted_logged_and_harms_nobody_else() -> None:
    reactor = Reactor("test-defect", lambda _: 5.0)
    done = threading.Event()
    with structlog.testing.capture_logs() as logs:
        reactor._log = structlog.get_logger()
        reactor.start()
        reactor.call(lambda: 1 / 0)  # type: ignore[arg-type, return-value] # a defect
        reactor.call(done.set)
        assert done.wait(5.0)
    assert reactor.defects_total == 1
    assert [line["event"] for line in logs] == ["transfer_defect"]
    assert reactor.stop()


def test_ticks_come_when_they_were_asked_for() -> None:
    ticks: list[float] = []

    def tick(now: float) -> float:
        ticks.append(now)
        return 0.01

    reactor = Reactor("test-tick", tick)
    reactor.start()
    until(lambda: len(ticks) > 5)
    assert reactor.stop()
    ended = len(ticks)
    time.sleep(0.05)
    assert len(ticks) == ended


def test_a_busy_socket_lets_calls_and_others_have_their_turn() -> None:
    reactor = Reactor("test-turns", lambda _: 5.0)
    receivers = [reactor.context.socket(zmq.PULL) for _ in range(2)]
    senders = [reactor.context.socket(zmq.PUSH) for _ in range(2)]
    got = [0, 0]
    for index in range(2):
        receivers[index].setsockopt(zmq.RCVHWM, 0)
        senders[index].setsockopt(zmq.SNDHWM, 0)
        receivers[index].bind(f"inproc://{index}")
        senders[index].connect(f"inproc://{index}")

    def reader(index: int) -> bool:
        try:
            receivers[index].recv(zmq.NOBLOCK)
        except zmq.Again:
            return False
        got[index] += 1
        return True

    for _ in range(5000):
        senders[0].send(b"x")
    senders[1].send(b"y")
    for index in range(2):
        reactor.register(receivers[index], lambda index=index: reader(index))  # type: ignore[misc] # bound now
    called = [-1]
    reactor.call(lambda: called.__setitem__(0, got[0]))
    reactor.start()
    until(lambda: got[1] == 1)
    until(lambda: got[0] == 5000)
    assert called[0] == 0
    for sender in senders:
        sender.close(0)
    assert reactor.stop()


def test_stop_before_start_and_a_stuck_thread_are_told() -> None:
    assert Reactor("test-unstarted", lambda _: 5.0).stop()
    stuck, go = Reactor("test-stuck", lambda _: 5.0), threading.Event()
    stuck.start()
    stuck.call(lambda: [None, go.wait(10.0)][0])
    with structlog.testing.capture_logs() as logs:
        stuck._log = structlog.get_logger()
        assert not stuck.stop(0.05)
    assert [line["event"] for line in logs] == ["thread_stuck"]
    go.set()
    assert stuck.stop()


@pytest.mark.parametrize("wait", [float("nan"), -1.0, 1e9])
def test_an_odd_wait_does_not_stop_the_thread(wait: float) -> None:
    done = threading.Event()
    reactor = Reactor("test-odd", lambda _: wait if wait == wait else 0.0)  # noqa: PLR0124 - nan
    reactor.start()
    reactor.call(done.set)
    assert done.wait(5.0)
    assert reactor.stop()
