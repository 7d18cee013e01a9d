"""What becomes of a step's tokens: taken in, said, and the end of a sample recognised."""

from __future__ import annotations

import time
from collections.abc import Sequence

from decode_worker import messages
from decode_worker.lifecycle import Lifecycle
from decode_worker.observer import Observer
from decode_worker.pool import Pool
from decode_worker.request import Phase, Request
from decode_worker.runner import Outcome
from decode_worker.sample import Sample
from decode_worker.sampling import Choice
from decode_worker.scheduler import StepEntry
from drystone.v1.sampling_pb2 import FinishReason
from shared import logs
from shared.errors import DrystoneError, Reason

STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH


class Answering:
    """Takes outcomes in, between two steps."""

    def __init__(self, pool: Pool, lifecycle: Lifecycle, observer: Observer) -> None:
        self._pool = pool
        self._lifecycle = lifecycle
        self._observer = observer
        self._log = logs.get("answering")
        self.tokens_total = 0

    def take(self, entries: Sequence[StepEntry], outcomes: Sequence[Outcome]) -> None:
        """Advances every request of a step; one request's trouble stays its own."""
        for entry, outcome in zip(entries, outcomes, strict=True):
            if entry.request.finished:
                continue
            try:
                self._advance(entry, outcome)
                self._lifecycle.cut_short_if_late(entry.request)
            except DrystoneError as error:
                self._lifecycle.fail(entry.request, error)
            except Exception as error:  # noqa: BLE001 - a tokenizer may refuse what a model says
                self._log.error("advance_failed", request_id=entry.request.request_id, exc_info=error)
                wrong = DrystoneError(Reason.INTERNAL, f"a token could not be taken in: {error}")
                self._lifecycle.fail(entry.request, wrong)

    def _advance(self, entry: StepEntry, outcome: Outcome) -> None:
        request = entry.request
        entry.sample.read(len(entry.span.token_ids))
        request.steps += 1
        if request.phase is Phase.PREFILL and not entry.sample.unread:
            self._pool.share_question(request)
            request.phase = Phase.DECODE
            for sample in request.live:
                sample.unread = list(sample.resumed)
        for sample, choice in zip(entry.draws, outcome, strict=True):
            if isinstance(choice, DrystoneError):
                raise choice
            self._say(request, sample, choice)

    def _say(self, request: Request, sample: Sample, choice: Choice) -> None:
        now, token = time.monotonic(), choice.token_id
        if not request.first_token:
            request.first_token = now
            self._observer.first_token(request)
        if token in sample.state.stop_ids:
            self._lifecycle.finish_sample(request, sample, STOP, stop_token=token)
            return
        sample.state.accept(token)
        sample.unread = [token]
        self.tokens_total += 1
        self._observer.token(sample, now)
        may_stop = len(sample.generated) >= request.sampling.min_new_tokens
        text = sample.text.push(token, may_stop=may_stop)
        request.sink(messages.tokens(request, sample, [token], text, choice.logprob))
        self._end_if_over(request, sample)

    def _end_if_over(self, request: Request, sample: Sample) -> None:
        if sample.text.matched_stop or sample.state.complete:
            self._lifecycle.finish_sample(request, sample, STOP)
        elif len(sample.generated) >= request.sampling.max_new_tokens:
            self._lifecycle.finish_sample(request, sample, LENGTH)
