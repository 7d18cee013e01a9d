"""Every way in which a call fails.

    Exception
    └── DrystoneError                reason, message, field, metadata, request_id
        ├── InvalidRequestError      the request breaks a rule: field, limit, value
        ├── NotFoundError            no such model, no such block key
        ├── OverloadedError          the server is full: retry_after, in seconds
        ├── UnavailableError         no worker for it now; the same request may succeed later
        │   └── ConnectError         no gateway answered at the address, or the connection broke
        ├── DeadlineExceededError    the request's time was up
        ├── CancelledError           the call was cancelled, by the server or from another thread
        ├── IncompatibleError        workers, or a resumed request and the model, do not match
        ├── NotSupportedError        this server or this model cannot do that
        └── InternalError            a defect of the server, or a reply that makes no sense

`reason` is stable (docs/errors.md); `message` is for people and may change.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class DrystoneError(Exception):
    """A call failed.

    Args:
        message: One sentence: what, which limit, what was given.
        reason: Stable name of the failure, such as "PROMPT_TOO_LONG"; empty when the server named none.
        field: Request field that is wrong, as a path such as "rag.documents[3].text".
        metadata: Facts for machines.
        request_id: Name of the request, when it had one.
        retry_after: Seconds after which a repeat may succeed, when the server said so.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        field: str | None = None,
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))
        self.request_id = request_id
        self.retry_after = retry_after

    def __repr__(self) -> str:
        """The class, the reason and the message."""
        return f"{type(self).__name__}({self.reason or '-'}: {self.message})"


class InvalidRequestError(DrystoneError):
    """The request breaks a rule; repeating it unchanged cannot succeed."""

    @property
    def limit(self) -> str | None:
        """The limit that was broken, as the server wrote it."""
        return self.metadata.get("limit")

    @property
    def value(self) -> str | None:
        """What was given, as the server wrote it."""
        return self.metadata.get("value")


class NotFoundError(DrystoneError):
    """No such model or block key."""


class OverloadedError(DrystoneError):
    """The server is full. `retry_after` is None when waiting cannot help."""


class UnavailableError(DrystoneError):
    """Nothing can serve the request now; the same request may succeed later."""


class ConnectError(UnavailableError):
    """No gateway answered at the address ("NO_SERVER"), or the connection broke ("CONNECTION_LOST")."""


class DeadlineExceededError(DrystoneError):
    """The request's time was up."""


class CancelledError(DrystoneError):
    """The call was cancelled, by the server or from another thread."""


class IncompatibleError(DrystoneError):
    """Workers, or a resumed request and the model, do not match."""


class NotSupportedError(DrystoneError):
    """This server or this model cannot do that."""


class InternalError(DrystoneError):
    """A defect of the server, or a reply that makes no sense."""
