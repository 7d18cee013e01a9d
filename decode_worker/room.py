"""Making room: a run of records for each extent that a request needs, or none at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from decode_worker.arena import Arena, Extent
from decode_worker.blocks import BlockTable


class Room:
    """Extents taken together; given back together unless all could be had.

    Args:
        arena: Where they are taken from.
        blocks: Idle ones are evicted when bytes do not suffice.
        may_move: Nobody reads or writes KV now: extents may be moved when bytes suffice but no run does. Without it
            nothing is evicted either: it might be in vain, and the wait is for one step.
        still: Keeps chunks from landing while extents are moved.
    """

    def __init__(
        self, arena: Arena, blocks: BlockTable, *, may_move: bool, still: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._arena = arena
        self._blocks = blocks
        self._may_move = may_move
        self._still = still
        self._taken: list[Extent] = []
        self.short = False

    def take(self, tokens: int, *, high: bool = False) -> Extent:
        """An extent; once one could not be had, `short` is set and what is returned is empty."""
        extent = None if self.short else self._allocate(tokens, high=high)
        if extent is None:
            self.short = True
            return Extent(0, 0, 0)
        self._taken.append(extent)
        return extent

    def give_back(self) -> None:
        """Frees what was taken."""
        for extent in self._taken:
            self._arena.free(extent)
        self._taken = []

    def _allocate(self, tokens: int, *, high: bool) -> Extent | None:
        while (extent := self._arena.allocate(tokens, high=high)) is None:
            if self._arena.free_records >= self._arena.shape.extent_records(tokens):
                # Moving bytes costs less than encoding them anew.
                if not (self._may_move and self._moved(tokens)):
                    return None
            elif not (self._may_move and self._blocks.evict_one()):
                return None
        return extent

    def _moved(self, tokens: int) -> bool:
        with self._still():
            return self._arena.make_room(tokens)
