"""Relaying against a decode worker that says what a test wants it to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import grpc
import pytest

from drystone.v1 import generation_pb2 as v1
from gateway import relay as module
from gateway.cluster import Cluster
from gateway.fetcher import FetchPolicy
from gateway.relay import relay
from gateway.ticket import Ticket
from gateway.worker import Worker
from shared.errors import DrystoneError, Reason
from shared.internal.v1.decode_pb2 import Admitted, Ended, Failed, GenerateRequest, GenerateResponse
from shared.internal.v1.decode_pb2_grpc import DecodeServicer, add_DecodeServicer_to_server
from shared.internal.v1.worker_pb2 import GetInfoResponse
from shared.metrics import HISTOGRAMS, Metrics
from shared.rpc.channel import open_channel
from tests.support.fake_workers import DECODE, compatibility
from tests.support.tickets import ticket

Script = Callable[[AsyncIterator[GenerateRequest]], AsyncIterator[GenerateResponse]]
ADMITTED = GenerateResponse(admitted=Admitted())


class FakeDecode(DecodeServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    async def Generate(  # noqa: N802 - gRPC's name
        self, request_iterator: AsyncIterator[GenerateRequest], context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[GenerateResponse]:
        del context
        async for response in self._script(request_iterator):
            yield response


@contextlib.asynccontextmanager
async def cluster_with(script: Script) -> AsyncIterator[Cluster]:
    server = grpc.aio.server()
    add_DecodeServicer_to_server(FakeDecode(script), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    cluster = Cluster("model", [], [], poll_seconds=1.0, tokenizer_fingerprint=b"")
    channel = open_channel(f"127.0.0.1:{port}")
    info = GetInfoResponse(compatibility=compatibility())
    cluster.workers = [Worker("d", DECODE, channel, info=info, detail="")]
    try:
        yield cluster
    finally:
        await cluster.close()
        await server.stop(0)


async def events_of(cluster: Cluster, planned: Ticket) -> list[v1.GenerateResponse]:
    metrics = Metrics(dict, HISTOGRAMS)
    return [event async for event in relay(planned, cluster, FetchPolicy(2, 1.0), metrics)]


async def test_started_comes_with_admission_and_names_the_tickets_model() -> None:
    opened: list[GenerateRequest] = []

    async def admit(said: AsyncIterator[GenerateRequest]) -> AsyncIterator[GenerateResponse]:
        opened.append(await anext(said))
        yield ADMITTED
        yield GenerateResponse(ended=Ended())

    async with cluster_with(admit) as cluster:
        events = await events_of(cluster, ticket())
    assert [event.WhichOneof("event") for event in events] == ["started", "completed"]
    assert events[0].started.model_fingerprint == compatibility().model_fingerprint.hex()
    assert opened[0].open.model_fingerprint == compatibility().model_fingerprint


async def test_a_refused_request_gives_no_event() -> None:
    async def refuse(said: AsyncIterator[GenerateRequest]) -> AsyncIterator[GenerateResponse]:
        await anext(said)
        yield GenerateResponse(failed=Failed(reason="TOO_MANY_REQUESTS", message="full", retry_after_ms=9))

    async with cluster_with(refuse) as cluster:
        events = relay(ticket(), cluster, FetchPolicy(2, 1.0), Metrics(dict, HISTOGRAMS))
        with pytest.raises(DrystoneError) as caught:
            await anext(events)
        assert (caught.value.reason, caught.value.retry_after_ms) == (Reason.TOO_MANY_REQUESTS, 9)


async def test_workers_of_another_kind_are_not_chosen() -> None:
    async def never(said: AsyncIterator[GenerateRequest]) -> AsyncIterator[GenerateResponse]:
        raise AssertionError(said)
        yield

    async with cluster_with(never) as cluster:
        with pytest.raises(DrystoneError, match="ask again") as caught:
            await events_of(cluster, ticket(compatibility=compatibility(model_fingerprint=b"n" * 32)))
    assert (caught.value.reason, caught.value.retryable) == (Reason.NO_DECODE_WORKER, True)


async def test_a_silent_worker_and_one_that_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKSTOP_SECONDS", 0.1)

    async def silent(said: AsyncIterator[GenerateRequest]) -> AsyncIterator[GenerateResponse]:
        yield ADMITTED
        async for _ in said:
            pass

    async with cluster_with(silent) as cluster:
        with pytest.raises(DrystoneError) as caught:
            await events_of(cluster, ticket(deadline=time.monotonic() + 0.1))
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
        assert cluster.workers[0].load == 0

    async def early(said: AsyncIterator[GenerateRequest]) -> AsyncIterator[GenerateResponse]:
        await anext(said)
        yield ADMITTED

    async with cluster_with(early) as cluster:
        with pytest.raises(DrystoneError, match="ended the stream early"):
            await events_of(cluster, ticket())


async def test_a_slow_reader_is_not_interrupted_while_it_handles_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKSTOP_SECONDS", 0.0)

    async def silent(said: AsyncIterator[GenerateRequest]) -> AsyncIterator[GenerateResponse]:
        yield ADMITTED
        async for _ in said:
            pass

    async with cluster_with(silent) as cluster:
        planned = ticket(deadline=time.monotonic() + 0.5)
        events = relay(planned, cluster, FetchPolicy(2, 1.0), Metrics(dict, HISTOGRAMS))
        await anext(events)
        await asyncio.sleep(0.7)  # over time: no timeout may strike here
        with pytest.raises(DrystoneError) as caught:
            await anext(events)
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
