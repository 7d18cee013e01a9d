"""What the protocol can say and this version does not do yet."""

from collections.abc import Callable
from dataclasses import dataclass

from drystone.v1.generation_pb2 import GenerateRequest
from shared.errors import DrystoneError, Reason


@dataclass(frozen=True, slots=True)
class _NotYet:
    field: str
    asked: Callable[[GenerateRequest], bool]


# Delete a row when its field works.
_NOT_YET = (_NotYet("tenant", lambda request: bool(request.tenant)),)


def check_supported(request: GenerateRequest) -> None:
    """Refuse a valid request that asks for something not built yet.

    Raises:
        DrystoneError: NOT_SUPPORTED, naming the field.
    """
    for row in _NOT_YET:
        if row.asked(request):
            raise DrystoneError(
                Reason.NOT_SUPPORTED,
                f"{row.field}: this version does not support it; leave it out",
                field=row.field,
                metadata={"field": row.field},
            )
