"""However a request ends, everything it held is given back, at once and in one place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

import drystone
from drystone import TextDelta
from drystone.v1 import generation_pb2 as v1
from drystone.v1.prompt_pb2 import BlockInput, BlocksPrompt
from drystone.v1.sampling_pb2 import FinishReason, SamplingParams
from shared.errors import Reason
from tests.conftest import MakeFolder
from tests.support.errors import failure_of
from tests.support.stacks import Served, serving, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

POOL_BYTES = 1 << 20
LONG = {"max_new_tokens": 900, "ignore_eos": True}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tight(tiny_folder: MakeFolder) -> AsyncIterator[Served]:
    """A stack whose decode worker holds 1 MiB: 1,365 tokens of this model."""
    async with serving(
        tiny_folder(),
        decode_settings={"pool_bytes": POOL_BYTES, "max_waiting": 2},
        gateway_settings={"max_requests": 5},
    ) as stack:
        yield stack


def request(block: str, **rest: Any) -> v1.GenerateRequest:
    sampling = SamplingParams(**{"max_new_tokens": 2, **rest.pop("sampling", {})})
    blocks = BlocksPrompt(blocks=[BlockInput(text=block), BlockInput(text="beta")])
    return v1.GenerateRequest(blocks=blocks, sampling=sampling, **rest)


async def run(served: Served, asked: v1.GenerateRequest) -> list[v1.GenerateResponse]:
    return [event async for event in served.raw.Generate(asked, timeout=20.0)]


async def generated(stream: drystone.AsyncStream, tokens: int) -> None:
    async for event in stream:
        if isinstance(event, TextDelta):
            tokens -= len(event.token_ids)
            if tokens <= 0:
                return
    raise AssertionError("the answer ended first")


async def test_a_client_that_cancels_mid_stream_frees_everything(tight: Served) -> None:
    stream = tight.client.stream(blocks=["alpha", "beta"], **LONG)
    await generated(stream, 3)
    assert tight.stack.decode_apps[0].pool.blocks.pins == 1
    await stream.close()
    await tight.until_idle(seconds=1.0)


async def test_a_client_whose_task_is_cancelled_frees_everything(tight: Served) -> None:
    task = asyncio.create_task(tight.client.generate(blocks=["alpha", "beta"], **LONG))
    await until(lambda: tight.stack.decode_apps[0].pool.blocks.pins == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await tight.until_idle(seconds=1.0)


async def test_a_client_that_vanishes_frees_everything(tight: Served) -> None:
    vanishing = drystone.AsyncClient(tight.stack.address)
    await generated(vanishing.stream(blocks=["alpha", "beta"], **LONG), 2)
    await vanishing.close()
    await tight.until_idle(seconds=1.0)


async def test_many_cancels_at_every_moment(tight: Served) -> None:
    async def one(number: int) -> None:
        try:
            async with asyncio.timeout(0.002 * number):
                await tight.client.generate(blocks=[f"alpha {number % 7}", "beta"], max_new_tokens=30)
        except TimeoutError:
            pass
        except drystone.OverloadedError as error:
            assert error.retry_after == 1.0  # noqa: PT017 - a full server is one of the ways to end

    for start in range(0, 60, 3):
        await asyncio.gather(*(one(number) for number in range(start, start + 3)))
    await tight.until_idle(seconds=1.0)


async def test_a_deadline_while_waiting_for_room(tight: Served) -> None:
    async with tight.client.stream(blocks=["alpha", "beta"], **LONG) as running:
        await generated(running, 1)
        began = time.monotonic()
        asked = request("gamma " * 100, sampling={"max_new_tokens": 500}, timeout_ms=250)
        failure = await failure_of(run(tight, asked))
        assert time.monotonic() - began < 1.5
        assert failure.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert failure.reason == Reason.DEADLINE_EXCEEDED
        assert failure.metadata["while"] == "waiting for room"
        assert len(tight.stack.decode_apps[0].engine.lifecycle.waiting) == 0
    await tight.until_idle()


async def test_a_deadline_while_generating(tight: Served) -> None:
    *_, ended, last = await run(tight, request("alpha", sampling=LONG, timeout_ms=300))
    assert ended.sample_finished.finish_reason == FinishReason.FINISH_REASON_DEADLINE
    assert 0 < ended.sample_finished.completion_tokens == last.completed.usage.completion_tokens
    await tight.until_idle(seconds=1.0)


async def test_the_clients_own_deadline(tight: Served) -> None:
    # Both ends hold the same deadline: the server may end the answer just before the client gives the call up.
    try:
        answer = await tight.client.generate(blocks=["alpha", "beta"], timeout=0.3, **LONG)
    except drystone.DeadlineExceededError as error:
        assert error.reason == Reason.DEADLINE_EXCEEDED  # noqa: PT017 - one of the two ways to end
    else:
        assert answer.finish_reason == "deadline"
    await tight.until_idle(seconds=1.0)


async def test_room_that_comes_free_goes_to_who_waits(tight: Served) -> None:
    first = asyncio.create_task(tight.client.generate(blocks=["alpha", "beta"], **LONG))
    await until(lambda: len(tight.stack.decode_apps[0].engine.lifecycle.running) == 1)
    second = asyncio.create_task(tight.client.generate(blocks=["gamma " * 100, "beta"], max_new_tokens=600))
    await until(lambda: len(tight.stack.decode_apps[0].engine.lifecycle.waiting) == 1)
    first.cancel()
    answer = await second
    assert answer.timings.queue_ms > 0
    await tight.until_idle()


async def test_what_can_never_fit_is_refused_with_numbers(tight: Served) -> None:
    failure = await failure_of(run(tight, request("wall " * 700, sampling={"max_new_tokens": 900})))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.reason == Reason.REQUEST_TOO_LARGE_FOR_POOL
    capacity = tight.stack.decode_apps[0].pool.arena.capacity_bytes
    assert int(failure.metadata["capacity_bytes"]) == capacity
    assert int(failure.metadata["needed_bytes"]) > capacity
    assert failure.retry_ms is None
    await tight.until_idle()


async def test_a_full_worker_refuses_at_once_with_a_delay(tight: Served) -> None:
    async with tight.client.stream(blocks=["alpha", "beta"], **LONG) as running:
        await generated(running, 1)
        waiting = [
            asyncio.create_task(run(tight, request("gamma", sampling={"max_new_tokens": 700}))) for _ in range(2)
        ]
        await until(lambda: len(tight.stack.decode_apps[0].engine.lifecycle.waiting) == 2)
        failure = await failure_of(run(tight, request("delta", sampling={"max_new_tokens": 700})))
        assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert failure.reason == Reason.TOO_MANY_REQUESTS
        assert failure.metadata["limit"] == "2"
        assert failure.retry_ms == 1000
        # One place less on the worker than the gateway allows: the gateway refuses the sixth.
        more = [asyncio.create_task(run(tight, request("epsilon", timeout_ms=5000))) for _ in range(2)]
        await asyncio.gather(*more, return_exceptions=True)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    await tight.until_idle()


async def test_a_full_gateway_refuses_at_once(tight: Served) -> None:
    service = tight.stack.gateway_app
    assert service is not None
    streams = [tight.client.stream(blocks=["alpha", "beta"], max_new_tokens=100, ignore_eos=True) for _ in range(5)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(drystone.OverloadedError, match="limit 5") as caught:
        await tight.client.generate(blocks=["alpha", "beta"], max_new_tokens=1)
    assert caught.value.retry_after == 1.0
    for stream in streams:
        await stream.close()
    await tight.until_idle(seconds=1.0)
    assert (await tight.client.generate(blocks=["alpha", "beta"], max_new_tokens=1)).token_ids


async def test_more_blocks_than_room_over_time_just_evict(tight: Served) -> None:
    for number in range(12):
        await tight.client.generate(blocks=[f"wall {number} " * 60, "beta"], max_new_tokens=2)
    pool = tight.stack.decode_apps[0].pool
    assert pool.blocks.evictions > 0
    await tight.until_idle()


async def test_requests_of_every_size_take_their_turns(tight: Served) -> None:
    """Big and small, more than fit at once: all are served, none waits for ever."""
    options = [(f"wall {number % 3} " * (20 + 90 * (number % 4)), 10 + 40 * (number % 5)) for number in range(10)]
    done = 0

    async def one(text: str, new: int) -> None:
        nonlocal done
        while True:
            try:
                await tight.client.generate(blocks=[text, "beta"], max_new_tokens=new, timeout=20.0)
            except drystone.OverloadedError as error:
                assert error.reason == Reason.TOO_MANY_REQUESTS  # noqa: PT017 - then it is tried again
                await asyncio.sleep(0.05)
            else:
                done += 1
                return

    await asyncio.gather(*(one(text, new) for text, new in options))
    assert done == 10
    await tight.until_idle()
