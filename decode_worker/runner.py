"""Runs one step on the model and chooses tokens. Lives on the engine thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from decode_worker.attention.base import SegmentAttention
from decode_worker.request import Request
from decode_worker.sampler import choose
from decode_worker.scheduler import StepEntry
from decode_worker.step import StepPlan
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason

# A token, None while the question goes on, or why this request alone cannot go on.
Outcome = int | DrystoneError | None
# Called with a request, its logits float32 [rows, vocab], and the global position of the first row.
LogitTrace = Callable[[Request, torch.Tensor, int], None]


class Runner:
    """The model of one worker and how it attends.

    Args:
        model: Used by this object's thread alone.
        attention: Reads and writes the arena, for requests of the running step alone.
        trace: For the exactness gate: sees the logits of every row. None in service.
    """

    def __init__(self, model: ServedModel, attention: SegmentAttention, trace: LogitTrace | None = None) -> None:
        self._model = model
        self._attention = attention
        self._trace = trace

    @torch.inference_mode()
    def run(self, entries: Sequence[StepEntry]) -> list[Outcome]:
        """One step; the outcome of each entry."""
        spans = [entry.span for entry in entries]
        plan = StepPlan(spans)
        ends = torch.tensor([len(span.token_ids) for span in spans]).cumsum(0) - 1
        wanted = [index for index, entry in enumerate(entries) if entry.samples]
        keep = ends[wanted] if self._trace is None else torch.arange(int(ends[-1]) + 1)
        logits = self._model.forward_logits(plan.token_ids, plan.positions, keep, self._attention.begin(plan))
        if self._trace is not None:
            self._show(entries, logits)
            logits = logits[ends[wanted]]
        tokens: list[Outcome] = [None] * len(entries)
        for row, index in enumerate(wanted):
            tokens[index] = _next_token(entries[index].request, logits[row])
        return tokens

    def _show(self, entries: Sequence[StepEntry], logits: torch.Tensor) -> None:
        if self._trace is None:
            return
        start = 0
        for entry in entries:
            end = start + len(entry.span.token_ids)
            self._trace(entry.request, logits[start:end].clone(), entry.span.position)
            start = end


def _next_token(request: Request, logits: torch.Tensor) -> int | DrystoneError:
    if not math.isfinite(float(logits.max())):
        return DrystoneError(Reason.INTERNAL, "the model's logits are not numbers; no token can be chosen from them")
    if len(request.generated) < request.sampling.min_new_tokens:
        logits[[token for token in request.stop_ids if token < len(logits)]] = float("-inf")
    return choose(logits, request.sampling, position=len(request.generated))
