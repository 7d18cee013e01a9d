"""Who takes part in a step, and in which order requests are let in."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from decode_worker.request import AGING_SECONDS, Phase, Request
from decode_worker.scheduler import StepBudget, StepEntry, compose
from decode_worker.waiting import PATIENCE_SECONDS, WaitingQueue
from drystone.v1.generation_pb2 import Priority
from tests.support.decode_parts import make_pool, make_request

Make = Callable[..., Request]
LOW, NORMAL, HIGH = Priority.PRIORITY_LOW, Priority.PRIORITY_NORMAL, Priority.PRIORITY_HIGH


@pytest.fixture
def make() -> Make:
    pool = make_pool(4000)

    def request(phase: Phase, unread: int, **options: object) -> Request:
        made = make_request([], question=range(1, max(unread, 1) + 1), **options)  # type: ignore[arg-type] # by name
        assert pool.admit(made, may_move=True) == []
        made.phase = phase
        for sample in made.live[:1] if phase is Phase.PREFILL else made.live:
            sample.unread = list(range(1, unread + 1))
        return made

    return request


def plan(entries: list[StepEntry], requests: list[Request]) -> list[tuple[int, int, int]]:
    return [(requests.index(entry.request), len(entry.span.token_ids), len(entry.draws)) for entry in entries]


def test_decoding_goes_first_and_questions_share_the_rest_in_order(make: Make) -> None:
    requests = [make(Phase.PREFILL, 10), make(Phase.DECODE, 1), make(Phase.PREFILL, 10), make(Phase.DECODE, 1)]
    assert plan(compose(requests, StepBudget(16)), requests) == [(1, 1, 1), (3, 1, 1), (0, 10, 1), (2, 4, 0)]
    assert plan(compose(requests, StepBudget(8)), requests) == [(1, 1, 1), (3, 1, 1), (0, 6, 0)]
    assert plan(compose(requests, StepBudget(100)), requests) == [(1, 1, 1), (3, 1, 1), (0, 10, 1), (2, 10, 1)]


def test_questions_take_less_of_a_step_in_which_others_wait_for_a_token(make: Make) -> None:
    requests = [make(Phase.PREFILL, 50), make(Phase.DECODE, 1)]
    budget = StepBudget(tokens=100, mixed_tokens=7)
    assert plan(compose(requests, budget), requests) == [(1, 1, 1), (0, 7, 0)]
    assert plan(compose(requests[:1], budget), requests) == [(0, 50, 1)]


def test_a_higher_class_reads_first_and_waiting_makes_up_for_it(make: Make) -> None:
    requests = [make(Phase.PREFILL, 10), make(Phase.PREFILL, 10, priority=HIGH), make(Phase.PREFILL, 10, priority=LOW)]
    assert [row[0] for row in plan(compose(requests, StepBudget(100)), requests)] == [1, 0, 2]
    requests[2].arrived -= 2 * AGING_SECONDS + 1
    assert [row[0] for row in plan(compose(requests, StepBudget(100)), requests)] == [2, 1, 0]


def test_who_waits_or_has_ended_takes_no_part(make: Make) -> None:
    requests = [make(phase, 2) for phase in (Phase.WAITING, Phase.FETCHING, Phase.FINISHED)]
    assert compose(requests, StepBudget(100)) == []
    assert compose([], StepBudget(100)) == []


def test_one_sample_reads_the_question_and_all_draw_at_its_end(make: Make) -> None:
    request = make(Phase.PREFILL, 10, n=3)
    [entry] = compose([request], StepBudget(4))
    assert (entry.sample.index, list(entry.draws)) == (0, [])
    [entry] = compose([request], StepBudget(10))
    assert [sample.index for sample in entry.draws] == [0, 1, 2]
    request.phase = Phase.DECODE
    for sample in request.samples:
        sample.unread = [5]
    assert [entry.sample.index for entry in compose([request], StepBudget(10))] == [0, 1, 2]
    request.samples[1].finished = True
    assert [entry.sample.index for entry in compose([request], StepBudget(10))] == [0, 2]


def test_an_interrupted_answer_is_read_again_within_the_budget(make: Make) -> None:
    request = make(Phase.DECODE, 1, n=2, resumed={1: [4, 5, 6]})
    request.samples[1].unread = [4, 5, 6]
    other = make(Phase.DECODE, 1)
    entries = compose([request, other], StepBudget(tokens=10, mixed_tokens=2))
    assert [(entry.sample.index, len(entry.span.token_ids), len(entry.draws)) for entry in entries] == [
        (0, 1, 1),
        (0, 1, 1),
        (1, 2, 0),
    ]


def test_chunks_of_a_question_are_its_tokens_in_order(make: Make) -> None:
    request = make(Phase.PREFILL, 10)
    seen: list[int] = []
    while len(seen) < 10:
        [entry] = compose([request], StepBudget(4))
        assert entry.span.position == request.question_start + len(seen)
        seen += entry.span.token_ids
        assert len(entry.draws) == (len(seen) == 10)
        entry.sample.read(len(entry.span.token_ids))
    assert seen == list(range(1, 11))


def waiting(**options: object) -> Request:
    return make_request([], **options)  # type: ignore[arg-type] # by name


def test_the_queue_is_in_order_of_class_and_waiting() -> None:
    queue = WaitingQueue()
    low, normal, high = waiting(priority=LOW), waiting(), waiting(priority=HIGH)
    old = waiting(priority=LOW)
    old.arrived -= 3 * AGING_SECONDS
    for request in (low, normal, high, old):
        queue.add(request)
    assert list(queue) == [old, high, normal, low]
    queue.remove(high)
    assert list(queue) == [old, normal, low]


def test_who_does_not_fit_is_not_tried_again_until_something_changes() -> None:
    queue = WaitingQueue()
    first, second = waiting(), waiting()
    queue.add(first)
    queue.add(second)
    tried = []
    for request in queue.to_try(1, may_move=False):
        tried.append(request)
        queue.refused(request, 1, may_move=False)
    assert tried == [first, second]
    assert list(queue.to_try(1, may_move=False)) == []
    assert list(queue.to_try(1, may_move=True)) == [first, second]
    assert list(queue.to_try(2, may_move=False)) == [first, second]


def test_small_requests_pass_a_large_one_only_for_a_while() -> None:
    queue = WaitingQueue()
    large, small = waiting(), waiting()
    queue.add(large)
    queue.add(small)
    queue.refused(large, 1, may_move=True)
    assert list(queue.to_try(1, may_move=True)) == [small]
    large.arrived = time.monotonic() - PATIENCE_SECONDS - 1
    assert list(queue.to_try(1, may_move=True)) == []
