"""What the protocol can say and this version does not do yet."""

from collections.abc import Callable
from dataclasses import dataclass

from drystone.v1.generation_pb2 import GenerateRequest
from shared.errors import DrystoneError, Reason


@dataclass(frozen=True, slots=True)
class _NotYet:
    field: str
    asked: Callable[[GenerateRequest], bool]


def _differs(name: str, neutral: float) -> Callable[[GenerateRequest], bool]:
    def asked(request: GenerateRequest) -> bool:
        sampling = request.sampling
        return sampling.HasField(name) and getattr(sampling, name) != neutral  # type: ignore[arg-type] # a field by name

    return asked


# Delete a row when its field works.
_NOT_YET = (
    _NotYet("n", lambda request: request.n > 1),
    _NotYet("structured_output", lambda request: request.HasField("structured_output")),
    _NotYet("resume", lambda request: request.HasField("resume")),
    _NotYet("keep_tail", lambda request: request.keep_tail),
    _NotYet("tenant", lambda request: bool(request.tenant)),
    _NotYet("sampling.logprobs", lambda request: request.sampling.HasField("logprobs")),
    _NotYet("sampling.repetition_penalty", _differs("repetition_penalty", 1.0)),
    _NotYet("sampling.presence_penalty", _differs("presence_penalty", 0.0)),
    _NotYet("sampling.frequency_penalty", _differs("frequency_penalty", 0.0)),
    _NotYet("sampling.logit_bias", lambda request: bool(request.sampling.logit_bias)),
)


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
