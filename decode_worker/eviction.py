"""Which idle block goes first: small policies that rank, for the block table to order by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from decode_worker.blocks import Block


class EvictionPolicy(Protocol):
    """Ranks blocks that nobody uses."""

    def rank(self, block: Block) -> float:
        """Of two idle blocks the one with the smaller rank goes first. Asked when a block becomes idle."""
        ...

    def evicted(self, block: Block) -> None:
        """A block has gone."""
        ...


class LeastRecentlyUsed:
    """The block whose last use ended longest ago goes first."""

    def __init__(self) -> None:
        self._uses = itertools.count()

    def rank(self, block: Block) -> float:
        """A number that rises with each use of any block."""
        del block
        return float(next(self._uses))

    def evicted(self, block: Block) -> None:
        """Nothing to learn from."""


class LeastFrequentlyUsed:
    """The block with the fewest uses goes first, and old fame fades.

    LFU with dynamic aging (Arlitt et al., "Evaluating content management techniques for Web proxy caches",
    2000): rank = uses + age, where age is the rank of what was evicted last. Encoding and keeping a block both
    cost in proportion to its tokens, so size cancels out.
    """

    def __init__(self) -> None:
        self._age = 0.0

    def rank(self, block: Block) -> float:
        """Uses, and the age at which the block came to rest."""
        return self._age + block.hits

    def evicted(self, block: Block) -> None:
        """What stays must be worth more than what has gone."""
        self._age = max(self._age, block.rank)


POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = MappingProxyType(
    {"lru": LeastRecentlyUsed, "lfu": LeastFrequentlyUsed}
)
