"""Every way in which Drystone says no, in one registry.

    Exception
    └── DrystoneError            reason, message, field violations, metadata, retry delay
        └── InvalidRequestError       a DrystoneError that names one field, its limit and the value given

A reason is stable: clients and dashboards may rely on it. `docs/errors.md` mirrors `REASONS`
(a test holds them equal). `shared.rpc.errors` turns these into gRPC statuses with google.rpc details.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from types import MappingProxyType

import grpc


class Reason(StrEnum):
    """Stable reason of an error, as ErrorInfo.reason carries it."""

    @staticmethod
    def _generate_next_value_(name: str, *_: object) -> str:
        return name

    MALFORMED_REQUEST = auto()
    EMPTY_PROMPT = auto()
    NO_DOCUMENTS = auto()
    EMPTY_DOCUMENT = auto()
    DOCUMENT_TOO_LARGE = auto()
    TOO_MANY_DOCUMENTS = auto()
    PROMPT_TOO_LONG = auto()
    INVALID_UTF8 = auto()
    INVALID_SAMPLING = auto()
    TOO_MANY_STOP_STRINGS = auto()
    INVALID_STRUCTURED_OUTPUT = auto()
    INVALID_TEMPLATE = auto()
    INVALID_FIELD = auto()
    INVALID_BLOCK_KEY = auto()
    UNKNOWN_MODEL = auto()
    UNKNOWN_BLOCK_KEY = auto()
    TOO_MANY_REQUESTS = auto()
    REQUEST_TOO_LARGE_FOR_POOL = auto()
    ENCODE_QUEUE_FULL = auto()
    RECORDS_FULL = auto()
    NO_DECODE_WORKER = auto()
    NO_PREFILL_WORKER = auto()
    WORKER_LOST = auto()
    BLOCK_UNAVAILABLE = auto()
    TRANSFER_FAILED = auto()
    KV_KEY_REFUSED = auto()
    RESERVATION_ENDED = auto()
    INCOMPATIBLE_WORKERS = auto()
    MODEL_CHANGED = auto()
    DEADLINE_EXCEEDED = auto()
    CANCELLED = auto()
    DRAINING = auto()
    NOT_SUPPORTED = auto()
    INTERNAL = auto()


@dataclass(frozen=True, slots=True)
class ReasonRow:
    """One row of docs/errors.md."""

    status: grpc.StatusCode
    retryable: bool
    meaning: str


def _row(status: grpc.StatusCode, meaning: str, *, retryable: bool = False) -> ReasonRow:
    return ReasonRow(status, retryable, meaning)


_S = grpc.StatusCode
REASONS: Mapping[Reason, ReasonRow] = MappingProxyType(
    {
        Reason.MALFORMED_REQUEST: _row(_S.INVALID_ARGUMENT, "The message could not be decoded."),
        Reason.EMPTY_PROMPT: _row(_S.INVALID_ARGUMENT, "No prompt, or nothing in it that the model could answer."),
        Reason.NO_DOCUMENTS: _row(_S.INVALID_ARGUMENT, "A `rag` prompt without documents."),
        Reason.EMPTY_DOCUMENT: _row(_S.INVALID_ARGUMENT, "A document or block without content."),
        Reason.DOCUMENT_TOO_LARGE: _row(_S.INVALID_ARGUMENT, "A text is longer than the server allows."),
        Reason.TOO_MANY_DOCUMENTS: _row(_S.INVALID_ARGUMENT, "More documents, blocks or messages than allowed."),
        Reason.PROMPT_TOO_LONG: _row(_S.INVALID_ARGUMENT, "Prompt and answer do not fit the context."),
        Reason.INVALID_UTF8: _row(_S.INVALID_ARGUMENT, "A text field holds bytes that are not UTF-8."),
        Reason.INVALID_SAMPLING: _row(_S.INVALID_ARGUMENT, "A sampling value is out of range or not a number."),
        Reason.TOO_MANY_STOP_STRINGS: _row(_S.INVALID_ARGUMENT, "More stop strings than allowed."),
        Reason.INVALID_STRUCTURED_OUTPUT: _row(
            _S.INVALID_ARGUMENT, "A structured output that is not valid, too complex, or leaves nothing to say."
        ),
        Reason.INVALID_TEMPLATE: _row(_S.INVALID_ARGUMENT, "Template unknown, or it cannot render this prompt."),
        Reason.INVALID_FIELD: _row(_S.INVALID_ARGUMENT, "Another field is out of range; the message names it."),
        Reason.INVALID_BLOCK_KEY: _row(_S.INVALID_ARGUMENT, "A block key that is not 64 hexadecimal digits."),
        Reason.UNKNOWN_MODEL: _row(_S.NOT_FOUND, "No worker serves a model of this name."),
        Reason.UNKNOWN_BLOCK_KEY: _row(_S.NOT_FOUND, "No worker knows this block key."),
        Reason.TOO_MANY_REQUESTS: _row(
            _S.RESOURCE_EXHAUSTED, "The server is full; try again after the delay given.", retryable=True
        ),
        Reason.REQUEST_TOO_LARGE_FOR_POOL: _row(
            _S.RESOURCE_EXHAUSTED, "The request needs more KV memory than the decode worker has in all."
        ),
        Reason.ENCODE_QUEUE_FULL: _row(
            _S.RESOURCE_EXHAUSTED, "The prefill worker's queue is full; try again.", retryable=True
        ),
        Reason.RECORDS_FULL: _row(
            _S.RESOURCE_EXHAUSTED, "The prefill worker keeps as many records of warmed documents as it may."
        ),
        Reason.NO_DECODE_WORKER: _row(_S.UNAVAILABLE, "No decode worker is ready.", retryable=True),
        Reason.NO_PREFILL_WORKER: _row(_S.UNAVAILABLE, "No prefill worker is ready.", retryable=True),
        Reason.WORKER_LOST: _row(_S.UNAVAILABLE, "The worker that ran the request is gone.", retryable=True),
        Reason.BLOCK_UNAVAILABLE: _row(_S.UNAVAILABLE, "A block could be had from nowhere.", retryable=True),
        Reason.TRANSFER_FAILED: _row(_S.UNAVAILABLE, "A block could not be shipped in time.", retryable=True),
        Reason.KV_KEY_REFUSED: _row(
            _S.FAILED_PRECONDITION,
            "A prefill worker may not send to a decode worker: a key is missing, wrong or not allowed.",
        ),
        Reason.RESERVATION_ENDED: _row(
            _S.ABORTED,
            "A block was shipped for a reservation that is no longer open: taken back, or filled by another.",
        ),
        Reason.INCOMPATIBLE_WORKERS: _row(
            _S.FAILED_PRECONDITION, "Two workers differ in a field that their KV depends on; the message names it."
        ),
        Reason.MODEL_CHANGED: _row(
            _S.FAILED_PRECONDITION, "The model served now is not the one that the request was made for."
        ),
        Reason.DEADLINE_EXCEEDED: _row(_S.DEADLINE_EXCEEDED, "The request's time was up."),
        Reason.CANCELLED: _row(_S.CANCELLED, "The caller cancelled."),
        Reason.DRAINING: _row(_S.UNAVAILABLE, "The process is about to stop and takes nothing new.", retryable=True),
        Reason.NOT_SUPPORTED: _row(_S.UNIMPLEMENTED, "This version or this model cannot do that."),
        Reason.INTERNAL: _row(_S.INTERNAL, "A defect of Drystone; the log has the request id."),
    }
)


class DrystoneError(Exception):
    """An error with a stable reason.

    Args:
        reason: Row of `REASONS`.
        message: One sentence: what, which limit, what was given, what to do.
        field: Request field that is wrong, as a path such as `rag.documents[3].text`.
        metadata: Facts for machines, such as `limit` and `value`.
        retry_after_ms: Milliseconds after which a repeat may succeed.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.metadata = {**({} if field is None else {"field": field}), **(metadata or {})}
        self.retry_after_ms = retry_after_ms

    @property
    def status(self) -> grpc.StatusCode:
        """GRPC status that the reason maps to."""
        return REASONS[self.reason].status

    @property
    def retryable(self) -> bool:
        """True when the same request may succeed later."""
        return REASONS[self.reason].retryable


class InvalidRequestError(DrystoneError):
    """One field breaks one rule; says the field, the limit and the value given."""

    def __init__(self, reason: Reason, field: str, problem: str, *, limit: object = None, value: object = None) -> None:
        facts = {name: str(fact) for name, fact in (("limit", limit), ("value", value)) if fact is not None}
        said = "".join(f"; {name} {fact}" for name, fact in facts.items())
        super().__init__(reason, f"{field}: {problem}{said}", field=field, metadata={"field": field, **facts})


def deadline_exceeded(what: str) -> DrystoneError:
    """The request's time was up while it waited for `what`."""
    return DrystoneError(Reason.DEADLINE_EXCEEDED, f"deadline passed while {what}", metadata={"while": what})


def not_in_this_version(call: str) -> DrystoneError:
    """A call whose shape is fixed and whose work comes with a later version."""
    return DrystoneError(Reason.NOT_SUPPORTED, f"{call} is not in this version of Drystone; see CHANGELOG.md")
