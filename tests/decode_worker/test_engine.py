"""The engine on a real tiny model, driven as a gateway drives it, without sockets."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import torch

from decode_worker import local_encoding as module
from decode_worker.arena import Arena
from decode_worker.attention.flash import FlashAttention
from decode_worker.engine import Engine
from decode_worker.pool import Pool
from decode_worker.request import Request
from decode_worker.runner import Runner
from decode_worker.sampling import Sampler
from drystone.v1.statistics_pb2 import BlockSource
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import BlockRef, KvEndpoint, Reservation
from shared.runtime import cancelled
from tests.support.decode_parts import (
    IDENTITY,
    Sink,
    assert_all_free_after_eviction,
    assert_idle,
    make_request,
    tokenizer,
)
from tests.support.stacks import until

ENDPOINT = KvEndpoint(zmq_address="tcp://127.0.0.1:1")


def block(name: int, tokens: int = 10) -> BlockRef:
    return BlockRef(key=bytes([name]) * 32, token_ids=[5 + name + index % 7 for index in range(tokens)], store=True)


class Driven:
    """A running engine and what its requests were sent."""

    def __init__(self, model: ServedModel, tokens: int, max_waiting: int) -> None:
        shape = model.geometry.shape
        self.pool = Pool(Arena(shape, shape.extent_bytes(tokens), torch.device("cpu")), IDENTITY)
        self.runner = Runner(
            model, FlashAttention(self.pool.arena, model.geometry.layers), Sampler(tokenizer(), model.vocabulary_size)
        )
        self.engine = Engine(model, self.pool, self.runner, max_waiting=max_waiting, endpoint=ENDPOINT)

    def submit(self, blocks: Sequence[BlockRef] = (), **options: Any) -> tuple[Request, Sink]:
        sink = Sink()
        request = make_request(blocks, question=options.pop("question", (7, 8, 9)), sink=sink, **options)
        self.engine.submit(request)
        return request, sink

    async def ended(self, *requests: Request) -> None:
        await until(lambda: all(request.finished for request in requests), 10.0)


@contextlib.asynccontextmanager
async def driven(model: ServedModel, tokens: int = 2000, max_waiting: int = 8) -> AsyncIterator[Driven]:
    made = Driven(model, tokens, max_waiting)
    running = asyncio.create_task(made.engine.run())
    yield made
    assert not running.done(), "the engine's loop ended"
    await cancelled(running)
    assert_all_free_after_eviction(made.pool)


def reservations(sink: Sink) -> list[Reservation]:
    """Reservations of the last Missing."""
    return [one.reservation for one in next(m for m in reversed(sink) if m.HasField("missing")).missing.blocks]


async def test_messages_of_a_request_in_order(model: ServedModel) -> None:
    async with driven(model) as run:
        request, sink = run.submit([block(1), block(2)])
        assert sink.kinds() == ["admitted", "missing"]
        assert [one.key[0] for one in sink[1].missing.blocks] == [1, 2]
        assert sink[1].missing.endpoint == ENDPOINT
        run.engine.encode_here(request, reservations(sink))
        await run.ended(request)
        assert sink.kinds() == ["admitted", "missing", *["tokens"] * 4, "sample_ended", "ended"]
        arrivals = sink[-1].ended.arrivals
        assert [arrival.source for arrival in arrivals] == [BlockSource.BLOCK_SOURCE_ENCODED_ON_DECODE] * 2
        assert all(arrival.encode_ms > 0 for arrival in arrivals)
        again, sink = run.submit([block(2), block(1)])
        assert sink.kinds() == ["admitted"]
        assert [key[0] for key in sink[0].admitted.resident] == [2, 1]
        await run.ended(again)


async def test_answers_do_not_depend_on_who_is_in_the_step(model: ServedModel) -> None:
    async with driven(model) as run:
        alone = []
        for number in range(6):
            request, sink = run.submit(question=range(4, 9 + 3 * number), max_new_tokens=5 + number)
            await run.ended(request)
            alone.append(sink.token_ids())
        together = [run.submit(question=range(4, 9 + 3 * number), max_new_tokens=5 + number) for number in range(6)]
        await run.ended(*(request for request, _ in together))
        assert [sink.token_ids() for _, sink in together] == alone


async def test_a_cancel_at_any_moment_frees_everything(model: ServedModel) -> None:
    async with driven(model) as run:
        for moment in range(8):
            request, sink = run.submit([block(1), block(3 + moment)], max_new_tokens=50)
            run.engine.encode_here(request, reservations(sink))
            await until(lambda sink=sink, moment=moment: len(sink) >= moment)  # type: ignore[misc]
            run.engine.cancel(request)
            run.engine.cancel(request)
            said = len(sink)
            await until(lambda: not run.engine.lifecycle.holding)
            assert len(sink) == said, "a cancelled request is told nothing more"
            await until(lambda: not len(run.pool.fetches))
            assert_idle(run.pool)


async def test_memory_in_a_step_is_held_until_the_step_returns(model: ServedModel) -> None:
    async with driven(model) as run:
        go, began, step = threading.Event(), threading.Event(), run.runner.run

        def held(entries: Any) -> Any:
            began.set()
            go.wait(10.0)
            return step(entries)

        run.runner.run = held  # type: ignore[method-assign] # stands in for the real one
        request, sink = run.submit(question=range(3, 80))
        await until(began.is_set)
        run.engine.cancel(request)
        await asyncio.sleep(0.02)
        assert len(run.engine.lifecycle.running) == 0
        assert run.engine.lifecycle.holding == [request]
        assert request.samples[0].tail is not None
        run.pool.check_integrity([request])
        go.set()
        await until(lambda: not run.engine.lifecycle.holding)
        assert_idle(run.pool)
        assert sink.kinds() == ["admitted"]


async def test_a_step_that_fails_ends_its_requests_alone(model: ServedModel) -> None:
    async with driven(model) as run:
        step = run.runner.run
        run.runner.run = lambda _: 1 / 0  # type: ignore[method-assign,assignment] # stands in for the real one
        first, sink = run.submit()
        await run.ended(first)
        assert sink[-1].failed.reason == Reason.INTERNAL
        run.runner.run = step  # type: ignore[method-assign] # stands in for the real one
        second, sink = run.submit()
        await run.ended(second)
        assert sink.kinds()[-1] == "ended"


async def test_a_block_that_cannot_be_encoded_fails_who_waits_for_it(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with driven(model) as run:
        one, first = run.submit([block(1)])
        other, second = run.submit([block(1), block(2)])
        third, unharmed = run.submit()
        monkeypatch.setattr(module, "encode_block", lambda *_, **__: 1 / 0)
        run.engine.encode_here(one, reservations(first))
        await run.ended(one, other, third)
        assert {sink[-1].failed.reason for sink in (first, second)} == {Reason.BLOCK_UNAVAILABLE}
        assert unharmed.kinds()[-1] == "ended"


async def test_when_the_driver_leaves_the_next_waiter_is_asked(model: ServedModel) -> None:
    async with driven(model) as run:
        driver, first = run.submit([block(1)])
        waiter, second = run.submit([block(1)])
        assert second.kinds() == ["admitted"]
        assert [key[0] for key in second[0].admitted.awaited] == [1]
        [stale] = reservations(first)
        run.engine.fetch_failed(driver, [stale], DrystoneError(Reason.BLOCK_UNAVAILABLE, "given up"))
        assert first[-1].failed.reason == Reason.BLOCK_UNAVAILABLE
        [fresh] = reservations(second)
        assert (fresh.reservation_id, fresh.epoch) == (stale.reservation_id, stale.epoch + 1)
        # What names the old epoch is not heard any more, whoever says it.
        run.engine.encode_here(driver, [fresh])
        run.engine.encode_here(waiter, [stale])
        run.engine.fetch_failed(waiter, [stale], DrystoneError(Reason.BLOCK_UNAVAILABLE, "given up"))
        await asyncio.sleep(0.05)
        assert not waiter.finished
        run.engine.encode_here(waiter, [fresh])
        await run.ended(waiter)
        assert second[-1].HasField("ended")


async def test_a_deadline_names_what_it_was_waiting_for(model: ServedModel) -> None:
    async with driven(model, tokens=140) as run:
        fetching, first = run.submit([block(1)], seconds=0.15)
        waiting, second = run.submit([block(2, 60)], seconds=0.05)
        await run.ended(fetching, waiting)
        assert second[-1].failed.metadata["while"] == "waiting for room"
        assert first[-1].failed.metadata["while"] == "waiting for blocks"
        late, third = run.submit(seconds=-1.0)
        await run.ended(late)
        assert third[-1].failed.reason == Reason.DEADLINE_EXCEEDED


@pytest.mark.parametrize("most", [0, 2])
async def test_the_queue_is_bounded_and_who_has_room_never_waits(model: ServedModel, most: int) -> None:
    async with driven(model, tokens=70, max_waiting=most) as run:
        running, _ = run.submit([block(1, 5)])
        waiting = [run.submit(question=(1,)) for _ in range(most)]
        with pytest.raises(DrystoneError) as caught:
            run.submit(question=(1,))
        assert caught.value.reason is Reason.TOO_MANY_REQUESTS
        assert caught.value.retry_after_ms == 1000
        assert len(run.engine.lifecycle.waiting) == most
        run.engine.cancel(running)
        await run.ended(*(request for request, _ in waiting))
        again, sink = run.submit(question=(1,))
        await run.ended(again)
        assert sink[-1].HasField("ended")
        assert run.engine.lifecycle._timers == {}


async def test_stopping_fails_what_runs_and_frees_everything(model: ServedModel) -> None:
    made = Driven(model, 200, 8)
    running = asyncio.create_task(made.engine.run())
    _, first = made.submit(max_new_tokens=60)
    _, second = made.submit([block(1)])
    _, third = made.submit([block(2, 100)])
    await until(lambda: len(first) > 3)
    await cancelled(running)
    assert {sink[-1].failed.reason for sink in (first, second, third)} == {Reason.DRAINING}
    assert_all_free_after_eviction(made.pool)


async def test_stop_tokens_end_without_being_said(model: ServedModel) -> None:
    async with driven(model) as run:
        request, sink = run.submit(max_new_tokens=12)
        await run.ended(request)
        said = sink.token_ids()
        stop = next(token for token in said[2:] if token not in said[:2])
        stopped, sink = run.submit(max_new_tokens=12, stop_ids=frozenset({stop}))
        await run.ended(stopped)
        assert sink.token_ids() == said[: said.index(stop)]
        assert sink[-2].sample_ended.matched_stop_token_id == stop
        forced, sink = run.submit(max_new_tokens=12, min_new_tokens=12, stop_ids=frozenset({stop, 10**9}))
        await run.ended(forced)
        assert len(sink.token_ids()) == 12
        assert stop not in sink.token_ids()
