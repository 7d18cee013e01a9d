"""Who takes part in a step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from decode_worker.request import Phase, Request
from decode_worker.scheduler import StepEntry, compose
from tests.support.decode_parts import make_pool, make_request

Make = Callable[[Phase, int], Request]


@pytest.fixture
def make() -> Make:
    pool = make_pool(2000)

    def request(phase: Phase, unread: int) -> Request:
        made = make_request([], question=range(1, unread + 1))
        assert pool.admit(made) == []
        made.phase, made.unread = phase, list(range(1, unread + 1))
        return made

    return request


def plan(entries: list[StepEntry], requests: list[Request]) -> list[tuple[int, int, bool]]:
    return [(requests.index(entry.request), len(entry.span.token_ids), entry.samples) for entry in entries]


def test_decoding_goes_first_and_questions_share_the_rest_in_order(make: Make) -> None:
    requests = [make(Phase.PREFILL, 10), make(Phase.DECODE, 1), make(Phase.PREFILL, 10), make(Phase.DECODE, 1)]
    assert plan(compose(requests, 16), requests) == [(1, 1, True), (3, 1, True), (0, 10, True), (2, 4, False)]
    assert plan(compose(requests, 8), requests) == [(1, 1, True), (3, 1, True), (0, 6, False)]
    assert plan(compose(requests, 100), requests) == [(1, 1, True), (3, 1, True), (0, 10, True), (2, 10, True)]


def test_decoding_is_never_held_up_by_the_budget(make: Make) -> None:
    requests = [make(Phase.DECODE, 1) for _ in range(5)] + [make(Phase.PREFILL, 3)]
    assert plan(compose(requests, 4), requests) == [(index, 1, True) for index in range(5)]
    assert plan(compose(requests, 5), requests) == [(index, 1, True) for index in range(5)]


def test_who_waits_or_has_ended_takes_no_part(make: Make) -> None:
    requests = [make(phase, 2) for phase in (Phase.WAITING, Phase.FETCHING, Phase.FINISHED)]
    assert compose(requests, 100) == []
    assert compose([], 100) == []


def test_chunks_of_a_question_are_its_tokens_in_order(make: Make) -> None:
    request = make(Phase.PREFILL, 10)
    seen: list[int] = []
    while not seen or len(seen) < 10:
        [entry] = compose([request], 4)
        assert entry.span.position == request.question_start + len(seen)
        seen += entry.span.token_ids
        assert entry.samples is (len(seen) == 10)
        assert request.tail is not None
        request.tail.filled += len(entry.span.token_ids)
        request.unread = request.unread[len(entry.span.token_ids) :]
    assert seen == list(range(1, 11))
