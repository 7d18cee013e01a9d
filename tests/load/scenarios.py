"""What is asked of every system, in the same order, and what is kept of it.

single    for each of some fresh sets of passages, one request after the other, 64 tokens each:
            cold      the passages for the first time
            again     the same order, another question
            shuffled  another order, another question
eight     8 at once over one fresh set of passages, each in another order with another question
            fresh     nobody has seen the passages
            resident  the same passages once more, in 8 new orders
sixteen   16 at once over the same passages, in 16 new orders, against one stream over them
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from tests.load.streams import TokenStream, decode_rate, whole_rate
from tests.load.systems import System
from tests.load.workload import Prompt, Workload

TOKENS: Final = 64
EIGHT: Final = 8
SIXTEEN: Final = 16


@dataclass(slots=True)
class Measured:
    """Figures of one system by name, in seconds, tokens and tokens a second; grows while it is measured."""

    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, *values: float) -> None:
        """Keeps more values of a figure."""
        self.figures.setdefault(name, []).extend(values)


Scenario = Callable[[System, Measured], AsyncIterator[str]]


@dataclass(frozen=True, slots=True)
class Round:
    """One round of requests: the same for every system, and passages that no earlier round had.

    Args:
        workload: Where prompts come from.
        number: Number of the round.
        sets: Fresh sets of passages of `single`.
    """

    workload: Workload
    number: int
    sets: int

    @property
    def scenarios(self) -> dict[str, Scenario]:
        """By name, in the order in which they run. A scenario yields the name of each part that is done."""
        return {"single": self.single, "eight": self.eight, "sixteen": self.sixteen}

    async def single(self, system: System, measured: Measured) -> AsyncIterator[str]:
        """One request after the other."""
        first = self.number * (self.sets + 1)
        for passages in range(first, first + self.sets):
            for question, (kind, order) in enumerate((("cold", 0), ("again", 0), ("shuffled", 1)), start=3 * passages):
                stream = await system.ask(self.workload.prompt(passages, order, question), TOKENS)
                measured.add(f"ttft_{kind}", stream.ttft)
                measured.add("itl", *stream.gaps)
                if stream.cached_tokens is not None:
                    measured.add(f"cached_{kind}", stream.cached_tokens)
                measured.add("prompt_tokens", stream.prompt_tokens)
                yield kind

    async def eight(self, system: System, measured: Measured) -> AsyncIterator[str]:
        """Eight at once, twice."""
        for kind, start in (("fresh", 1), ("resident", 1 + EIGHT)):
            _keep(measured, f"eight_{kind}", await self._at_once(system, range(start, start + EIGHT)))
            yield kind

    async def sixteen(self, system: System, measured: Measured) -> AsyncIterator[str]:
        """One alone, then sixteen at once. The passages are those of `eight`."""
        alone = 1 + 2 * EIGHT
        _keep(measured, "one", await self._at_once(system, [alone]))
        yield "one"
        _keep(measured, "sixteen", await self._at_once(system, range(alone + 1, alone + 1 + SIXTEEN)))
        yield "sixteen"

    async def _at_once(self, system: System, orders: Sequence[int]) -> list[TokenStream]:
        passages = self.number * (self.sets + 1) + self.sets
        prompts: list[Prompt] = [self.workload.prompt(passages, order, 3 * passages + order) for order in orders]
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(system.ask(prompt, TOKENS)) for prompt in prompts]
        return [task.result() for task in asked]


def _keep(measured: Measured, name: str, streams: Sequence[TokenStream]) -> None:
    measured.add(f"{name}_whole", whole_rate(streams))
    measured.add(f"{name}_ttft", *(stream.ttft for stream in streams))
    decoding = decode_rate(streams)
    if decoding is not None:
        measured.add(f"{name}_decode", decoding)
