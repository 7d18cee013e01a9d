"""Errors of real services: bytes that are no message, defects, and statuses that fit gRPC's metadata."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from shared.errors import DrystoneError, InvalidRequestError, Reason
from shared.internal.v1 import worker_pb2 as pb
from shared.internal.v1.worker_pb2_grpc import WorkerServicer, WorkerStub, add_WorkerServicer_to_server
from shared.rpc.channel import open_channel
from shared.rpc.errors import to_status
from shared.rpc.server import RpcServer
from shared.settings import ProcessSettings
from tests.support.errors import failure_of

SERVICE = pb.DESCRIPTOR.services_by_name["Worker"].full_name
Context = grpc.aio.ServicerContext[object, object]


class Handler(WorkerServicer):
    """Raises what a test puts there."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse:  # noqa: N802 - gRPC's name
        del request, context
        if self.error:
            raise self.error
        return pb.GetInfoResponse(model="m")

    async def WatchBlocks(  # noqa: N802 - gRPC's name
        self, request: pb.WatchBlocksRequest, context: Context
    ) -> AsyncIterator[pb.WatchBlocksResponse]:
        del context
        yield pb.WatchBlocksResponse(sequence=request.after_sequence)
        if self.error:
            raise self.error


@pytest.fixture
async def handler() -> Handler:
    return Handler()


@pytest.fixture
async def channel(handler: Handler) -> AsyncIterator[grpc.aio.Channel]:
    server = RpcServer(ProcessSettings(), lambda to: add_WorkerServicer_to_server(handler, to), [SERVICE])
    async with open_channel(await server.start()) as channel:
        yield channel
    await server.stop(0)


@pytest.mark.parametrize("raw", [b"\xff", b"\x0a\x05ab", b"\x08", b"\x0b" * 200])
async def test_malformed_bytes_are_the_callers_fault(channel: grpc.aio.Channel, raw: bytes) -> None:
    stream = channel.unary_stream(f"/{SERVICE}/WatchBlocks")(raw)
    for call in (channel.unary_unary(f"/{SERVICE}/GetInfo")(raw), stream.read()):
        failure = await failure_of(call)
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
        assert failure.reason == Reason.MALFORMED_REQUEST
    assert (await WorkerStub(channel).GetInfo(pb.GetInfoRequest())).model == "m"


async def test_a_defect_is_internal_and_the_next_call_works(channel: grpc.aio.Channel, handler: Handler) -> None:
    stub = WorkerStub(channel)
    handler.error = ZeroDivisionError("inner details")
    failure = await failure_of(stub.GetInfo(pb.GetInfoRequest()))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, Reason.INTERNAL)
    assert "inner" not in failure.message
    stream = stub.WatchBlocks(pb.WatchBlocksRequest(after_sequence=3))
    assert (await stream.read()).sequence == 3
    failure = await failure_of(stream.read())
    assert failure.reason == Reason.INTERNAL
    handler.error = None
    assert (await stub.GetInfo(pb.GetInfoRequest())).model == "m"


@pytest.mark.parametrize("character", ["x", "ä", "石", "🪨", "\n"])
@pytest.mark.parametrize("length", [200, 1000, 4000, 100_000])
async def test_an_error_of_any_length_arrives_as_itself(
    channel: grpc.aio.Channel, handler: Handler, character: str, length: int
) -> None:
    text = character * length
    handler.error = InvalidRequestError(Reason.INVALID_TEMPLATE, "template.name", "is not known", value=text)
    failure = await failure_of(WorkerStub(channel).GetInfo(pb.GetInfoRequest()))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_TEMPLATE)
    assert failure.fields == ("template.name",)
    assert failure.message.startswith("template.name: is not known; value ")
    assert text.startswith(failure.metadata["value"].removesuffix("…"))


def test_short_errors_are_not_clipped() -> None:
    status = to_status(DrystoneError(Reason.INTERNAL, "m" * 300, metadata={"a": "b" * 300}))
    assert status.message == "m" * 300
    status = to_status(DrystoneError(Reason.INTERNAL, "m" * 301))
    assert status.message == "m" * 299 + "…"
    assert len(to_status(DrystoneError(Reason.INTERNAL, "石" * 300)).message.encode()) <= 600


async def test_a_service_that_is_not_there_is_grpcs_own_matter(channel: grpc.aio.Channel) -> None:
    failure = await failure_of(channel.unary_unary("/drystone.internal.v1.Nobody/Home")(b""))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNIMPLEMENTED, "")
