"""The queue under any order of arrivals, joins, leaves and takes, beside a naive one; nobody starves."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prefill_worker.batch_queue import PATIENCE_SECONDS, BatchQueue, Entry, Urgency
from shared.errors import DrystoneError, Reason

MAX_BLOCKS, MAX_TOKENS = 7, 60
HASTE = min(PATIENCE_SECONDS.values())
URGENCIES = st.sampled_from(Urgency)


class QueueMachine(RuleBasedStateMachine):
    """The naive queue is a list in order of arrival, sorted anew whenever it is asked.

    Attributes:
        allowance: For each entry that no later arrival can overtake any more, the takes within which it must go.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.queue: BatchQueue[Entry] = BatchQueue(
            MAX_BLOCKS, MAX_TOKENS, seconds=lambda tokens: tokens / 10, clock=lambda: self.now
        )
        self.naive: list[Entry] = []
        self.arrivals: dict[int, float] = {}
        self.classes: dict[int, Urgency] = {}
        self.allowance: dict[int, int] = {}

    def due(self, entry: Entry) -> float:
        return self.arrivals[id(entry)] + PATIENCE_SECONDS[self.classes[id(entry)]]

    def in_order(self) -> list[Entry]:
        return sorted(self.naive, key=self.due)  # stable: equal dues in order of arrival

    def has_room(self, tokens: int, urgency: Urgency) -> bool:
        warming = [entry for entry in self.naive if self.classes[id(entry)] is Urgency.WARMING]
        if urgency is Urgency.WARMING and (
            len(warming) >= MAX_BLOCKS // 2
            or (warming and sum(entry.tokens for entry in warming) + tokens > MAX_TOKENS // 2)
        ):
            return False
        fits = not self.naive or sum(entry.tokens for entry in self.naive) + tokens <= MAX_TOKENS
        return len(self.naive) < MAX_BLOCKS and fits

    @rule(tokens=st.integers(1, 40), urgency=URGENCIES)
    def arrive(self, tokens: int, urgency: Urgency) -> None:
        entry = Entry(tokens=tokens, urgency=urgency)
        if not self.has_room(tokens, urgency):
            with pytest.raises(DrystoneError) as caught:
                self.queue.add(entry)
            assert caught.value.reason is Reason.ENCODE_QUEUE_FULL
            assert caught.value.retry_after_ms == 100 * sum(one.tokens for one in self.naive)
            assert entry.rank is None
            return
        self.queue.add(entry)
        self.naive.append(entry)
        self.arrivals[id(entry)], self.classes[id(entry)] = self.now, urgency

    @precondition(lambda self: self.naive)
    @rule(data=st.data(), urgency=URGENCIES)
    def join(self, data: st.DataObject, urgency: Urgency) -> None:
        entry = data.draw(st.sampled_from(self.naive))
        self.queue.raise_to(entry, urgency)
        self.classes[id(entry)] = min(self.classes[id(entry)], urgency)

    @precondition(lambda self: self.naive)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.naive))
        self.queue.remove(entry)
        self.gone(entry)

    @rule(seconds=st.sampled_from([0.0, 0.25, 1.0, 6.0, 31.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(budget=st.integers(0, 60))
    def take(self, budget: int) -> None:
        for entry in self.naive:
            if self.now > self.due(entry) - HASTE:
                self.allowance.setdefault(id(entry), len(self.naive))
        expected: list[Entry] = []
        for entry in self.in_order():
            if not expected or sum(one.tokens for one in expected) + entry.tokens <= budget:
                expected.append(entry)
        assert self.queue.take(budget) == expected
        for entry in expected:
            self.gone(entry)
        for entry in self.naive:
            if id(entry) in self.allowance:
                self.allowance[id(entry)] -= 1
                assert self.allowance[id(entry)] > 0, "it starves"

    def gone(self, entry: Entry) -> None:
        assert entry.rank is None
        self.naive.remove(entry)
        for book in (self.arrivals, self.classes, self.allowance):
            book.pop(id(entry), None)

    @invariant()
    def books_are_exact(self) -> None:
        assert list(self.queue) == self.in_order()
        assert len(self.queue) == len(self.naive)
        assert self.queue.head is next(iter(self.in_order()), None)
        assert self.queue.tokens == sum(entry.tokens for entry in self.naive)
        depths = dict.fromkeys(Urgency, 0)
        for entry in self.naive:
            depths[self.classes[id(entry)]] += 1
            assert entry.urgency is self.classes[id(entry)]
            assert entry.rank is not None
        assert self.queue.depths() == depths


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=100, stateful_step_count=40)
