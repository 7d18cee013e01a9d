"""Turns a failed RPC into one of our exceptions: status code first, google.rpc details beside it."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from drystone import _exceptions as errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.any_pb2 import Any

DOMAIN: Final = "drystone"

_S = grpc.StatusCode
_ERRORS: Mapping[grpc.StatusCode, type[errors.DrystoneError]] = MappingProxyType(
    {
        _S.INVALID_ARGUMENT: errors.InvalidRequestError,
        _S.OUT_OF_RANGE: errors.InvalidRequestError,
        _S.NOT_FOUND: errors.NotFoundError,
        _S.RESOURCE_EXHAUSTED: errors.OverloadedError,
        _S.UNAVAILABLE: errors.UnavailableError,
        _S.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
        _S.CANCELLED: errors.CancelledError,
        _S.FAILED_PRECONDITION: errors.IncompatibleError,
        _S.UNIMPLEMENTED: errors.NotSupportedError,
    }
)

# Statuses that gRPC makes on this side, with the reasons that the server would give them.
_OWN_REASONS: Final = frozenset({_S.DEADLINE_EXCEEDED, _S.CANCELLED})

# What gRPC says of calls that run when a server's grace is over.
_SERVER_STOPPED: Final = "Cancelling all calls"

_Detail = TypeVar("_Detail", bound=Message)


@dataclasses.dataclass(slots=True)
class _Details:
    """What the google.rpc details of one status say."""

    reason: str = ""
    field: str | None = None
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    request_id: str = ""
    retry_after: float | None = None


def from_rpc_error(
    error: grpc.RpcError, *, address: str, request_id: str = "", answered: bool = False
) -> errors.DrystoneError:
    """The exception for a failed call.

    Args:
        error: What grpc or grpc.aio raised.
        address: Gateway's host:port, named when it could not be reached.
        request_id: The request's name as far as the client knows it.
        answered: True when the call had already brought something.
    """
    call = cast("grpc.Call", error)
    code, message = call.code(), call.details() or ""
    details = _details(call)
    kind = _ERRORS.get(code, errors.InternalError)
    if not details.reason:
        # Without our ErrorInfo the failure is gRPC's own: the transport's, or a limit on message size.
        if _SERVER_STOPPED in message or (code is _S.UNAVAILABLE and answered):
            kind, details.reason = errors.ConnectError, "CONNECTION_LOST"
            message = f"the gateway at {address} went away"
        elif code is _S.UNAVAILABLE:
            kind, details.reason = errors.ConnectError, "NO_SERVER"
            message = f"no Drystone gateway at {address}: {message}"
        elif code in _OWN_REASONS:
            details.reason = code.name
        elif code is _S.RESOURCE_EXHAUSTED and "larger than max" in message:
            kind = errors.InvalidRequestError
    return kind(
        message or code.name,
        reason=details.reason,
        field=details.field,
        metadata=details.metadata,
        request_id=details.request_id or request_id,
        retry_after=details.retry_after,
    )


def _details(call: grpc.Call) -> _Details:
    found = _Details()
    for packed in _packed_details(call):
        if (info := _unpack(packed, error_details_pb2.ErrorInfo)) and info.domain == DOMAIN:
            found.reason = info.reason
            found.metadata = dict(info.metadata)
        elif (bad := _unpack(packed, error_details_pb2.BadRequest)) and bad.field_violations:
            found.field = bad.field_violations[0].field
        elif retry := _unpack(packed, error_details_pb2.RetryInfo):
            found.retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif request := _unpack(packed, error_details_pb2.RequestInfo):
            found.request_id = request.request_id
    found.field = found.field or found.metadata.get("field")
    found.request_id = found.request_id or found.metadata.get("request_id", "")
    return found


def _packed_details(call: grpc.Call) -> list[Any]:
    try:
        status: status_pb2.Status | None = rpc_status.from_call(call)
    except (ValueError, DecodeError):
        # A proxy on the way rewrote the status; what it says without details still counts.
        return []
    return list(status.details) if status else []


def _unpack(packed: Any, kind: type[_Detail]) -> _Detail | None:
    if packed.TypeName() != kind.DESCRIPTOR.full_name:
        return None
    detail = kind()
    packed.Unpack(detail)
    return detail
