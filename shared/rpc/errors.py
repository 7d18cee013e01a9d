"""Exceptions to gRPC statuses with google.rpc details, in one interceptor, and back again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from shared import logs
from shared.errors import DrystoneError, Reason

DOMAIN = "drystone"
# A status travels in trailing metadata, of which gRPC takes 8 KiB: a longer one would arrive as another error. The
# message is in it three times, once with three characters for each byte that is not ASCII.
_CHARACTERS = 300
_MESSAGE_BYTES = 600
_FACT_BYTES = 300
_FACTS = 8


def to_status(error: DrystoneError) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo, and BadRequest or RetryInfo where they apply."""
    message = _clipped(error.message, _MESSAGE_BYTES)
    facts = {name: _clipped(fact, _FACT_BYTES) for name, fact in list(error.metadata.items())[:_FACTS]}
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=facts)]
    packed = [_packed(detail) for detail in details]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_clipped(error.field, _FACT_BYTES), description=message
        )
        packed.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        packed.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=error.status.value[0], message=message, details=packed)


def from_rpc_error(error: grpc.aio.AioRpcError, otherwise: Reason) -> DrystoneError:
    """The DrystoneError that a peer raised; `otherwise` when the status carries no reason of ours."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    reason, metadata, retry_ms, field = otherwise, dict[str, str](), None, None
    for detail in status.details if status is not None else ():
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in Reason.__members__:
            reason, metadata = Reason(info.reason), dict(info.metadata)
        elif detail.Unpack(retry):
            retry_ms = retry.retry_delay.ToMilliseconds()
    if reason is otherwise and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        reason = Reason.DEADLINE_EXCEEDED
    field = metadata.get("field")
    return DrystoneError(
        reason, error.details() or error.code().name, field=field, metadata=metadata, retry_after_ms=retry_ms
    )


def _clipped(text: str, most: int) -> str:
    """At most 300 characters and `most` bytes of UTF-8."""
    raw = text[: _CHARACTERS + 1].encode("utf-8", "replace")
    if len(text) <= _CHARACTERS and len(raw) <= most:
        return text
    return raw[: most - 3].decode("utf-8", "ignore")[: _CHARACTERS - 1] + "…"


def _packed(detail: Any) -> any_pb2.Any:
    holder = any_pb2.Any()
    holder.Pack(detail)
    return holder


class _Malformed:
    """Stands in for a message that could not be decoded, until the handler's wrapper refuses it."""

    def __init__(self, why: str) -> None:
        self.why = why


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns every exception of a handler into a status. What is not a DrystoneError is a defect: INTERNAL, logged."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler found for a call."""
        # The stubs describe the handlers of synchronous servers.
        handler: Any = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/drystone."):
            return handler
        method = handler_call_details.method
        decode = _tolerant(handler.request_deserializer)
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                _streaming(handler.stream_stream, method, _each_accepted), decode, handler.response_serializer
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _streaming(handler.unary_stream, method, _accepted), decode, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _unary(handler.unary_unary, method), decode, handler.response_serializer
        )


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception as error:  # noqa: BLE001 - protobuf raises its own, unexported, types
            return _Malformed(str(error))

    return decode


def _unary(behaviour: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(_accepted(request), context)
        except Exception as error:  # noqa: BLE001 - the one place where every error becomes a status
            await _abort(context, error, method)

    return call


def _streaming(
    behaviour: Callable[..., AsyncGenerator[Any]], method: str, accepted: Callable[[Any], Any]
) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            # A client that went away ends this generator; the handler's own cleanup must run now.
            async with contextlib.aclosing(behaviour(accepted(request), context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:  # noqa: BLE001 - the one place where every error becomes a status
            await _abort(context, error, method)

    return call


def _accepted(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise DrystoneError(Reason.MALFORMED_REQUEST, f"the request message cannot be decoded: {request.why}")
    return request


async def _each_accepted(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _accepted(request)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, asyncio.TimeoutError):
        error = DrystoneError(Reason.DEADLINE_EXCEEDED, "the request's time was up")
    if not isinstance(error, DrystoneError):
        logs.get("rpc").error("defect", method=method, exc_info=error)
        error = DrystoneError(Reason.INTERNAL, "internal error; the server's log has it under this request's id")
    await context.abort_with_status(rpc_status.to_status(to_status(error)))
    raise AssertionError(code_pb2.INTERNAL)  # abort_with_status raises
