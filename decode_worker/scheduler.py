"""Who takes part in the next step: every row that generates, then unread tokens up to the budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from decode_worker.request import Phase, Request
from decode_worker.sample import Sample
from decode_worker.step import RowSpan


@dataclass(frozen=True, slots=True)
class StepBudget:
    """Most rows of a step.

    Attributes:
        tokens: In all. Above the number of samples that may run at once, so that every one of them always takes part.
        mixed_tokens: Of questions, in a step that also generates: bounds how long others wait for their next token.
    """

    tokens: int = 512
    mixed_tokens: int = 128


@dataclass(frozen=True, slots=True)
class StepEntry:
    """A sample's part in a step.

    Attributes:
        request: Whose sample it is.
        sample: Whose tail is written.
        span: Its rows.
        draws: Samples that draw their next token from the last row; none while tokens are left unread.
    """

    request: Request
    sample: Sample
    span: RowSpan
    draws: Sequence[Sample]


def compose(requests: Sequence[Request], budget: StepBudget) -> list[StepEntry]:
    """Plans a step over admitted requests.

    Samples that generate always take part, with one row each. What is left of the budget goes to questions, and to
    resumed answers that are read again, in chunks, in the order of `Request.turn`.
    """
    runs = [request for request in requests if request.phase in (Phase.PREFILL, Phase.DECODE)]
    entries, reading = [], []
    for request in runs:
        for sample in _active(request):
            if request.phase is Phase.DECODE and len(sample.unread) == 1:
                entries.append(_entry(request, sample, 1))
            elif sample.unread:
                reading.append((request, sample))
    left = budget.tokens - len(entries)
    if entries:
        left = min(left, budget.mixed_tokens)
    for request, sample in sorted(reading, key=lambda pair: pair[0].turn):
        if left <= 0:
            break
        count = min(left, len(sample.unread))
        entries.append(_entry(request, sample, count))
        left -= count
    return entries


def _active(request: Request) -> Iterator[Sample]:
    live = request.live
    yield from live[:1] if request.phase is Phase.PREFILL else live


def _entry(request: Request, sample: Sample, count: int) -> StepEntry:
    if sample.tail is None:
        raise AssertionError(f"request {request.request_id} was scheduled without a tail")
    span = RowSpan(sample.unread[:count], request.placements, sample.tail)
    draws: list[Sample] = []
    if count == len(sample.unread):
        # At the question's end everyone begins who has said nothing yet.
        draws = [one for one in request.live if not one.resumed] if request.phase is Phase.PREFILL else [sample]
    return StepEntry(request, sample, span, draws)
