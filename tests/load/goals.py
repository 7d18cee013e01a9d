"""The comparison's goals, each a ratio of figures of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tests.load.bandwidth import Floor
from tests.load.streams import Spread

Figures = Mapping[str, Spread]


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio and its bound.

    Args:
        text: What is held against what.
        ratio: The ratio; None when a figure of it was not measured.
        bound: What it must reach.
        must: On which side of the bound it must lie; the bound itself is met, save with "<".
    """

    text: str
    ratio: float | None
    bound: float
    must: Literal[">=", "<=", "<"]

    @property
    def met(self) -> bool | None:
        """None when it could not be measured."""
        if self.ratio is None:
            return None
        if self.must == ">=":
            return self.ratio >= self.bound
        return self.ratio < self.bound if self.must == "<" else self.ratio <= self.bound


def goals(ours: Figures, vllm: Figures, floor: Floor) -> list[Goal]:
    """The goals of the engine, against vLLM and against the machine.

    Args:
        ours: Drystone's figures.
        vllm: vLLM's of the same run; empty when it was not measured.
        floor: Least time of a decode step.
    """
    itl = ours.get("itl")
    share = floor.seconds / itl.median if itl else None
    warm = "warm TTFT, shuffled"
    return [
        Goal(f"{warm} / vLLM's shuffled", _ratio(ours, "ttft_shuffled", vllm), 1 / 25, "<="),
        Goal(f"{warm} / vLLM's same order again", _ratio(ours, "ttft_shuffled", vllm, "ttft_again"), 1.0, "<"),
        Goal("single-stream ITL / vLLM's", _ratio(ours, "itl", vllm), 1.0, "<="),
        Goal("floor / single-stream ITL", share, 0.7, ">="),
        Goal("8 streams, resident, prefill included / vLLM's", _ratio(ours, "eight_resident_whole", vllm), 6.0, ">="),
        Goal("8 streams, decode alone / vLLM's", _ratio(ours, "eight_resident_decode", vllm), 2.0, ">="),
        Goal("16 requests / one stream", _ratio(ours, "sixteen_whole", ours, "one_whole"), 6.0, ">="),
    ]


def _ratio(above: Figures, name: str, below: Figures, other: str = "") -> float | None:
    first, second = above.get(name), below.get(other or name)
    return first.median / second.median if first and second else None
