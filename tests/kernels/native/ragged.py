"""Ragged steps: requests of many rows and few, over shared blocks, with tails that begin in shared segments."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from decode_worker.arena import Arena, Extent
from decode_worker.step import Placement, RowSpan
from decode_worker.tail import SEGMENT_TOKENS, Tail
from shared.kv.layout import KvShape

_BLOCKS = (1, 37, 80, 5, 130)


@dataclass(frozen=True)
class Ragged:
    """A step's requests on an arena of random values; the same for the same seed.

    Attributes:
        shape: Shape of the KV.
        rows: Rows of each request.
        seed: Of all values and of which blocks are laid.
        vocabulary: Token ids are below it.
    """

    shape: KvShape
    rows: tuple[int, ...]
    seed: int = 0
    vocabulary: int = 400

    def build(self) -> tuple[Arena, list[RowSpan]]:
        """A fresh arena and the requests; the first two tails begin in the same full segment."""
        draw = torch.Generator().manual_seed(self.seed)
        segments = sum(2 + -(-count // SEGMENT_TOKENS) for count in self.rows)
        tokens = sum(_BLOCKS) + (segments + 2) * SEGMENT_TOKENS
        arena = Arena(self.shape, self.shape.extent_bytes(tokens), torch.device("cpu"))
        arena.records.copy_(torch.randn(arena.records.shape, generator=draw))
        blocks = [(bytes([name]), _extent(arena, size), size) for name, size in enumerate(_BLOCKS)]
        sealed = _extent(arena, SEGMENT_TOKENS)
        spans = []
        for number, count in enumerate(self.rows):
            offset, placements = 0, []
            for index in torch.randint(0, len(blocks), (2 + number % 3,), generator=draw).tolist():
                key, extent, size = blocks[index]
                placements.append(Placement(key, extent, offset))
                offset += size
            filled = (SEGMENT_TOKENS, SEGMENT_TOKENS + 7, 0, 63)[number % 4]
            own = [_extent(arena, SEGMENT_TOKENS) for _ in range(-(-(filled + count) // SEGMENT_TOKENS))]
            if filled >= SEGMENT_TOKENS:
                own[0] = sealed
            ids = torch.randint(0, self.vocabulary, (count,), generator=draw).tolist()
            spans.append(RowSpan(ids, placements, Tail(arena, offset, own=own, filled=filled)))
        return arena, spans


def _extent(arena: Arena, tokens: int) -> Extent:
    extent = arena.allocate(tokens)
    assert extent is not None
    return extent
