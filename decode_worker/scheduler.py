"""Who takes part in the next step: every decoding request, then question tokens up to the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from decode_worker.request import Phase, Request
from decode_worker.step import RowSpan


@dataclass(frozen=True, slots=True)
class StepEntry:
    """A request's part in a step. `samples` is True when its last row yields a token."""

    request: Request
    span: RowSpan
    samples: bool


def compose(requests: Sequence[Request], budget_tokens: int) -> list[StepEntry]:
    """Plans a step over admitted requests in order of admission.

    Decoding requests always take part with one row each; question blocks share what is left of
    `budget_tokens`, first come first served, in chunks.
    """
    entries = [_entry(request, len(request.unread)) for request in requests if request.phase is Phase.DECODE]
    left = budget_tokens - len(entries)
    for request in requests:
        if request.phase is not Phase.PREFILL or left <= 0:
            continue
        count = min(left, len(request.unread))
        entries.append(_entry(request, count))
        left -= count
    return entries


def _entry(request: Request, count: int) -> StepEntry:
    if request.tail is None:
        raise AssertionError(f"request {request.request_id} was scheduled without a tail")
    span = RowSpan(request.unread[:count], request.placements, request.tail)
    return StepEntry(request, span, samples=count == len(request.unread))
