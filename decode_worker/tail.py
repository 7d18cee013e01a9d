"""A request's tail: the KV of its question and answer, in a chain of fixed-size segments.

    segment 0          segment 1          segment 2
    ┌ q q q q q q q ┐  ┌ q q a a a . . ┐  ┌ . . . . . . . ┐      S tokens each, [layers, S, 2, kv_heads, d]
    └───────────────┘  └───────────────┘  └───────────────┘

Keys lie at **global** positions: a tail follows its own blocks and is not moved. The whole chain
(question + max_new_tokens) is reserved on admission, so a running request never runs out of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from decode_worker.arena import Arena, Extent

SEGMENT_TOKENS = 64


def segments_for(tokens: int) -> int:
    """Segments that hold `tokens` tokens."""
    return -(-tokens // SEGMENT_TOKENS)


@dataclass(slots=True)
class Tail:
    """Owned by one request, which closes it once.

    Attributes:
        start: Global position of the tail's first token.
        filled: Tokens whose KV is written.
    """

    arena: Arena
    extents: list[Extent]
    start: int
    filled: int = 0

    @classmethod
    def reserve(cls, arena: Arena, start: int, tokens: int) -> Tail | None:
        """A chain for `tokens` tokens, or None when the arena has no room; nothing is kept then."""
        tail = cls(arena, [], start)
        for _ in range(segments_for(tokens)):
            extent = arena.allocate(SEGMENT_TOKENS, high=True)
            if extent is None:
                tail.close()
                return None
            tail.extents.append(extent)
        return tail

    def close(self) -> None:
        """Returns every segment."""
        extents, self.extents = self.extents, []
        for extent in extents:
            self.arena.free(extent)

    def slots(self, count: int) -> torch.Tensor:
        """Records of the next `count` tokens in layer 0, int64 [count]; layer l lies `l * SEGMENT_TOKENS` further."""
        indexes = range(self.filled, self.filled + count)
        return torch.tensor(
            [self.extents[i // SEGMENT_TOKENS].start + i % SEGMENT_TOKENS for i in indexes], dtype=torch.int64
        )

    def view(self, segment: int) -> torch.Tensor:
        """Segment as [layers, SEGMENT_TOKENS, 2, kv_heads, head_dim]."""
        return self.arena.view(self.extents[segment])
