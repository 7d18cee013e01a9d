"""Which keys are being deleted, and who must hear of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Watch:
    """One who holds a block and may write it somewhere; `deleted` once a deletion of it has begun."""

    deleted: bool = False


class Deletions:
    """Deletions under way, by key. Used by one event loop.

    Whoever holds a block while it waits (for a writer, for room) watches its key. A deletion that begins meanwhile is
    then seen however short it was, and the block is not written after it.
    """

    def __init__(self) -> None:
        self._running: Counter[bytes] = Counter()
        self._watches: dict[bytes, set[Watch]] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._running

    def __len__(self) -> int:
        return len(self._running) + len(self._watches)

    @contextmanager
    def of(self, key: bytes) -> Iterator[None]:
        """A deletion, from its first step to its last; several of one key may overlap."""
        self._running[key] += 1
        for watch in self._watches.get(key, ()):
            watch.deleted = True
        try:
            yield
        finally:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]

    @contextmanager
    def watch(self, key: bytes) -> Iterator[Watch]:
        """Tells of deletions that begin from now on."""
        watch = Watch()
        self._watches.setdefault(key, set()).add(watch)
        try:
            yield watch
        finally:
            self._watches[key].discard(watch)
            if not self._watches[key]:
                del self._watches[key]
