"""Both clients against a real gRPC server: answers, events, cancellation, errors."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest

import drystone
from drystone import AsyncClient, Client, Completed, SampleFinished, Started, TextDelta
from tests.client.canned_gateway import KEYS, canned_pair, failure

if TYPE_CHECKING:
    from tests.client.canned_gateway import CannedGateway

DOCUMENTS: list[drystone.Document | str] = [drystone.Document("Walls", "Dry stone."), "Mortar."]


def _check(answer: drystone.Answer) -> None:
    assert answer.text == "Gravity holds it."
    assert answer.token_ids == (11, 12, 13)
    assert answer.finish_reason == "stop"
    assert answer.seed == 7
    assert answer.request_id == "mine"
    assert answer.usage.shipped_bytes == 1536
    assert answer.routing == drystone.Routing("decode-0", 0, 1)
    assert [block.source for block in answer.blocks] == ["resident", "prefill_ram", "unspecified"]
    assert [block.document_index for block in answer.blocks] == [None, 0, None]
    assert answer.blocks[1].key == KEYS[1]
    assert answer.logprobs[0].token == b"\xe2"
    assert "Gravity holds it." in repr(answer)
    assert "20 of 60" in repr(answer)


def test_generate(gateway: CannedGateway) -> None:
    with Client(gateway.address) as client:
        _check(client.generate("What holds it?", documents=DOCUMENTS, request_id="mine", stop="\n"))
    sent = gateway.requests[0]
    assert [document.title for document in sent.rag.documents] == ["Walls", ""]
    assert sent.sampling.stop == ["\n"]
    assert not gateway.was_cancelled


async def test_generate_async(gateway: CannedGateway) -> None:
    async with AsyncClient(gateway.address) as client:
        _check(await client.generate("What holds it?", documents=DOCUMENTS, request_id="mine"))
    assert not gateway.was_cancelled


def test_stream_events_in_order(gateway: CannedGateway) -> None:
    with Client(gateway.address) as client, client.stream("Why?", documents=DOCUMENTS) as stream:
        events = list(stream)
        assert stream.request_id == "made-by-server"
        assert stream.read().text == "Gravity holds it."
    assert [type(event) for event in events] == [Started, TextDelta, TextDelta, SampleFinished, Completed]


async def test_stream_events_in_order_async(gateway: CannedGateway) -> None:
    async with AsyncClient(gateway.address) as client, client.stream("Why?", documents=DOCUMENTS) as stream:
        events = [event async for event in stream]
        assert stream.request_id == "made-by-server"
    assert [type(event) for event in events] == [Started, TextDelta, TextDelta, SampleFinished, Completed]


def test_leaving_the_loop_cancels(gateway: CannedGateway) -> None:
    gateway.hold = True
    with Client(gateway.address) as client:
        for event in client.stream("Why?", documents=DOCUMENTS):
            if isinstance(event, TextDelta):
                break
        assert gateway.ended.wait(5)
    assert gateway.was_cancelled


async def test_leaving_the_loop_cancels_async(gateway: CannedGateway) -> None:
    gateway.hold = True
    async with AsyncClient(gateway.address) as client:
        async for event in client.stream("Why?", documents=DOCUMENTS):
            if isinstance(event, TextDelta):
                break
        assert await asyncio.to_thread(gateway.ended.wait, 5)
    assert gateway.was_cancelled


async def test_cancelling_the_task_cancels_the_call(gateway: CannedGateway) -> None:
    gateway.hold = True
    async with AsyncClient(gateway.address) as client:
        task = asyncio.create_task(client.generate("Why?", documents=DOCUMENTS))
        assert await asyncio.to_thread(gateway.arrived.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(gateway.ended.wait, 5)
    assert gateway.was_cancelled


def test_a_closed_stream_ends(gateway: CannedGateway) -> None:
    gateway.hold = True
    with Client(gateway.address) as client:
        stream = client.stream("Why?", documents=DOCUMENTS)
        assert isinstance(next(stream), Started)
        stream.close()
        stream.close()
        assert list(stream) == []
        with pytest.raises(drystone.InternalError, match="before it was complete"):
            stream.read()


async def test_closing_from_another_task_ends_the_stream(gateway: CannedGateway) -> None:
    gateway.hold = True
    async with AsyncClient(gateway.address) as client:
        stream = client.stream("Why?", documents=DOCUMENTS)
        reader = asyncio.create_task(_collect(stream))
        assert await asyncio.to_thread(gateway.arrived.wait, 5)
        await asyncio.sleep(0.2)
        await stream.close()
        assert [type(event) for event in await reader] == [Started, TextDelta]


async def _collect(stream: drystone.AsyncStream) -> list[drystone.Event]:
    return [event async for event in stream]


def test_deadline(gateway: CannedGateway) -> None:
    gateway.hold = True
    with Client(gateway.address) as client, pytest.raises(drystone.DeadlineExceededError) as caught:
        client.generate("Why?", documents=DOCUMENTS, timeout=0.3)
    assert caught.value.reason == "DEADLINE_EXCEEDED"
    assert caught.value.request_id == "made-by-server"


def test_a_stream_without_its_end_is_no_answer(gateway: CannedGateway) -> None:
    gateway.leave_out_completed = True
    with Client(gateway.address) as client, pytest.raises(drystone.InternalError):
        client.generate("Why?", documents=DOCUMENTS)


def test_no_server(closed_port: int) -> None:
    with Client(f"127.0.0.1:{closed_port}") as client, pytest.raises(drystone.ConnectError) as caught:
        client.generate("Why?", documents=DOCUMENTS)
    assert caught.value.reason == "NO_SERVER"
    assert str(closed_port) in caught.value.message
    assert isinstance(caught.value, drystone.UnavailableError)


async def test_errors_async(gateway: CannedGateway) -> None:
    gateway.failure = failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS", retry_ms=1500)
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(drystone.OverloadedError) as caught:
            await client.generate("Why?", documents=DOCUMENTS)
        with pytest.raises(drystone.NotFoundError):
            await client.model("other")
        assert (await client.model()).context_tokens == 2048
        assert (await client.status())[0].role == "gateway"
    assert caught.value.retry_after == 1.5
    with pytest.raises(ValueError, match="closed"):
        await client.model()


def test_model_and_status(gateway: CannedGateway) -> None:
    with Client(gateway.address) as client:
        assert client.model("tiny").aliases == ("t",)
        with pytest.raises(drystone.NotFoundError) as caught:
            client.model("other")
        processes = client.status()
    assert caught.value.reason == "UNKNOWN_MODEL"
    assert [process.state for process in processes] == ["ready", "unspecified"]
    assert processes[1].values == {"pool_used_bytes": 3 << 20}
    assert processes[0].pairs == ()
    pair, sent = processes[1].pairs[0], canned_pair()
    assert (pair.direction, pair.state) == ("receive", "open")
    for name in set(sent.DESCRIPTOR.fields_by_name) - {"direction", "state"}:
        assert getattr(pair, name) == getattr(sent, name)


def test_a_long_answer_passes_both_limits(gateway: CannedGateway) -> None:
    gateway.text = "x" * (8 << 20)
    with Client(gateway.address) as client:
        answer = client.generate("Why?", documents=["y" * (8 << 20)])
    assert len(answer.text) > 8 << 20


def test_what_is_too_large_to_send_is_the_requests_fault(gateway: CannedGateway) -> None:
    with Client(gateway.address) as client, pytest.raises(drystone.InvalidRequestError, match="larger than max"):
        client.generate("Why?", documents=["y" * (65 << 20)])
    assert not gateway.requests
