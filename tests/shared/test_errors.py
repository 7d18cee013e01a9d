"""The registry of reasons, its documentation, and errors on their way through gRPC."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from shared.errors import REASONS, DrystoneError, InvalidRequestError, Reason, deadline_exceeded, not_in_this_version
from shared.rpc.errors import ErrorInterceptor, from_rpc_error
from shared.status import FIGURES, status_values
from tests.support.errors import failure_of

DOCS = Path(__file__).parents[2] / "docs"


def test_every_reason_has_a_row_and_a_name_of_its_own() -> None:
    assert set(REASONS) == set(Reason)
    for reason in Reason:
        assert reason.value == reason.name
        assert re.fullmatch(r"[A-Z][A-Z0-9_]+", reason)
        assert REASONS[reason].meaning.endswith(".")
        assert REASONS[reason].status is not grpc.StatusCode.OK


def test_retryable_ones_are_those_that_time_can_heal() -> None:
    healing = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
    for reason, row in REASONS.items():
        assert not row.retryable or row.status in healing, reason
        assert row.status is not grpc.StatusCode.UNAVAILABLE or row.retryable, reason


@pytest.mark.skipif(not (DOCS / "errors.md").exists(), reason="docs/errors.md has not been written yet")
def test_docs_have_every_reason() -> None:
    documented = set(re.findall(r"^\| `([A-Z0-9_]+)` \|", (DOCS / "errors.md").read_text(), re.MULTILINE))
    assert documented == set(Reason)


def test_figures_are_registered() -> None:
    assert [(value.name, value.value) for value in status_values(num_requests_running=2)] == [
        ("num_requests_running", 2.0)
    ]
    with pytest.raises(KeyError):
        status_values(unheard_of=1)
    for name, meaning in FIGURES.items():
        assert re.fullmatch(r"[a-z_]+", name)
        assert meaning.endswith(".")


def test_an_invalid_request_says_field_limit_and_value() -> None:
    error = InvalidRequestError(Reason.INVALID_FIELD, "a.b[3]", "is too long", limit=5, value=7)
    assert str(error) == "a.b[3]: is too long; limit 5; value 7"
    assert error.metadata == {"field": "a.b[3]", "limit": "5", "value": "7"}
    assert error.field == "a.b[3]"
    assert not error.retryable
    assert deadline_exceeded("waiting").metadata == {"while": "waiting"}
    assert not_in_this_version("Warm").status is grpc.StatusCode.UNIMPLEMENTED


class Behaviours:
    """Handlers that raise what a test puts there."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.closed = 0
        self.delay = 0.0

    async def unary(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        del context
        await asyncio.sleep(self.delay)
        if self.error:
            raise self.error
        return request

    async def stream(self, request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        del context
        try:
            yield request
            if self.error:
                raise self.error
        finally:
            self.closed += 1

    async def both(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        del context
        async for request in requests:
            yield request


def decode(raw: bytes) -> bytes:
    if raw.startswith(b"bad"):
        raise ValueError("not a message")
    return raw


@pytest.fixture
async def behaviours() -> Behaviours:
    return Behaviours()


@pytest.fixture
async def channel(behaviours: Behaviours) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[ErrorInterceptor()])
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(behaviours.unary, decode),
        "Stream": grpc.unary_stream_rpc_method_handler(behaviours.stream, decode),
        "Both": grpc.stream_stream_rpc_method_handler(behaviours.both, decode),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("drystone.Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


async def unary(channel: grpc.aio.Channel, raw: bytes = b"good") -> bytes:
    return bytes(await channel.unary_unary("/drystone.Test/Unary")(raw))


async def stream(channel: grpc.aio.Channel, raw: bytes = b"good") -> list[bytes]:
    return [one async for one in channel.unary_stream("/drystone.Test/Stream")(raw)]


async def both(channel: grpc.aio.Channel, raw: bytes = b"good") -> list[bytes]:
    return [one async for one in channel.stream_stream("/drystone.Test/Both")(iter([b"good", raw]))]


@pytest.mark.parametrize("call", [unary, stream, both])
async def test_bytes_that_are_no_message(channel: grpc.aio.Channel, call: Any) -> None:
    failure = await failure_of(call(channel, b"bad"))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.reason == Reason.MALFORMED_REQUEST
    assert "not a message" in failure.message
    assert await call(channel)


@pytest.mark.parametrize("call", [unary, stream])
async def test_a_defect_is_internal_tells_nothing_and_harms_nobody(
    channel: grpc.aio.Channel, behaviours: Behaviours, call: Any
) -> None:
    behaviours.error = KeyError("secret of the server")
    failure = await failure_of(call(channel))
    assert failure.code is grpc.StatusCode.INTERNAL
    assert failure.reason == Reason.INTERNAL
    assert "secret" not in failure.message
    behaviours.error = None
    assert await call(channel)


@pytest.mark.parametrize("call", [unary, stream])
async def test_our_errors_arrive_whole(channel: grpc.aio.Channel, behaviours: Behaviours, call: Any) -> None:
    behaviours.error = DrystoneError(
        Reason.TOO_MANY_REQUESTS, "full; später", field="a.b", metadata={"limit": "3"}, retry_after_ms=1500
    )
    failure = await failure_of(call(channel))
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (failure.reason, failure.message) == (Reason.TOO_MANY_REQUESTS, "full; später")
    assert failure.metadata == {"field": "a.b", "limit": "3"}
    assert failure.fields == ("a.b",)
    assert failure.retry_ms == 1500
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel)
    back = from_rpc_error(caught.value, Reason.WORKER_LOST)
    original = behaviours.error
    assert isinstance(original, DrystoneError)
    for name in ("reason", "message", "field", "metadata", "retry_after_ms"):
        assert getattr(back, name) == getattr(original, name)


async def test_a_timeout_is_a_deadline(channel: grpc.aio.Channel, behaviours: Behaviours) -> None:
    behaviours.error = TimeoutError()
    assert (await failure_of(unary(channel))).code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_stream_that_is_left_is_closed_on_the_server(channel: grpc.aio.Channel, behaviours: Behaviours) -> None:
    from tests.support.stacks import until

    call = channel.unary_stream("/drystone.Test/Stream")(b"good")
    await call.read()
    call.cancel()
    await until(lambda: behaviours.closed == 1)


async def test_errors_that_are_not_ours_get_the_reason_of_the_place(
    channel: grpc.aio.Channel, behaviours: Behaviours
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/drystone.Test/Levitate")(b"")
    assert from_rpc_error(caught.value, Reason.WORKER_LOST).reason is Reason.WORKER_LOST
    behaviours.delay = 5.0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/drystone.Test/Unary")(b"", timeout=0.05)
    assert from_rpc_error(caught.value, Reason.WORKER_LOST).reason is Reason.DEADLINE_EXCEEDED
