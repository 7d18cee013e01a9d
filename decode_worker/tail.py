"""A sample's tail: the KV of its question and answer, in a chain of fixed-size segments.

    segment 0          segment 1          segment 2
    ┌ q q q q q q q ┐  ┌ q q a a a . . ┐  ┌ . . . . . . . ┐      S tokens each, [layers, S, 2, kv_heads, d]
    └───── held ────┘  └───── own ─────┘  └───── own ─────┘

Keys lie at **global** positions: a tail follows its own blocks and is not moved to another offset. The whole
chain (question + max_new_tokens) is reserved on admission, so a running request never runs out of memory.
The first segments may be **held**: sealed by an earlier turn of the conversation or shared by the samples of
one question; they are full, and nobody writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from decode_worker.arena import Arena, Extent
from decode_worker.blocks import Pin
from shared.kv.tails import SEGMENT_TOKENS

__all__ = ["SEGMENT_TOKENS", "Tail", "segments_for"]


def segments_for(tokens: int) -> int:
    """Segments that hold `tokens` tokens."""
    return -(-tokens // SEGMENT_TOKENS)


@dataclass(slots=True)
class Tail:
    """Owned by one sample, which closes it once.

    Attributes:
        start: Global position of the tail's first token.
        own: Segments that are written, in order; they follow the held ones.
        held: Pins of the segments before them.
        filled: Tokens whose KV is there, in held and own segments together.
    """

    arena: Arena
    start: int
    own: list[Extent] = field(default_factory=list)
    held: list[Pin] = field(default_factory=list)
    filled: int = 0

    @property
    def extents(self) -> list[Extent]:
        """Every segment in order."""
        return [*(pin.block.extent for pin in self.held), *self.own]

    def hold(self, pins: Sequence[Pin]) -> None:
        """Begins with segments that are full already; the tail closes the pins."""
        self.held = list(pins)
        self.filled = len(self.held) * SEGMENT_TOKENS

    def copy_in(self, source: Extent, tokens: int) -> None:
        """Copies the first `tokens` tokens of a segment to the beginning of the first own one."""
        if tokens:
            self.arena.view(self.own[0])[:, :tokens] = self.arena.view(source)[:, :tokens]
            self.filled += tokens

    def close(self) -> None:
        """Returns every segment: leaves of the chain first, so that they are evicted before what they follow."""
        own, self.own = self.own, []
        for extent in own:
            self.arena.free(extent)
        held, self.held = self.held, []
        for pin in reversed(held):
            pin.close()

    def slots(self, count: int) -> torch.Tensor:
        """Records of the next `count` tokens in layer 0, int64 [count]; layer l lies `l * SEGMENT_TOKENS` further."""
        extents = self.extents
        indexes = range(self.filled, self.filled + count)
        return torch.tensor([extents[i // SEGMENT_TOKENS].start + i % SEGMENT_TOKENS for i in indexes])
