"""Warming with both clients against a real gRPC server: batches, repeats, cancellation, errors."""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import drystone
from drystone import AsyncClient, Chunking, Client, Document, WarmProgress
from drystone import _base as base
from drystone import _warm_batches as batches
from drystone._retries import Retries
from drystone._warm_state import WarmState
from drystone.v1 import generation_pb2
from tests.client.canned_blocks import BYTES_PER_TOKEN, Fault, key_of
from tests.client.canned_gateway import failure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.client.canned_gateway import CannedGateway

DOCUMENTS: list[Document | str] = [Document("Walls", "Dry stone holds."), "Mortar.", "", "Lime and sand too."]
BUSY = failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "ENCODE_QUEUE_FULL", retry_ms=1)
NOBODY = failure(grpc.StatusCode.UNAVAILABLE, "NO_PREFILL_WORKER")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "Retries", lambda: Retries(first_seconds=0.001))


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_BATCH_DOCUMENTS", 2)


def texts(count: int) -> list[str]:
    return [f"document number {number}" for number in range(count)]


def check(result: drystone.WarmResult) -> None:
    assert [document.index for document in result.documents] == [0, 1, 2, 3]
    assert [document.tokens for document in result.documents] == [3, 1, 0, 4]
    assert [len(document.keys) for document in result.documents] == [1, 1, 0, 1]
    assert [(error.index, error.error, error.error_reason) for error in result.errors] == [
        (2, "the document has no text", "EMPTY_DOCUMENT")
    ]
    assert (result.documents_total, result.tokens_encoded, result.blocks_encoded) == (4, 8, 3)
    assert result.bytes_stored == 8 * BYTES_PER_TOKEN
    assert result.stored == (drystone.BlockLocation("prefill-0", drystone.BlockSource.PREFILL_DISK, 800),)
    assert result.already_warm == 0


@pytest.mark.usefixtures("pairs")
def test_the_result_is_in_order_and_adds_up_over_calls(gateway: CannedGateway) -> None:
    with Client(gateway.address) as client:
        check(client.warm(DOCUMENTS).result())
        again = client.warm(iter(DOCUMENTS)).result()
    assert [len(request.documents) for request in gateway.warmed.requests] == [2, 2, 2, 2]
    assert (again.already_warm, again.tokens_encoded, again.documents_total) == (3, 0, 4)
    assert again.stored[0].bytes == 800


@pytest.mark.usefixtures("pairs")
async def test_the_result_async(gateway: CannedGateway) -> None:
    async with AsyncClient(gateway.address) as client, client.warm(DOCUMENTS) as stream:
        check(await stream.result())
    assert len(gateway.warmed.requests) == 2


def test_every_option_is_carried(gateway: CannedGateway) -> None:
    with Client(gateway.address) as client:
        client.warm(
            [Document("T", b"bytes"), Document(key="a" * 64)],
            model="tiny",
            tags="one",
            ttl_seconds=60,
            pin=True,
            chunking=Chunking(512, overlap_tokens=64),
            template="tulu",
            tenant="acme",
        ).result()
    sent = gateway.warmed.requests[0]
    assert [document.WhichOneof("content") for document in sent.documents] == ["utf8_text", "block_key"]
    assert sent.documents[0].title == "T"
    assert (sent.model, list(sent.tags), sent.ttl_seconds, sent.pin, sent.tenant) == ("tiny", ["one"], 60, True, "acme")
    assert sent.chunking == generation_pb2.Chunking(max_tokens=512, overlap_tokens=64, at_paragraphs=True)
    assert sent.template.name == "tulu"


def test_absent_options_stay_absent(gateway: CannedGateway) -> None:
    with Client(gateway.address) as client:
        client.warm(["text"]).result()
    sent = gateway.warmed.requests[0]
    assert not any(sent.HasField(name) for name in ("ttl_seconds", "chunking", "template"))


def test_wrong_calls_are_refused_before_any_request(gateway: CannedGateway) -> None:
    wrong: dict[str, Any] = {"tegs": ["a"]}
    with Client(gateway.address) as client:
        with pytest.raises(TypeError, match="not a single one"):
            client.warm("text")
        with pytest.raises(TypeError, match="unknown options: tegs"):
            client.warm(["text"], **wrong)
        with pytest.raises(drystone.InvalidRequestError, match="range"):
            client.warm(["text"], ttl_seconds=-1)
        with pytest.raises(drystone.InvalidRequestError, match="Unicode"):
            client.warm(["text"], tags=["\ud800"])
    assert not gateway.warmed.requests


def test_nothing_to_warm_makes_no_call(gateway: CannedGateway) -> None:
    with Client(gateway.address) as client:
        result = client.warm([]).result()
    assert (result.documents, result.documents_total) == ((), 0)
    assert not gateway.warmed.requests


@pytest.mark.usefixtures("pairs")
def test_an_endless_generator_is_read_as_it_is_sent(gateway: CannedGateway) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield f"document {number}"

    with Client(gateway.address) as client, client.warm(endless()) as stream:
        for progress in itertools.islice(stream, 10):
            assert progress.documents_total is None
            assert read <= progress.documents_done + 3
    assert progress.documents_done == 10


@pytest.mark.usefixtures("pairs")
def test_progress_counts_from_the_start(gateway: CannedGateway) -> None:
    with Client(gateway.address) as client:
        stream = client.warm(texts(5))
        seen = list(stream)
    assert [progress.documents_done for progress in seen] == [1, 2, 3, 4, 5]
    assert {progress.documents_total for progress in seen} == {5}
    assert [progress.tokens_encoded for progress in seen] == [3, 6, 9, 12, 15]
    assert [document.index for progress in seen for document in progress.documents] == [1, 0, 3, 2, 4]
    assert "5 of 5 documents" in repr(seen[-1])
    assert stream.result().documents == ()
    assert stream.result().documents_total == 5


def test_batches_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_BATCH_BYTES", 1000)
    given = ["a" * 400, "b" * 400, "c" * 400, "d" * 5000, "e" * 10]
    assert [list(batch.documents) for batch in batches.batches(given)] == [[0, 1], [2], [3], [4]]


def test_what_no_message_can_carry_is_that_documents_error(
    gateway: CannedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MAX_DOCUMENT_BYTES", 1000)
    with Client(gateway.address) as client:
        result = client.warm(["good", "\ud800", "x" * 2000, "fine"]).result()
        alone = client.warm(["\ud800"]).result()
    assert [document.error_reason for document in result.documents] == ["", "INVALID_UTF8", "DOCUMENT_TOO_LARGE", ""]
    assert "limit 1000 bytes" in result.documents[2].error
    assert result.documents_total == 4
    assert alone.documents_total == len(alone.errors) == 1
    assert [len(request.documents) for request in gateway.warmed.requests] == [2]


@pytest.mark.parametrize("status", [BUSY, NOBODY], ids=["overloaded", "unavailable"])
def test_a_call_that_breaks_is_repeated_for_the_rest(gateway: CannedGateway, status: Any) -> None:
    gateway.warmed.faults.extend([Fault(0, status), Fault(2, status), Fault(1, status)])
    with Client(gateway.address) as client:
        result = client.warm(texts(5)).result()
    assert [len(request.documents) for request in gateway.warmed.requests] == [5, 5, 3, 2]
    assert [document.index for document in result.documents] == [0, 1, 2, 3, 4]
    assert len(set(gateway.warmed.encoded)) == len(gateway.warmed.encoded) == 5
    assert (result.tokens_encoded, result.blocks_encoded, result.already_warm) == (15, 5, 0)
    keys = [key_of(document) for document in gateway.warmed.requests[0].documents]
    assert [document.keys for document in result.documents] == [(key,) for key in keys]


async def test_a_call_that_breaks_is_repeated_async(gateway: CannedGateway) -> None:
    gateway.warmed.faults.extend([Fault(0, BUSY), Fault(2, NOBODY)])
    async with AsyncClient(gateway.address) as client:
        result = await client.warm(texts(5)).result()
    assert [len(request.documents) for request in gateway.warmed.requests] == [5, 5, 3]
    assert (result.tokens_encoded, result.documents_total) == (15, 5)


def test_repeats_without_progress_end(gateway: CannedGateway) -> None:
    most = Retries().most
    gateway.warmed.faults.extend([Fault(0, BUSY)] * 100)
    with Client(gateway.address) as client, pytest.raises(drystone.OverloadedError):
        client.warm(texts(5)).result()
    assert len(gateway.warmed.requests) == most + 1


def test_progress_gives_new_repeats(gateway: CannedGateway) -> None:
    gateway.warmed.faults.extend([Fault(0, BUSY)] * 5 + [Fault(1, BUSY)] + [Fault(0, BUSY)] * 5)
    with Client(gateway.address) as client:
        assert client.warm(texts(5)).result().documents_total == 5


@pytest.mark.parametrize(
    "status",
    [
        failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "RECORDS_FULL"),
        failure(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TEMPLATE"),
        failure(grpc.StatusCode.INTERNAL, "INTERNAL"),
    ],
    ids=["full for good", "invalid", "defect"],
)
def test_what_cannot_pass_is_not_repeated(gateway: CannedGateway, status: Any) -> None:
    gateway.warmed.faults.append(Fault(1, status))
    with Client(gateway.address) as client, client.warm(texts(3)) as stream:
        assert next(stream).documents_done == 1
        with pytest.raises(drystone.DrystoneError):
            next(stream)
        assert list(stream) == []
    assert len(gateway.warmed.requests) == 1


def test_waits_grow_and_honour_the_server() -> None:
    retries = Retries(most=3, first_seconds=1.0, longest_seconds=3.0)
    busy = drystone.OverloadedError("full", retry_after=0.5)
    waits = [retries.wait_seconds(busy, failures, heard=True) for failures in range(4)]
    assert waits[3] is None
    for wait, floor in zip(waits, (1.0, 2.0, 3.0), strict=False):
        assert wait is not None
        assert floor <= wait <= floor * 1.25
    slow = retries.wait_seconds(drystone.OverloadedError("full", retry_after=60.0), 0, heard=True)
    assert slow is not None
    assert slow >= 60.0
    gone = drystone.ConnectError("gone", reason="NO_SERVER")
    assert retries.wait_seconds(gone, 0, heard=False) is None
    assert retries.wait_seconds(gone, 0, heard=True) is not None
    assert retries.wait_seconds(drystone.ConnectError("gone", reason="CONNECTION_LOST"), 0, heard=False) is not None


def test_no_server_is_said_at_once(closed_port: int) -> None:
    with Client(f"127.0.0.1:{closed_port}") as client, pytest.raises(drystone.ConnectError) as caught:
        client.warm(["text"]).result()
    assert caught.value.reason == "NO_SERVER"


def test_a_slow_call_goes_on_in_another(gateway: CannedGateway) -> None:
    gateway.warmed.faults.append(Fault(2))
    with Client(gateway.address) as client:
        assert client.warm(texts(5), timeout=1.0).result().documents_total == 5
    assert [len(request.documents) for request in gateway.warmed.requests] == [5, 3]


def test_a_stuck_call_ends_by_its_deadline(gateway: CannedGateway) -> None:
    gateway.warmed.faults.append(Fault(0))
    with Client(gateway.address) as client, pytest.raises(drystone.DeadlineExceededError):
        client.warm(texts(5), timeout=0.3).result()


def test_a_stream_that_leaves_documents_out_is_an_error(gateway: CannedGateway) -> None:
    gateway.warmed.faults.append(Fault(3, then="end"))
    with Client(gateway.address) as client, pytest.raises(drystone.InternalError, match="2 documents were not"):
        client.warm(texts(5)).result()


def test_leaving_the_stream_cancels(gateway: CannedGateway) -> None:
    gateway.warmed.faults.append(Fault(1))
    with Client(gateway.address) as client:
        for progress in client.warm(texts(5)):
            assert isinstance(progress, WarmProgress)
            break
        assert gateway.warmed.left.wait(5)


async def test_leaving_the_stream_cancels_async(gateway: CannedGateway) -> None:
    gateway.warmed.faults.append(Fault(1))
    async with AsyncClient(gateway.address) as client:
        async with client.warm(texts(5)) as stream:
            assert (await anext(stream)).documents_done == 1
            assert await asyncio.to_thread(gateway.warmed.reached.wait, 5)
        assert await asyncio.to_thread(gateway.warmed.left.wait, 5)
        assert [progress async for progress in stream] == []


def test_a_document_that_the_call_did_not_have_is_an_error() -> None:
    state = WarmState(texts(2), {}, address="host:1", retries=Retries())
    assert isinstance(state.next_step(), generation_pb2.WarmRequest)
    strange = generation_pb2.WarmResponse(documents=[generation_pb2.WarmedDocument(document_index=2)])
    with pytest.raises(drystone.InternalError, match="document 2 of a call that had 2"):
        state.take(strange)


async def test_cancelling_the_task_cancels_the_call(gateway: CannedGateway) -> None:
    gateway.warmed.faults.append(Fault(1))
    async with AsyncClient(gateway.address) as client:

        async def warm() -> None:
            async with client.warm(texts(5)) as stream:
                await stream.result()

        task = asyncio.create_task(warm())
        assert await asyncio.to_thread(gateway.warmed.reached.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(gateway.warmed.left.wait, 5)


def test_closing_from_another_thread_ends_the_stream(gateway: CannedGateway) -> None:
    gateway.warmed.faults.append(Fault(1))
    with Client(gateway.address) as client:
        stream = client.warm(texts(5))
        assert next(stream).documents_done == 1
        # Late enough that the reader waits for a message that never comes.
        closer = threading.Timer(0.3, stream.close)
        closer.start()
        assert list(stream) == []
        closer.join()
        assert gateway.warmed.left.wait(5)


def test_closing_ends_the_wait_before_a_repeat(gateway: CannedGateway) -> None:
    patient = failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "ENCODE_QUEUE_FULL", retry_ms=60_000)
    gateway.warmed.faults.extend([Fault(1, patient)])
    with Client(gateway.address) as client:
        stream = client.warm(texts(3))
        assert next(stream).documents_done == 1
        closer = threading.Timer(0.3, stream.close)
        closer.start()
        assert list(stream) == []
        closer.join()
    assert len(gateway.warmed.requests) == 1


async def test_closing_from_another_task_ends_the_wait(gateway: CannedGateway) -> None:
    patient = failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "ENCODE_QUEUE_FULL", retry_ms=60_000)
    gateway.warmed.faults.extend([Fault(1, patient)])
    async with AsyncClient(gateway.address) as client:
        stream = client.warm(texts(3))
        assert (await anext(stream)).documents_done == 1
        reader = asyncio.create_task(_rest(stream))
        await asyncio.sleep(0.3)
        await stream.close()
        assert await reader == []


async def _rest(stream: drystone.AsyncWarmStream) -> list[WarmProgress]:
    return [progress async for progress in stream]


def test_a_generator_that_fails_ends_the_stream(gateway: CannedGateway) -> None:
    def broken() -> Iterator[str]:
        yield "one"
        raise OSError("disk gone")

    with Client(gateway.address) as client, client.warm(broken()) as stream:
        with pytest.raises(OSError, match="disk gone"):
            next(stream)
        assert list(stream) == []


def test_reprs_say_what_matters() -> None:
    warmed = drystone.WarmedDocument(3, ("ab" * 32,), 20, already_warm=True)
    assert repr(warmed) == "WarmedDocument(3, abababababab…, 20 tokens, already warm)"
    assert repr(drystone.WarmedDocument(4, error="no", error_reason="R")) == "WarmedDocument(4, failed: no [R])"
    result = drystone.WarmResult((warmed,), 1, 0, 0, 0, ())
    assert repr(result) == "WarmResult(1 documents, 1 already warm, 0 failed, 0 tokens and 0 blocks encoded)"


def test_tenant_of_a_question_is_carried(gateway: CannedGateway) -> None:
    with Client(gateway.address) as client:
        client.generate("Why?", documents=["text"], tenant="acme")
    assert gateway.requests[0].tenant == "acme"
