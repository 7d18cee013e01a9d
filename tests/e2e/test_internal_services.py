"""What gateways say to workers, said by hand: identity, fences, health, and what is not in this version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from drystone.v1 import generation_pb2 as v1
from drystone.v1.operations_pb2 import ExplainRequest
from drystone.v1.operations_pb2_grpc import OperationsStub
from drystone.v1.sampling_pb2 import SamplingParams
from gateway.app import GatewayApp
from gateway.settings import GatewaySettings
from shared.errors import Reason
from shared.internal.v1 import decode_pb2 as decode
from shared.internal.v1 import prefill_pb2 as prefill
from shared.internal.v1.common_pb2 import BlockRef, KvEndpoint, Reservation, WorkerIdentity
from shared.internal.v1.decode_pb2_grpc import DecodeStub
from shared.internal.v1.prefill_pb2_grpc import PrefillStub
from shared.rpc.channel import open_channel
from tests.conftest import MakeFolder
from tests.support.errors import failure_of
from tests.support.stacks import Served, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


def opening(served: Served, **changed: Any) -> decode.Open:
    model = served.stack.decode_apps[0].model
    values: dict[str, Any] = {
        "request_id": "by hand",
        "question_token_ids": [5, 6],
        "sampling": SamplingParams(max_new_tokens=2, top_p=1.0, seed=1, ignore_eos=True),
        "model_fingerprint": model.fingerprint,
        "time_left_ms": 5000,
    }
    return decode.Open(**{**values, **changed})


async def session(served: Served, *messages: decode.GenerateRequest) -> list[decode.GenerateResponse]:
    """One stream to the decode worker, half-closed after these messages; everything it says."""
    channel = open_channel(served.stack.decode_apps[0].server.address)
    try:
        return [one async for one in DecodeStub(channel).Generate(iter(messages), timeout=10.0)]
    finally:
        await channel.close()


def kinds(responses: list[decode.GenerateResponse], call_id: int) -> list[str]:
    return [str(one.WhichOneof("message")) for one in responses if one.call_id == call_id]


async def test_a_half_closed_session_runs_its_calls_to_their_ends(served: Served) -> None:
    said = await session(
        served,
        decode.GenerateRequest(call_id=1, open=opening(served)),
        decode.GenerateRequest(call_id=2, open=opening(served)),
        decode.GenerateRequest(call_id=2, cancel=decode.Cancel()),
        decode.GenerateRequest(call_id=9, cancel=decode.Cancel()),
    )
    assert kinds(said, 1) == ["admitted", "tokens", "tokens", "sample_ended", "ended"]
    assert kinds(said, 2) == ["admitted"]
    await served.until_idle()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model_fingerprint": b"x" * 32}, Reason.MODEL_CHANGED),
        ({"expected_incarnation": 5}, Reason.WORKER_LOST),
        ({"question_token_ids": []}, Reason.INTERNAL),
        ({"blocks": [BlockRef(key=b"k" * 32)]}, Reason.INTERNAL),
        ({"question_token_ids": [5] * 8192}, Reason.PROMPT_TOO_LONG),
    ],
    ids=["model", "incarnation", "no question", "no tokens", "too long"],
)
async def test_a_call_that_cannot_be_opened_fails_alone(
    served: Served, changed: dict[str, Any], reason: Reason
) -> None:
    said = await session(
        served,
        decode.GenerateRequest(call_id=1, open=opening(served, **changed)),
        decode.GenerateRequest(call_id=2, open=opening(served)),
    )
    assert [one.failed.reason for one in said if one.call_id == 1] == [reason]
    assert kinds(said, 2)[-1] == "ended"


async def test_tokens_that_the_model_does_not_have_fail_their_call_alone(served: Served) -> None:
    said = await session(
        served,
        decode.GenerateRequest(call_id=1, open=opening(served, question_token_ids=[10**6])),
    )
    assert kinds(said, 1)[-1] == "failed"
    said = await session(served, decode.GenerateRequest(call_id=2, open=opening(served)))
    assert kinds(said, 2)[-1] == "ended"
    await served.until_idle()


async def encode(served: Served, job: prefill.EncodeJob, **changed: Any) -> list[prefill.EncodeBlocksResponse]:
    app = served.stack.prefill_apps[0]
    endpoint = KvEndpoint(zmq_address=served.stack.decode_apps[0]._endpoint.zmq_address)
    values = {"model_fingerprint": app.model.fingerprint, "time_left_ms": 3000, "endpoint": endpoint, **changed}
    channel = open_channel(app.server.address)
    try:
        call = PrefillStub(channel).EncodeBlocks(prefill.EncodeBlocksRequest(jobs=[job], **values), timeout=10.0)
        return [one async for one in call]
    finally:
        await channel.close()


async def test_what_a_prefill_worker_cannot_do_is_told_for_each_block(served: Served) -> None:
    keys = served.stack.prefill_apps[0].model.key_space()
    block = BlockRef(key=keys.key([5, 6, 7]), token_ids=[5, 6, 7], store=False)
    [done] = await encode(served, prefill.EncodeJob(block=block))
    assert done.done.key == block.key
    assert len(done.done.birth_id) == 16
    unknown = BlockRef(key=b"u" * 32)
    [failed] = await encode(served, prefill.EncodeJob(block=unknown))
    assert failed.failed.reason == Reason.UNKNOWN_BLOCK_KEY
    worker = served.stack.decode_apps[0].identity
    for reservation, reason in (
        (Reservation(worker=worker, reservation_id=10**6, epoch=1), Reason.RESERVATION_ENDED),
        (Reservation(worker=WorkerIdentity(incarnation=3), reservation_id=1, epoch=1), Reason.TRANSFER_FAILED),
    ):
        [failed] = await encode(served, prefill.EncodeJob(block=block, reservation=reservation))
        assert failed.failed.reason == reason, failed
        assert failed.failed.key == block.key
    failure = await failure_of(encode(served, prefill.EncodeJob(block=block), model_fingerprint=b"x" * 32))
    assert failure.reason == Reason.MODEL_CHANGED
    for wrong, reason in (
        (BlockRef(key=keys.key([10**6]), token_ids=[10**6]), Reason.INCOMPATIBLE_WORKERS),
        (BlockRef(key=b"v" * 32, token_ids=[5, 6, 7]), Reason.INTERNAL),
    ):
        [failed] = await encode(served, prefill.EncodeJob(block=wrong))
        assert failed.failed.reason == reason
    await served.until_idle()


async def test_what_is_not_in_this_version_says_so(served: Served) -> None:
    failure = await failure_of(OperationsStub(served.channel).Explain(ExplainRequest()))
    assert failure.code is grpc.StatusCode.UNIMPLEMENTED
    assert failure.reason == Reason.NOT_SUPPORTED


async def test_the_model_describes_itself(served: Served) -> None:
    model = await served.client.model()
    shape = served.stack.decode_apps[0].model.geometry.shape
    assert (model.name, model.dtype, model.context_tokens) == ("model", "float32", 8192)
    assert model.kv_bytes_per_token == shape.token_bytes
    assert len(model.fingerprint) == 64
    failure = await failure_of(served.raw.GetModel(v1.GetModelRequest(model="other")))
    assert failure.reason == Reason.UNKNOWN_MODEL


async def health(address: str, service: str = "") -> str:
    async with grpc.aio.insecure_channel(address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


async def test_health_and_reflection_on_every_server(served: Served) -> None:
    stack = served.stack
    assert stack.gateway_app is not None
    servers = {
        stack.gateway_app.server.address: "drystone.v1.Generation",
        stack.decode_apps[0].server.address: "drystone.internal.v1.Decode",
        stack.prefill_apps[0].server.address: "drystone.internal.v1.Prefill",
    }

    async def listing() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    for address, service in servers.items():
        for name in ("", service):
            assert await health(address, name) == "SERVING"
        async with grpc.aio.insecure_channel(address) as channel:
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(listing())
            [answer] = [one async for one in call]
            assert service in [one.name for one in answer.list_services_response.service]


async def test_a_gateway_without_a_decode_worker_is_not_ready_and_says_why(tiny_folder: MakeFolder) -> None:
    settings = GatewaySettings(decode_workers=["127.0.0.1:1"], poll_seconds=0.2)
    gateway = await asyncio.to_thread(GatewayApp, settings, tiny_folder(), "model")
    address = (await gateway.start())["grpc_address"]
    channel = open_channel(address)
    try:
        assert await health(address) == "NOT_SERVING"
        from drystone.v1.generation_pb2_grpc import GenerationStub

        request = v1.GenerateRequest(blocks={"blocks": [{"text": "a"}, {"text": "b"}]})

        async def ask() -> None:
            async for _ in GenerationStub(channel).Generate(request, timeout=5.0):
                pass

        failure = await failure_of(ask())
        assert failure.code is grpc.StatusCode.UNAVAILABLE
        assert failure.reason == Reason.NO_DECODE_WORKER
        assert "127.0.0.1:1: does not answer" in failure.message
        assert failure.retry_ms == 1000
        await until(lambda: gateway.generation.running == 0)
    finally:
        await channel.close()
        await gateway.stop(0.0)
