"""Time of things that run at once on one resource, shared out among them."""

from __future__ import annotations

import time
from collections.abc import Callable


class SharedTime:
    """A clock that each of n things under way at once moves by an n-th of the time.

    24 reads that a disk serves together in 28 ms have taken 1.2 ms each of it: judged by its 28 ms, each of them would
    seem slower than encoding, and a tier that is fast would be off whenever a long prompt comes.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._under_way = 0
        self._shared = 0.0
        self._at = clock()

    def begin(self) -> float:
        """Something begins; what `end` wants to know of it."""
        self._advance()
        self._under_way += 1
        return self._shared

    def end(self, begun: float) -> float:
        """Its share of the time, in seconds. To be called once for each `begin`."""
        self._advance()
        self._under_way -= 1
        return self._shared - begun

    def _advance(self) -> None:
        now = self._clock()
        if self._under_way:
            self._shared += (now - self._at) / self._under_way
        self._at = now
