"""What counts as equal: tokens under the tie rule, logits by distance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from drystone.local.reference import Reference, ReferenceRun, Stop

# Largest logit difference at the first generated position in float32, by prompt length in tokens.
LOGIT_LIMITS = ((2048, 1e-4), (8192, 1e-3))
TIES_PER_TOKEN = 1 / 1000
RMS_RATIO_LIMIT = 1.25


@dataclass(frozen=True, slots=True)
class Served:
    """What the service answered.

    Attributes:
        token_ids: Tokens of the answer.
        ended_by: The end-of-sequence token that ended it; None when its length did.
        question_logits: float32 [question rows, vocab].
    """

    token_ids: list[int]
    ended_by: int | None
    question_logits: torch.Tensor


@dataclass(slots=True)
class Comparison:
    """One prompt, compared.

    Attributes:
        equal: Tokens and end are the same.
        logit_difference: Largest at the first generated position.
        logit_limit: What that may be.
        ties: Steps at which the served token is not the reference's, and either is right.
        beyond: Gaps of steps at which it is not, and that are no ties.
    """

    index: int
    prompt_tokens: int
    tokens: int
    equal: bool
    logit_difference: float
    logit_limit: float
    ties: list[float] = field(default_factory=list)
    beyond: list[float] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Equal up to ties, and near enough in logits."""
        return not self.beyond and self.logit_difference <= self.logit_limit


def compare_tokens(
    index: int, served: Served, run: ReferenceRun, reference: Reference, blocks: list[list[int]], question: list[int]
) -> Comparison:
    """Holds a served answer against the reference's run of the same prompt.

    Where the answers part, the reference is led along the served tokens: each step at which it would
    have chosen otherwise must be a near tie, that is, its own gap to the served token is below twice
    the difference measured between the two systems' logits.
    """
    length = sum(map(len, blocks)) + len(question)
    difference = float((served.question_logits[-1] - run.logits_first).abs().max())
    comparison = Comparison(
        index=index,
        prompt_tokens=length,
        tokens=len(served.token_ids),
        equal=served.token_ids == run.token_ids and (served.ended_by is not None) == (run.stop is Stop.EOS),
        logit_difference=difference,
        logit_limit=next((limit for most, limit in LOGIT_LIMITS if length <= most), math.inf),
    )
    if not comparison.equal:
        forced = [*served.token_ids, *([served.ended_by] if served.ended_by is not None else [])]
        led = reference.block_generate(blocks, question, len(forced), forced=forced)
        gaps = [gap for gap in led.step_forced_gaps if gap > 0]
        comparison.ties = [gap for gap in gaps if gap < 2 * difference]
        comparison.beyond = [gap for gap in gaps if gap >= 2 * difference]
    return comparison


@dataclass(slots=True)
class Distance:
    """Root mean square of logit differences, gathered over prompts."""

    squares: float = 0.0
    count: int = 0

    def add(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        """Adds all elements of two equally shaped tensors."""
        self.squares += float((actual.double() - expected.double()).square().sum())
        self.count += actual.numel()

    @property
    def rms(self) -> float:
        """The distance."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0
