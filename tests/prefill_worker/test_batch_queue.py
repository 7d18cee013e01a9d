"""The queue's order, bounds and refusals, by example."""

from __future__ import annotations

import pytest

from prefill_worker.batch_queue import BatchQueue, Entry, Urgency
from prefill_worker.encode_rate import EncodeRate
from shared.errors import DrystoneError, Reason

HIGH, NORMAL, LOW, WARMING = Urgency


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_queue(
    clock: Clock | None = None, max_blocks: int = 100, max_tokens: int = 10_000, seconds: float | None = None
) -> BatchQueue[Entry]:
    return BatchQueue(max_blocks, max_tokens, seconds=lambda _: seconds, clock=clock or Clock())


def added(queue: BatchQueue[Entry], urgency: Urgency = NORMAL, tokens: int = 10) -> Entry:
    entry = Entry(tokens=tokens, urgency=urgency)
    queue.add(entry)
    return entry


def test_the_more_urgent_goes_first_and_equals_in_order_of_arrival() -> None:
    queue = make_queue()
    order = [added(queue, urgency) for urgency in (WARMING, LOW, NORMAL, NORMAL, HIGH, WARMING)]
    assert queue.head is order[4]
    taken = [queue.take(0) for _ in order]
    assert taken == [[order[index]] for index in (4, 2, 3, 1, 0, 5)]
    assert queue.take(100) == []
    assert queue.head is None


def test_warming_ends_however_much_interactive_work_arrives() -> None:
    clock = Clock()
    queue = make_queue(clock)
    warming = added(queue, WARMING)
    added(queue, HIGH)
    while warming.rank is not None:
        clock.now += 0.5
        added(queue, HIGH)
        queue.take(0)
    # 30 s of patience, one second of the others' haste, and the backlog of one.
    assert clock.now == pytest.approx(131.5)
    assert queue.head is not None


def test_interactive_work_passes_warming_that_came_a_little_earlier() -> None:
    clock = Clock()
    queue = make_queue(clock)
    warming = added(queue, WARMING)
    clock.now += 29.0
    low, normal = added(queue, LOW), added(queue, NORMAL)
    assert list(queue) == [normal, warming, low]


def test_a_patience_of_ones_own() -> None:
    queue: BatchQueue[Entry] = BatchQueue(9, 99, seconds=lambda _: None, patience={WARMING: -2.0}, clock=Clock())
    high, warming = added(queue, HIGH), added(queue, WARMING)
    assert list(queue) == [warming, high]


def test_raising_keeps_the_arrival_and_never_lowers() -> None:
    clock = Clock()
    queue = make_queue(clock)
    raised = added(queue, WARMING, tokens=7)
    clock.now += 0.5
    normal = added(queue, NORMAL)
    queue.raise_to(raised, NORMAL)
    assert list(queue) == [raised, normal], "it came first"
    queue.raise_to(raised, LOW)
    assert raised.urgency is NORMAL
    assert queue.depths() == {HIGH: 0, NORMAL: 2, LOW: 0, WARMING: 0}
    assert queue.tokens == 17


def test_raised_to_the_class_of_one_that_came_later_it_goes_before_it() -> None:
    queue = make_queue()
    raised, other = added(queue, LOW), added(queue, HIGH)
    queue.raise_to(raised, HIGH)
    assert list(queue) == [raised, other]


def test_raising_what_is_not_queued_changes_its_class_alone() -> None:
    queue = make_queue()
    entry = added(queue, WARMING)
    queue.take(0)
    queue.raise_to(entry, HIGH)
    assert (entry.urgency, entry.rank, len(queue)) == (HIGH, None, 0)


def test_a_batch_fills_its_budget_in_order_and_passes_over_what_does_not_fit() -> None:
    queue = make_queue()
    first, long, small, exact, last = (added(queue, tokens=tokens) for tokens in (40, 70, 30, 30, 1))
    assert queue.take(100) == [first, small, exact]
    assert list(queue) == [long, last]
    assert queue.take(100) == [long, last], "passed over once, now the head"


def test_a_block_longer_than_the_budget_is_taken_alone() -> None:
    queue = make_queue()
    long, short = added(queue, tokens=500), added(queue, tokens=1)
    assert queue.take(100) == [long]
    assert queue.take(100) == [short]


def test_what_leaves_is_gone_at_once_and_twice_is_harmless() -> None:
    queue = make_queue(max_blocks=2)
    first, second = added(queue, tokens=3), added(queue, WARMING, tokens=5)
    queue.remove(first)
    queue.remove(first)
    assert (list(queue), queue.tokens, queue.depths()[NORMAL]) == ([second], 5, 0)
    added(queue)


@pytest.mark.parametrize(("seconds", "delay_ms"), [(None, 1000), (0.0001, 100), (2.5, 2500), (1e6, 60_000)])
def test_a_full_queue_says_when_to_come_again(seconds: float | None, delay_ms: int) -> None:
    queue = make_queue(max_blocks=2, seconds=seconds)
    added(queue), added(queue)
    with pytest.raises(DrystoneError, match="2 blocks wait to be encoded; limit 2") as caught:
        added(queue)
    assert caught.value.reason is Reason.ENCODE_QUEUE_FULL
    assert caught.value.retry_after_ms == delay_ms
    assert caught.value.metadata == {"limit": "2"}
    assert len(queue) == 2


def test_the_delay_is_of_all_tokens_that_wait() -> None:
    rate = EncodeRate()
    assert rate.seconds(1) is None
    rate.record(100, 1.0)
    queue: BatchQueue[Entry] = BatchQueue(2, 1000, seconds=rate.seconds, clock=Clock())
    added(queue, tokens=150), added(queue, WARMING, tokens=50)
    with pytest.raises(DrystoneError) as caught:
        added(queue)
    assert caught.value.retry_after_ms == 2000


def test_warming_has_half_of_the_places_and_tokens() -> None:
    queue = make_queue(max_blocks=4, max_tokens=100)
    added(queue, WARMING), added(queue, WARMING)
    with pytest.raises(DrystoneError, match="2 blocks wait to be warmed; limit 2"):
        added(queue, WARMING)
    added(queue, LOW), added(queue, HIGH)
    with pytest.raises(DrystoneError, match="4 blocks wait to be encoded; limit 4"):
        added(queue, HIGH)


def test_tokens_are_bounded() -> None:
    queue = make_queue(max_tokens=100)
    added(queue, WARMING, tokens=40)
    with pytest.raises(DrystoneError, match="40 tokens wait to be warmed, 11 more were asked for; limit 50"):
        added(queue, WARMING, tokens=11)
    added(queue, tokens=60)
    with pytest.raises(DrystoneError, match="100 tokens wait to be encoded, 1 more were asked for; limit 100"):
        added(queue, HIGH, tokens=1)


def test_a_block_longer_than_all_the_queue_may_hold_is_let_in_alone() -> None:
    queue = make_queue(max_tokens=100)
    added(queue, WARMING, tokens=300)
    with pytest.raises(DrystoneError):
        added(queue, tokens=1)
    queue.take(0)
    added(queue, tokens=1)


def test_the_smallest_queue_still_warms() -> None:
    queue = make_queue(max_blocks=1)
    assert added(queue, WARMING) is queue.head


def test_a_forward_weighs_as_much_as_it_has_tokens() -> None:
    rate = EncodeRate()
    rate.record(1000, 1.0)
    rate.record(1, 1.0)
    assert rate.seconds(1000) == pytest.approx(1.95 / 951 * 1000)
    for _ in range(200):
        rate.record(100, 0.2)
    assert rate.seconds(1) == pytest.approx(0.002, rel=0.01), "what came before fades"
