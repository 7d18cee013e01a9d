"""What counts as equal: tokens under the tie rule, logits by distance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from drystone.local.reference import Reference, ReferenceRun, Stop

# Largest logit difference at the first generated position in float32, by prompt length in tokens.
LOGIT_LIMITS = ((2048, 1e-4), (8192, 1e-3))
# At most one tie in so many tokens; none in fewer.
TOKENS_PER_TIE = 1000
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
        unexplained: The answers part, or one ends before the other, where no tie has been.
    """

    index: int
    prompt_tokens: int
    tokens: int
    equal: bool
    logit_difference: float
    logit_limit: float
    ties: list[float] = field(default_factory=list)
    beyond: list[float] = field(default_factory=list)
    unexplained: bool = False

    @property
    def passed(self) -> bool:
        """Equal up to ties, and near enough in logits."""
        return not self.beyond and not self.unexplained and self.logit_difference <= self.logit_limit


def compare_tokens(
    index: int, served: Served, run: ReferenceRun, reference: Reference, blocks: list[list[int]], question: list[int]
) -> Comparison:
    """Holds a served answer against the reference's run of the same prompt.

    Where the answers part, the reference is led along the served tokens: each step at which it would
    have chosen otherwise must be a near tie, that is, its own gap to the served token is below twice
    the difference measured between the two systems' logits. Where the answers part without such a
    tie, or one is shorter without one, they are simply different.
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
        steps = list(zip(led.token_ids, forced, led.step_forced_gaps, strict=True))
        other = [step for step, (chosen, taken, _) in enumerate(steps) if chosen != taken]
        ties = [step for step in other if steps[step][2] == 0 or steps[step][2] < 2 * difference]
        comparison.ties = [steps[step][2] for step in ties]
        comparison.beyond = [steps[step][2] for step in other if step not in ties]
        comparison.unexplained = _ends_early(served, run) or not any(step <= _parting(served, run) for step in ties)
    return comparison


def _parting(served: Served, run: ReferenceRun) -> int:
    """First step at which two different answers differ: in a token, or in one having ended."""
    pairs = zip(served.token_ids, run.token_ids, strict=False)
    shorter = min(len(served.token_ids), len(run.token_ids))
    return next((step for step, (mine, theirs) in enumerate(pairs) if mine != theirs), shorter)


def _ends_early(served: Served, run: ReferenceRun) -> bool:
    """Served ended by length with fewer tokens than the reference was let generate."""
    return served.ended_by is None and len(served.token_ids) < len(run.token_ids)


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
