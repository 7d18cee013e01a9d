"""How a transfer fails: the block was refused, its source gave out, or the pair makes no progress."""

from __future__ import annotations

from types import MappingProxyType

from shared.enums import enum_name
from shared.errors import DrystoneError, Reason
from shared.internal.v1.transfer_pb2 import RefusalReason

_R = RefusalReason
_ENDED = frozenset({_R.REFUSAL_REASON_UNKNOWN_RESERVATION, _R.REFUSAL_REASON_STALE_EPOCH, _R.REFUSAL_REASON_BIRTH})
_PAIR = MappingProxyType({_R.REFUSAL_REASON_INCOMPATIBLE: Reason.INCOMPATIBLE_WORKERS})


class LinkBrokenError(DrystoneError):
    """The pair makes no progress: whatever runs on its link must be begun anew on another."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.TRANSFER_FAILED, message)


class SourceLostError(DrystoneError):
    """The encoding that was being shipped failed; another may follow, with another birth."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.BLOCK_UNAVAILABLE, message)


def refusal_name(reason: RefusalReason.ValueType) -> str:
    """As in documents and labels: CHECKSUM, STALE_EPOCH."""
    return enum_name(RefusalReason, reason).removeprefix("REFUSAL_REASON_")


def refused_block(reason: RefusalReason.ValueType, message: str) -> DrystoneError:
    """The receiver will not take this block; the link is sound."""
    name = refusal_name(reason)
    kind = Reason.RESERVATION_ENDED if reason in _ENDED else Reason.TRANSFER_FAILED
    return DrystoneError(kind, f"the decode worker refused a block: {name}: {message}", metadata={"refusal": name})


def refused_pair(worker_id: str, reason: RefusalReason.ValueType, message: str, field: str) -> DrystoneError:
    """The receiver will not have this sender at all."""
    return DrystoneError(
        _PAIR.get(reason, Reason.TRANSFER_FAILED),
        f"decode worker {worker_id} refused the link: {refusal_name(reason)}: {message}",
        metadata={"field": field},
    )
