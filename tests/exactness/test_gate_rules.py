"""What the exactness gate lets pass: equal answers, and those that part at a near tie."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drystone.local.gate_report import Float32Report
from drystone.local.gate_rules import Comparison, Served, compare_tokens
from drystone.local.reference import ReferenceRun, Stop

EOS = 2
DIFFERENCE = 1e-5


class FakeReference:
    """Led along an answer, it would have chosen `chosen`, by these gaps to what was served."""

    def __init__(self, chosen: list[int], gaps: list[float]) -> None:
        self.chosen, self.gaps = chosen, gaps

    def block_generate(
        self, blocks: list[list[int]], question: list[int], steps: int, forced: list[int]
    ) -> ReferenceRun:
        del blocks, question, forced
        return ReferenceRun(
            torch.zeros(4), token_ids=self.chosen[:steps], step_forced_gaps=self.gaps[:steps], stop=Stop.LENGTH
        )


def compared(
    served: list[int],
    reference: list[int],
    *,
    ended_by: int | None = None,
    stop: Stop = Stop.LENGTH,
    chosen: list[int] | None = None,
    gaps: list[float] | None = None,
) -> Comparison:
    fake: Any = FakeReference(chosen or [*reference, EOS], gaps or [0.0] * 9)
    logits = torch.full((1, 4), DIFFERENCE)
    run = ReferenceRun(torch.zeros(4), token_ids=reference, stop=stop)
    return compare_tokens(0, Served(served, ended_by, logits), run, fake, [], [7])


def test_equal_answers_pass() -> None:
    assert compared([5, 6], [5, 6]).passed
    assert compared([5, 6], [5, 6], ended_by=EOS, stop=Stop.EOS).passed


def test_parting_at_a_near_tie_passes_and_is_counted() -> None:
    result = compared([5, 8, 9], [5, 6, 7], chosen=[5, 6, 9], gaps=[0.0, DIFFERENCE, 0.0])
    assert (result.passed, result.equal, len(result.ties)) == (True, False, 1)
    # Whether it ended by a token is a choice like any other.
    result = compared([5], [5, 6, 7], ended_by=EOS, chosen=[5, 6], gaps=[0.0, DIFFERENCE])
    assert (result.passed, len(result.ties)) == (True, 1)


def test_parting_elsewhere_fails() -> None:
    result = compared([5, 8, 9], [5, 6, 7], chosen=[5, 6, 9], gaps=[0.0, 1.0, 0.0])
    assert not result.passed
    assert result.beyond == [1.0]


@pytest.mark.parametrize(
    ("served", "ended_by", "stop"), [([5, 6], None, Stop.LENGTH), ([], None, Stop.EOS), ([5, 6, 7], None, Stop.EOS)]
)
def test_an_answer_that_just_stops_fails(served: list[int], ended_by: int | None, stop: Stop) -> None:
    result = compared(served, [5, 6, 7], ended_by=ended_by, stop=stop)
    assert result.unexplained
    assert not result.passed


def test_a_tie_after_the_parting_explains_nothing() -> None:
    # The led run agrees with what was served at the step where the two answers part.
    result = compared([5, 8, 9], [5, 6, 7], chosen=[5, 8, 4], gaps=[0.0, 0.0, DIFFERENCE])
    assert not result.passed


def test_stopping_early_fails_even_after_a_tie() -> None:
    result = compared([5, 8], [5, 6, 7], chosen=[5, 6], gaps=[0.0, DIFFERENCE])
    assert len(result.ties) == 1
    assert not result.passed


@pytest.mark.parametrize(
    ("tokens", "ties", "passes"), [(999, 0, True), (999, 1, False), (1000, 1, True), (1999, 2, False)]
)
def test_ties_are_at_most_one_in_a_thousand_tokens(tokens: int, ties: int, passes: bool) -> None:  # noqa: FBT001 - a row
    report = Float32Report("block")
    report.add(Comparison(0, 10, tokens, equal=not ties, logit_difference=0.0, logit_limit=1.0, ties=[0.0] * ties))
    assert report.passed is passes
