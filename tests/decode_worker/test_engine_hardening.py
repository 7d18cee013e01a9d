"""What once broke the engine for everybody: one request's trouble stays its own."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence

import pytest
import torch

from decode_worker import local_encoding as module
from decode_worker.request import Request
from decode_worker.sampling import SampleState
from shared.engine.served_model import ServedModel
from shared.errors import Reason
from tests.decode_worker.test_engine import block, driven, reservations
from tests.support.stacks import until

POISONED = 4242


async def test_a_failed_step_with_an_ended_request_in_it_does_not_end_the_engine(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with driven(model) as run:
        request, sink = run.submit(max_new_tokens=50)
        await until(lambda: len(sink) > 2)
        inner = run.runner.run

        def fails_late(_: object) -> object:
            time.sleep(0.1)  # the engine thread works while the caller leaves
            raise RuntimeError("broken step")

        monkeypatch.setattr(run.runner, "run", fails_late)
        await asyncio.sleep(0.05)
        run.engine.cancel(request)
        await asyncio.sleep(0.3)
        monkeypatch.setattr(run.runner, "run", inner)
        again, _ = run.submit()
        await run.ended(again)


async def test_logits_that_are_not_numbers_fail_their_request_alone(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with driven(model) as run:
        sampler = run.runner._sampler
        inner = sampler.choose

        def poisoned(logits: torch.Tensor, states: Sequence[SampleState]) -> object:
            for row, state in zip(logits, states, strict=True):
                if state.params.seed == POISONED:
                    row.fill_(math.nan)
            return inner(logits, states)

        monkeypatch.setattr(sampler, "choose", poisoned)
        sound, heard = run.submit(max_new_tokens=20)
        bad, told = run.submit(max_new_tokens=20, seed=POISONED)
        await run.ended(sound, bad)
        assert told[-1].failed.reason == Reason.INTERNAL
        assert heard[-1].HasField("ended")


async def test_no_stop_string_before_min_new_tokens(model: ServedModel) -> None:
    async with driven(model) as run:
        free, sink = run.submit(max_new_tokens=12)
        await run.ended(free)
        early = sink.text()[:1]
        held, sink = run.submit(max_new_tokens=12, min_new_tokens=8, stop=[early])
        await run.ended(held)
        assert len(sink.token_ids()) >= 8


async def test_encoding_here_does_not_hold_up_those_who_generate(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with driven(model, tokens=4000) as run:
        order: list[str] = []
        encode, step = module.encode_block, run.runner.run
        monkeypatch.setattr(module, "encode_block", lambda *a, **k: (order.append("encode"), encode(*a, **k))[1])
        monkeypatch.setattr(run.runner, "run", lambda entries: (order.append("step"), step(entries))[1])
        talker, _ = run.submit(max_new_tokens=30)
        waiter, sink = run.submit([block(number) for number in range(1, 9)])
        run.engine.encode_here(waiter, reservations(sink))
        await run.ended(talker, waiter)
        first, last = order.index("encode"), len(order) - 1 - order[::-1].index("encode")
        assert "encodeencode" not in "".join(order[first : last + 1])


async def test_a_fetch_without_progress_is_driven_anew_by_the_next_waiter(model: ServedModel) -> None:
    async with driven(model) as run:
        run.engine._stall_seconds = 0.2
        watching = asyncio.create_task(run.engine.watch_fetches())
        driver, first = run.submit([block(1)])
        waiter, second = run.submit([block(1)])
        [stale] = reservations(first)
        await until(lambda: "missing" in second.kinds())
        [fresh] = reservations(second)
        assert fresh.epoch > stale.epoch
        run.engine.encode_here(waiter, [fresh])
        await run.ended(driver, waiter)
        watching.cancel()


async def test_a_request_that_does_not_fit_is_not_tried_again_until_something_was_given_back(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with driven(model, tokens=200) as run:
        first, _ = run.submit(question=range(4, 60), max_new_tokens=70)
        tries = 0
        admit = run.pool.admit

        def counted(request: Request, *, may_move: bool) -> object:
            nonlocal tries
            tries += 1
            return admit(request, may_move=may_move)

        monkeypatch.setattr(run.pool, "admit", counted)
        second, _ = run.submit(question=range(4, 60), max_new_tokens=70)
        await run.ended(first, second)
        # Once while a step may run, once between steps when memory may be moved, and once when there is room.
        assert tries <= 3
