"""Fetches against prefill workers that say what a test wants them to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from gateway.cluster import Cluster
from gateway.fetcher import Fetcher, FetchPolicy
from gateway.ticket import Ticket
from gateway.worker import Worker
from shared.errors import Reason
from shared.internal.v1.common_pb2 import BlockFailure, Reservation
from shared.internal.v1.decode_pb2 import GenerateRequest, Missing, MissingBlock
from shared.internal.v1.prefill_pb2 import BlockDone, EncodeBlocksRequest, EncodeBlocksResponse
from shared.internal.v1.worker_pb2 import GetInfoResponse
from tests.support.fake_workers import PREFILL, compatibility
from tests.support.stacks import until
from tests.support.tickets import ticket

Script = Callable[[EncodeBlocksRequest], AsyncIterator[EncodeBlocksResponse]]


class FakeCall:
    def __init__(self, responses: AsyncIterator[EncodeBlocksResponse]) -> None:
        self._responses = responses

    def __aiter__(self) -> AsyncIterator[EncodeBlocksResponse]:
        return self._responses

    def cancel(self) -> None:
        pass


class FakePrefill(Worker):
    """A worker whose EncodeBlocks is a script."""

    def __init__(self, name: str, script: Script) -> None:
        super().__init__(name, PREFILL, None, detail="")  # type: ignore[arg-type] # no call is made
        self.info = GetInfoResponse(compatibility=compatibility())
        self.info.worker.worker_id = name
        self.script = script
        self.asked: list[EncodeBlocksRequest] = []

    def prefill(self) -> Any:
        return self

    def EncodeBlocks(self, request: EncodeBlocksRequest) -> FakeCall:  # noqa: N802 - gRPC's name
        self.asked.append(request)
        return FakeCall(self.script(request))


def failed(key: bytes, reason: str, retry: int = 0) -> EncodeBlocksResponse:
    return EncodeBlocksResponse(failed=BlockFailure(key=key, reason=reason, message="m", retry_after_ms=retry))


def done(key: bytes) -> EncodeBlocksResponse:
    return EncodeBlocksResponse(done=BlockDone(key=key))


async def all_done(request: EncodeBlocksRequest) -> AsyncIterator[EncodeBlocksResponse]:
    for job in request.jobs:
        yield done(job.block.key)


async def full(request: EncodeBlocksRequest) -> AsyncIterator[EncodeBlocksResponse]:
    for job in request.jobs:
        yield failed(job.block.key, Reason.ENCODE_QUEUE_FULL, 700)


async def lost(request: EncodeBlocksRequest) -> AsyncIterator[EncodeBlocksResponse]:
    for job in request.jobs:
        yield failed(job.block.key, Reason.TRANSFER_FAILED)


class Run:
    """A fetcher over scripted workers, and what it told the decode worker."""

    def __init__(self, *scripts: Script, timeout: float = 5.0, attempts: int = 2, blocks: int = 1) -> None:
        cluster = Cluster("model", [], [], poll_seconds=1.0, tokenizer_fingerprint=b"")
        self.workers = [FakePrefill(f"p{number}", script) for number, script in enumerate(scripts)]
        cluster.workers = [*self.workers]
        self.sent: list[GenerateRequest] = []
        self.ticket: Ticket = ticket(*((number + 1,) for number in range(blocks)))
        self.fetcher = Fetcher(cluster, self.ticket, self.sent.append, FetchPolicy(attempts, timeout))
        self.keys = [bytes(ref.key) for ref in self.ticket.refs]
        self.fetcher.drive(
            Missing(
                blocks=[
                    MissingBlock(key=key, reservation=Reservation(reservation_id=number))
                    for number, key in enumerate(self.keys)
                ]
            )
        )

    async def idle(self) -> None:
        await until(lambda: not self.fetcher._tasks)
        assert [worker.load for worker in self.workers] == [0] * len(self.workers)

    @property
    def kinds(self) -> list[str]:
        return [str(message.WhichOneof("message")) for message in self.sent]


async def test_requests_name_the_tickets_model_and_salt() -> None:
    run = Run(all_done)
    await run.idle()
    [asked] = run.workers[0].asked
    assert asked.model_fingerprint == run.ticket.keys.model_fingerprint
    assert asked.tenant_salt == run.ticket.keys.tenant_salt == b""
    assert run.fetcher.records[run.keys[0]].done is not None
    await run.fetcher.close()


async def test_a_worker_of_another_model_is_not_asked() -> None:
    run = Run(all_done)
    await run.idle()
    assert run.workers[0].info is not None
    run.workers[0].info.compatibility.model_fingerprint = b"n" * 32
    run.fetcher.drive(Missing(blocks=[MissingBlock(key=run.keys[0])]))
    assert run.kinds == ["encode_here"]
    await run.fetcher.close()


async def test_keys_that_were_not_asked_for_and_empty_outcomes_are_ignored() -> None:
    async def odd(request: EncodeBlocksRequest) -> AsyncIterator[EncodeBlocksResponse]:
        yield done(b"unknown")
        yield failed(b"unknown", Reason.TRANSFER_FAILED)
        yield EncodeBlocksResponse()
        del request

    run = Run(odd)
    await run.idle()
    assert run.fetcher.records[run.keys[0]].failed_attempts == ["p0: ended without saying what became of it"]
    assert run.kinds == ["encode_here"]
    await run.fetcher.close()


async def test_a_defect_is_noted_and_the_next_worker_is_asked() -> None:
    async def broken(request: EncodeBlocksRequest) -> AsyncIterator[EncodeBlocksResponse]:
        del request
        raise ZeroDivisionError
        yield

    run = Run(broken, broken)
    await run.idle()
    assert len(run.fetcher.records[run.keys[0]].failed_attempts) == 2
    assert run.kinds == ["encode_here"]
    await run.fetcher.close()


async def test_a_failed_block_moves_on_before_the_rest_of_its_group() -> None:
    go = asyncio.Event()

    async def one_fails(request: EncodeBlocksRequest) -> AsyncIterator[EncodeBlocksResponse]:
        yield failed(request.jobs[0].block.key, Reason.TRANSFER_FAILED)
        await go.wait()
        for job in request.jobs[1:]:
            yield done(job.block.key)

    run = Run(one_fails, blocks=3)
    await until(lambda: run.kinds == ["encode_here"])
    assert not go.is_set()
    assert run.workers[0].load == 2
    go.set()
    await run.idle()
    assert run.kinds == ["encode_here"]
    await run.fetcher.close()


@pytest.mark.parametrize("workers", [1, 3])
async def test_when_every_queue_is_full_the_fetch_is_given_up_with_the_delay(workers: int) -> None:
    run = Run(*[full] * workers)
    await run.idle()
    [message] = run.sent
    [failure] = message.fetch_failed.failures
    assert (failure.reason, failure.retry_after_ms) == (Reason.ENCODE_QUEUE_FULL, 700)
    assert [each.reservation_id for each in message.fetch_failed.reservations] == [0]
    overload = run.fetcher.overload
    assert overload is not None
    assert (overload.reason, overload.retry_after_ms) == (Reason.ENCODE_QUEUE_FULL, 700)
    await run.fetcher.close()


async def test_one_full_queue_among_others_is_no_overload() -> None:
    for scripts, kinds in (([full, all_done], []), ([full, lost], ["encode_here"])):
        run = Run(*scripts)
        await run.idle()
        assert run.kinds == kinds
        assert run.fetcher.overload is None
        await run.fetcher.close()


async def test_a_block_said_to_be_shipped_that_never_arrives_is_encoded_by_the_decode_worker() -> None:
    run = Run(all_done, timeout=0.05)
    await run.idle()
    assert run.sent == []
    await until(lambda: run.kinds == ["encode_here"])
    await run.fetcher.close()
    run = Run(all_done, timeout=0.05)
    await run.idle()
    run.fetcher.all_arrived()
    await asyncio.sleep(0.1)
    assert run.sent == []
    await run.fetcher.close()
