"""Rules on `sampling`: one row each, so that each has one error."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from drystone.v1.sampling_pb2 import SamplingParams
from gateway.prompt.limits import PromptLimits
from gateway.prompt.sampling import max_new_tokens
from shared.errors import InvalidRequestError, Reason


@dataclass(frozen=True, slots=True)
class _Number:
    """A number that, when given, must pass a test."""

    field: str
    allows: Callable[[float], bool]
    must: str
    limit: str


# NaN fails every comparison, so only the tests without bounds name it.
_NUMBERS = (
    _Number("max_new_tokens", lambda value: value >= 1, "must be at least 1", ">= 1"),
    _Number("temperature", lambda value: 0 <= value < math.inf, "must be finite and not negative", ">= 0"),
    _Number("top_p", lambda value: 0 < value <= 1, "must be above 0 and at most 1", "(0, 1]"),
    _Number("min_p", lambda value: 0 <= value <= 1, "must be from 0 to 1", "[0, 1]"),
    _Number("repetition_penalty", lambda value: 0 < value < math.inf, "must be finite and above 0", "> 0"),
    _Number("presence_penalty", math.isfinite, "must be a finite number", "finite"),
    _Number("frequency_penalty", math.isfinite, "must be a finite number", "finite"),
)


def check_sampling(sampling: SamplingParams, limits: PromptLimits) -> None:
    """Refuse values out of range.

    Raises:
        InvalidRequestError: The first rule that is broken.
    """
    for rule in _NUMBERS:
        value = getattr(sampling, rule.field)
        if sampling.HasField(rule.field) and not rule.allows(value):  # type: ignore[arg-type] # a field by name
            raise InvalidRequestError(
                Reason.INVALID_SAMPLING, f"sampling.{rule.field}", rule.must, limit=rule.limit, value=value
            )
    if sampling.top_k > limits.max_top_k:
        raise _beyond("top_k", "is too large", limits.max_top_k, sampling.top_k)
    if sampling.logprobs > limits.max_logprobs:
        raise _beyond("logprobs", "asks for too many alternatives", limits.max_logprobs, sampling.logprobs)
    if sampling.min_new_tokens > max_new_tokens(sampling):
        most = max_new_tokens(sampling)
        raise _beyond("min_new_tokens", "is above max_new_tokens", most, sampling.min_new_tokens)
    _check_stops(sampling.stop, limits)
    if len(sampling.stop_token_ids) > limits.max_stop_token_ids:
        count = len(sampling.stop_token_ids)
        raise _beyond("stop_token_ids", "has too many entries", limits.max_stop_token_ids, count)
    if len(sampling.logit_bias) > limits.max_logit_bias:
        raise _beyond("logit_bias", "has too many entries", limits.max_logit_bias, len(sampling.logit_bias))
    for token_id, bias in sampling.logit_bias.items():
        if not math.isfinite(bias):
            raise _beyond(f"logit_bias[{token_id}]", "must be a finite number", "finite", bias)


def _check_stops(stops: Iterable[str], limits: PromptLimits) -> None:
    stops = list(stops)
    if len(stops) > limits.max_stop_strings:
        raise InvalidRequestError(
            Reason.TOO_MANY_STOP_STRINGS,
            "sampling.stop",
            "has too many strings",
            limit=limits.max_stop_strings,
            value=len(stops),
        )
    for index, stop in enumerate(stops):
        if not stop:
            raise InvalidRequestError(Reason.INVALID_SAMPLING, f"sampling.stop[{index}]", "is empty")
        if (size := len(stop.encode())) > limits.max_stop_bytes:
            raise _beyond(f"stop[{index}]", "is too long, in bytes", limits.max_stop_bytes, size)


def _beyond(field: str, problem: str, limit: object, value: object) -> InvalidRequestError:
    return InvalidRequestError(Reason.INVALID_SAMPLING, f"sampling.{field}", problem, limit=limit, value=value)
