"""Runs one step on the model and chooses tokens. Lives on the engine thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from decode_worker.attention.base import SegmentAttention
from decode_worker.fused import FusedDecoder
from decode_worker.request import Request
from decode_worker.sampling import Choice, Sampler
from decode_worker.scheduler import StepEntry
from decode_worker.step import StepPlan
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError

# For each draw of an entry a token, or why this sample alone cannot go on.
Outcome = list[Choice | DrystoneError]
# Called with a request, logits float32 [rows, vocab] of its lead sample, and the global position of the first row.
LogitTrace = Callable[[Request, torch.Tensor, int], None]


class Runner:
    """The model of one worker, how it attends, and how tokens are chosen.

    Args:
        model: Used by this object's thread alone.
        attention: Reads and writes the arena, for requests of the running step alone.
        sampler: Chooses from logits.
        fused: Runs whole steps where it can; None takes the model's own forward for all.
        trace: For the exactness gate: sees the logits of every row. None in service.
    """

    def __init__(
        self,
        model: ServedModel,
        attention: SegmentAttention,
        sampler: Sampler,
        trace: LogitTrace | None = None,
        fused: FusedDecoder | None = None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._sampler = sampler
        self._trace = trace
        self._fused = fused

    @torch.inference_mode()
    def run(self, entries: Sequence[StepEntry]) -> list[Outcome]:
        """One step; the outcome of each entry."""
        plan = StepPlan([entry.span for entry in entries])
        ends = torch.tensor([len(entry.span.token_ids) for entry in entries]).cumsum(0) - 1
        drawing = [index for index, entry in enumerate(entries) if entry.draws]
        keep = ends[drawing] if self._trace is None else torch.arange(int(ends[-1]) + 1)
        logits = self._logits(plan, keep)
        if self._trace is not None:
            self._show(entries, logits)
            logits = logits[ends[drawing]]
        return self._choose(entries, drawing, logits)

    def _logits(self, plan: StepPlan, keep: torch.Tensor) -> torch.Tensor:
        if self._fused is not None and self._fused.takes(plan):
            return self._fused.logits(plan, keep)
        logits = self._model.forward_logits(plan.token_ids, plan.positions, keep, self._attention.begin(plan))
        return logits.cpu()  # tokens are chosen on the CPU

    def _choose(self, entries: Sequence[StepEntry], drawing: Sequence[int], logits: torch.Tensor) -> list[Outcome]:
        """Samples of one request may draw from one row of logits."""
        outcomes: list[Outcome] = [[] for _ in entries]
        rows = [row for row, index in enumerate(drawing) for _ in entries[index].draws]
        if len(rows) != len(drawing):
            logits = logits[rows]
        states = [sample.state for index in drawing for sample in entries[index].draws]
        chosen = iter(self._sampler.choose(logits, states) if states else [])
        for index in drawing:
            outcomes[index] = [next(chosen) for _ in entries[index].draws]
        return outcomes

    def _show(self, entries: Sequence[StepEntry], logits: torch.Tensor) -> None:
        if self._trace is None:
            return
        start = 0
        for entry in entries:
            end = start + len(entry.span.token_ids)
            if entry.sample.index == 0:
                self._trace(entry.request, logits[start:end].clone(), entry.span.position)
            start = end
