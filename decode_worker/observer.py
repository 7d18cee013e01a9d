"""Times and counts of the engine, for Prometheus, names after vLLM's (docs/status.md), and a span of each request."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from decode_worker.request import Request
from decode_worker.sample import Sample
from decode_worker.scheduler import StepEntry
from shared.errors import REASONS
from shared.metrics import Metrics
from shared.tracing import NO_TRACING, Tracing

HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_queue_time_seconds",
    "request_fetch_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "iteration_tokens",
    "step_time_prefill_seconds",
    "step_time_mixed_seconds",
    "step_time_decode_seconds",
)

# `ended` has these in lower case beside finish reasons; leaving is no error.
_ERRORS = frozenset(reason.lower() for reason in REASONS) - {"cancelled"}


class Observer:
    """Sees what the engine does. Without metrics it only counts.

    Attributes:
        ended_by_reason: Requests by how they ended.
    """

    def __init__(self, metrics: Metrics | None = None, tracing: Tracing = NO_TRACING) -> None:
        self._metrics = metrics
        self._tracing = tracing
        self._last_token: dict[Sample, float] = {}
        self.ended_by_reason: Counter[str] = Counter()
        self.prompt_tokens_total = 0

    def admitted(self, request: Request) -> None:
        """Everything it needs is reserved."""
        self.prompt_tokens_total += request.prompt_tokens
        self._observe("request_queue_time_seconds", request.admitted - request.arrived)

    def first_token(self, request: Request) -> None:
        """Its first token has been chosen."""
        self._observe("request_fetch_time_seconds", request.fetched - request.admitted)
        self._observe("request_prefill_time_seconds", request.first_token - request.fetched)
        self._observe("time_to_first_token_seconds", request.first_token - request.arrived)

    def token(self, sample: Sample, now: float) -> None:
        """A sample has a new token at `now` (`time.monotonic()`)."""
        last = self._last_token.get(sample)
        if last is not None:
            self._observe("inter_token_latency_seconds", now - last)
        self._last_token[sample] = now

    def ended(self, request: Request, reason: str) -> None:
        """It takes no further part."""
        self.ended_by_reason[reason] += 1
        if self._metrics is not None:
            self._metrics.count("requests_ended", reason)
        if request.first_token:
            self._observe("request_decode_time_seconds", time.monotonic() - request.first_token)
        for sample in request.samples:
            self._last_token.pop(sample, None)
        self._trace(request, reason)

    def step(self, entries: Sequence[StepEntry], seconds: float) -> None:
        """A step has run."""
        rows = [len(entry.span.token_ids) for entry in entries]
        kind = "decode" if max(rows) == 1 else "mixed" if min(rows) == 1 else "prefill"
        self._observe("iteration_tokens", sum(rows))
        self._observe(f"step_time_{kind}_seconds", seconds)

    def _trace(self, request: Request, reason: str) -> None:
        happened = (
            ("admitted", request.admitted),
            ("fetched", request.fetched),
            ("first token", request.first_token),
        )
        self._tracing.record(
            "decode",
            request.traceparent,
            request.arrived,
            time.monotonic(),
            {
                "request_id": request.request_id,
                "ended": reason,
                "blocks": len(request.blocks),
                "prompt_tokens": request.prompt_tokens,
                "tail_tokens_reused": request.tail_tokens_reused,
                "steps": request.steps,
            },
            events=[(name, at) for name, at in happened if at],
            error=reason if reason in _ERRORS else "",
        )

    def _observe(self, name: str, value: float) -> None:
        if self._metrics is not None:
            self._metrics.observe(name, value)
