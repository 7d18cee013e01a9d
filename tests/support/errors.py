"""A failed call taken apart: status code and google.rpc details."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclass(frozen=True, slots=True)
class Failure:
    """What a client sees of a failed call."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    fields: tuple[str, ...] = ()
    retry_ms: int | None = None


def taken_apart(error: grpc.aio.AioRpcError) -> Failure:
    """The status of a failed call with its details."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type] # it only needs metadata, code and details
    reason, metadata, fields, retry_ms = "", dict[str, str](), tuple[str, ...](), None
    for detail in status.details if status is not None else ():
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "drystone"
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            fields = tuple(violation.field for violation in bad.field_violations)
        elif detail.Unpack(retry):
            retry_ms = retry.retry_delay.ToMilliseconds()
    return Failure(error.code(), error.details() or "", reason, metadata, fields, retry_ms)


async def failure_of(call: Awaitable[object]) -> Failure:
    """Awaits a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return taken_apart(caught.value)
