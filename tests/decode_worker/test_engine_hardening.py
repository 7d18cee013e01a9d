"""What once broke the engine for everybody: one request's trouble stays its own."""

from __future__ import annotations

import asyncio
import math
import time

import pytest
import torch

from decode_worker import engine as module
from decode_worker import runner as runner_module
from decode_worker.request import Request
from decode_worker.sampler import choose
from drystone.v1.sampling_pb2 import SamplingParams
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason
from tests.decode_worker.test_engine import block, driven, reservations
from tests.support.stacks import until


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
        inner = runner_module._next_token

        def poisoned(request: Request, logits: torch.Tensor) -> int | DrystoneError:
            return inner(request, logits * math.nan if request.request_id == "poisoned" else logits)

        monkeypatch.setattr(runner_module, "_next_token", poisoned)
        sound, heard = run.submit(max_new_tokens=20)
        bad, told = run.submit(max_new_tokens=20)
        bad.request_id = "poisoned"
        await run.ended(sound, bad)
        assert told[-1].failed.reason == Reason.INTERNAL
        assert heard[-1].HasField("ended")


@pytest.mark.parametrize(
    "odd",
    [
        {"temperature": 1000.0, "top_k": 2, "top_p": 1e-45},
        {"temperature": 3e38},
        {"temperature": 1e-4, "min_p": 1.0},
    ],
)
def test_extreme_but_valid_sampling_yields_a_token(odd: dict[str, float]) -> None:
    logits = torch.randn(400, generator=torch.Generator().manual_seed(3))
    sampling = SamplingParams(**{"temperature": 1.0, "top_p": 1.0, "seed": 1, **odd})  # type: ignore[arg-type]
    assert 0 <= choose(logits, sampling, position=0) < 400


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
        monkeypatch.setattr(module, "encode_block", lambda *a: (order.append("encode"), encode(*a))[1])
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

        def counted(request: Request) -> object:
            nonlocal tries
            tries += 1
            return admit(request)

        monkeypatch.setattr(run.pool, "admit", counted)
        second, _ = run.submit(question=range(4, 60), max_new_tokens=70)
        await run.ended(first, second)
        assert tries == 2
