"""The engine's books under any order of arrivals, blocks, steps, cancels, deadlines and failures, without a model.

What a step would compute is played: each row's KV is its token, so that tails that are shared, copied, sealed or
moved can be read back and compared with what their samples have said.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from decode_worker.engine import Engine
from decode_worker.eviction import LeastFrequentlyUsed, LeastRecentlyUsed
from decode_worker.pool import Pool
from decode_worker.request import Fetch, Phase, Request
from decode_worker.sampling import Choice
from decode_worker.scheduler import StepBudget, StepEntry, compose
from decode_worker.step import StepPlan
from decode_worker.tail import SEGMENT_TOKENS, Tail
from drystone.v1.generation_pb2 import Priority
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import KvEndpoint
from tests.support.decode_parts import (
    IDENTITY,
    SHAPE,
    Sink,
    assert_all_free_after_eviction,
    assert_idle,
    block,
    make_arena,
    make_request,
)

SIZES = (1, 3, 9, 40, 90, 150)
MAX_SAMPLES = 5
BUDGET = StepBudget(tokens=48, mixed_tokens=20)
STOP = 5
KEEP_SHARE = 0.6


class Alarm:
    """A deadline that the machine lets pass when it likes."""

    def __init__(self, _: float, callback: Callable[[Request], None], request: Request) -> None:
        self.ring: Callable[[], None] | None = lambda: callback(request)

    def cancel(self) -> None:
        self.ring = None


class Play:
    """Plays gateway, prefill workers, clock and engine thread."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.sinks: dict[Request, Sink] = {}
        self.alarms: dict[Request, Alarm] = {}
        self.encoding: list[Fetch] = []
        self.stepping: list[StepEntry] = []
        tokens = draw.choice([5 * SEGMENT_TOKENS, 9 * SEGMENT_TOKENS + 7, 16 * SEGMENT_TOKENS])
        policy = draw.choice([LeastRecentlyUsed, LeastFrequentlyUsed])
        self.pool = Pool(make_arena(tokens), IDENTITY, policy())
        model: Any = None  # nothing here runs one
        self.engine = Engine(
            model,
            self.pool,
            model,
            endpoint=KvEndpoint(),
            max_waiting=4,
            max_samples=MAX_SAMPLES,
            budget=BUDGET,
        )
        self.life = self.engine.lifecycle
        self.life._call_later = self.alarm

    def alarm(self, seconds: float, callback: Callable[[Request], None], request: Request) -> Alarm:
        made = self.alarms[request] = Alarm(seconds, callback, request)
        return made

    def anything(self) -> None:
        """One thing that can happen now, with the weight that it has in life; then the books are checked."""
        idle = not self.engine._thread_busy
        things: list[tuple[int, bool, Callable[[], None]]] = [
            (6, len(self.unfinished()) < 7, self.arrive),
            (6, bool(self.arriving()), self.block_arrives),
            (1, bool(self.arriving()), self.block_is_given_up),
            (1, bool(self.arriving()) and idle, self.begin_to_encode_here),
            (4, bool(self.encoding), self.end_to_encode_here),
            (12, idle, self.begin_step),
            (12, bool(self.stepping), self.end_step),
            (1, bool(self.stepping), self.step_fails),
            (1, bool(self.unfinished()), self.cancel),
            (1, bool(self.unfinished()), self.deadline),
            (1, len(self.pool.blocks) > 0, self.evict),
        ]
        able = [(weight, play) for weight, may, play in things if may]
        [play] = self.draw.choices([play for _, play in able], [weight for weight, _ in able])
        play()
        self.books_balance()
        self.everyone_hears_one_last_word()
        self.tails_hold_what_was_read()

    def arrive(self) -> None:
        sink, draw = Sink(), self.draw
        new, n = draw.randint(1, SEGMENT_TOKENS + 5), draw.choice([1, 1, 2, 3])
        # Questions of a few lengths, all of one text: one is often the beginning of another.
        question = draw.choice([1, 5, 40, SEGMENT_TOKENS, SEGMENT_TOKENS + 9, 2 * SEGMENT_TOKENS + 3])
        past = draw.choice([0, 0, 1, 3])
        request = make_request(
            [block(name, SIZES[name]) for name in draw.choices(range(len(SIZES)), k=draw.randint(0, 2))],
            question=[*range(10, 10 + question - 1), draw.choice([7, 8, 99])],
            sink=sink,
            stop_ids=frozenset({STOP}),
            n=n,
            priority=draw.choice([Priority.PRIORITY_LOW, Priority.PRIORITY_NORMAL, Priority.PRIORITY_HIGH]),
            keep_tail=draw.random() < KEEP_SHARE,
            max_new_tokens=new,
            resumed={n - 1: [7] * past} if 0 < past < new else None,
        )
        try:
            self.engine.submit(request)
        except DrystoneError as error:
            assert error.reason in (Reason.TOO_MANY_REQUESTS, Reason.REQUEST_TOO_LARGE_FOR_POOL)  # noqa: PT017
            assert request not in self.life.holding
            assert list(sink) == []
            return
        self.sinks[request] = sink

    def block_arrives(self) -> None:
        fetch = self.draw.choice(self.arriving())
        self.pool.arena.view(fetch.extent).fill_(1000 + fetch.key[0])
        self.engine.committed(fetch, shipped_bytes=1)

    def block_is_given_up(self) -> None:
        fetch = self.draw.choice(self.arriving())
        reservation = self.pool.fetches.reservation(fetch)
        self.engine.fetch_failed(fetch.waiters[0], [reservation], DrystoneError(Reason.BLOCK_UNAVAILABLE, "given up"))

    def begin_to_encode_here(self) -> None:
        fetch = self.draw.choice(self.arriving())
        fetch.restart()
        assert fetch.landing.seize()
        self.engine._thread_busy = True
        self.encoding.append(fetch)

    def end_to_encode_here(self) -> None:
        fetch = self.encoding.pop()
        fetch.landing.release()
        self.engine._thread_busy = False
        self.pool.arena.view(fetch.extent).fill_(1000 + fetch.key[0])
        if fetch.waiters:
            self.engine.committed(fetch, encode_ms=1.0)
        else:
            self.pool.give_up(fetch)

    def begin_step(self) -> None:
        self.engine._admit()
        self.life.seat(MAX_SAMPLES)
        entries = compose(self.life.running, BUDGET)
        if not entries:
            return
        assert sum(len(entry.span.token_ids) for entry in entries) <= BUDGET.tokens
        decoding = [
            sample
            for request in self.life.running
            if request.phase is Phase.DECODE
            for sample in request.live
            if len(sample.unread) == 1
        ]
        assert {id(sample) for sample in decoding} <= {id(entry.sample) for entry in entries}
        self.stepping = entries
        self.engine._thread_busy = True
        self.life.begin_step([entry.request for entry in entries])

    def end_step(self) -> None:
        self.play_step(lambda: self.draw.choice([STOP, 7, 7, 8, 8, 9, 9]))

    def step_fails(self) -> None:
        entries, self.stepping = self.stepping, []
        self.engine._thread_busy = False
        for entry in entries:
            self.life.fail(entry.request, DrystoneError(Reason.INTERNAL, "broken"))
        self.life.end_step()

    def cancel(self) -> None:
        request = self.draw.choice(self.unfinished())
        self.engine.cancel(request)
        assert request.finished
        del self.sinks[request]

    def deadline(self) -> None:
        request = self.draw.choice(self.unfinished())
        ring = self.alarms[request].ring
        assert ring is not None
        ring()
        assert request.finished or request in self.life.in_step

    def evict(self) -> None:
        self.pool.blocks.evict_one()

    def books_balance(self) -> None:
        self.pool.check_integrity(self.life.holding)
        assert self.life.samples <= MAX_SAMPLES
        assert set(self.life._timers) == set(self.unfinished())
        if not self.life.holding and not self.encoding:
            assert_idle(self.pool)

    def everyone_hears_one_last_word(self) -> None:
        for request, sink in self.sinks.items():
            last = [kind for kind in sink.kinds() if kind in ("ended", "failed")]
            assert len(last) == request.finished
            assert not last or sink.kinds()[-1] == last[0]

    def tails_hold_what_was_read(self) -> None:
        for request in self.life.running:
            for placement in request.placements:
                assert bool((self.pool.arena.view(placement.extent) == 1000 + placement.key[0]).all())
            for sample in request.live:
                if sample.tail is not None:
                    said = [*request.question_ids, *sample.generated][: sample.tail.filled]
                    assert self.read(sample.tail) == said

    def read(self, tail: Tail) -> list[int]:
        views = [self.pool.arena.view(extent)[:, :, 0, 0, 0] for extent in tail.extents]
        tokens = torch.cat(views, dim=1)[:, : tail.filled] if views else torch.zeros(SHAPE.layers, 0)
        assert bool((tokens == tokens[0]).all())
        return [int(token) for token in tokens[0]]

    def play_step(self, draw: Callable[[], int]) -> None:
        entries, self.stepping = self.stepping, []
        plan = StepPlan([entry.span for entry in entries])
        for layer in range(SHAPE.layers):
            rows = plan.slots + layer * SEGMENT_TOKENS
            self.pool.arena.records[rows] = plan.token_ids.to(torch.float32)[:, None]
        outcomes: Sequence[Any] = [[Choice(draw(), None) for _ in entry.draws] for entry in entries]
        self.engine._thread_busy = False
        self.life.end_step()
        self.engine.answering.take(entries, outcomes)

    def arriving(self) -> list[Fetch]:
        return [fetch for fetch in self.pool.fetches.all() if fetch not in self.encoding]

    def unfinished(self) -> list[Request]:
        return [*self.life.waiting, *self.life.running]

    def end(self) -> None:
        """Whoever is still there ends within a bounded number of steps: nobody starves, nothing stays behind."""
        if self.stepping:
            self.play_step(lambda: 8)
        while self.encoding:
            self.end_to_encode_here()
        rows = sum(request.tail_tokens + len(request.samples) * request.tail_tokens for request in self.unfinished())
        for _ in range(rows + 1):
            for fetch in self.arriving():
                self.pool.arena.view(fetch.extent).fill_(1000 + fetch.key[0])
                self.engine.committed(fetch, shipped_bytes=1)
            self.engine._admit()
            self.begin_step()
            if self.stepping:
                self.play_step(lambda: 8)
            self.books_balance()
        assert self.unfinished() == []
        self.everyone_hears_one_last_word()
        assert_all_free_after_eviction(self.pool)


@pytest.mark.parametrize("seed", range(12))
def test_books_balance_over_a_long_life(seed: int) -> None:
    play = Play(random.Random(seed))
    for _ in range(400):
        play.anything()
    play.end()


@given(draw=st.randoms(use_true_random=False), things=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_books_balance_whatever_happens(draw: random.Random, things: int) -> None:
    play = Play(draw)
    for _ in range(things):
        play.anything()
    play.end()
