"""Requests that wait for room, in the order of their turn."""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterator

from decode_worker.request import Request

# Seconds for which smaller requests may pass one that does not fit; after that, room is kept for it.
PATIENCE_SECONDS = 2.0


class WaitingQueue:
    """Ordered by `Request.turn`; remembers who did not fit, until something changes."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._refused_at: dict[Request, tuple[int, bool]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests))

    def add(self, request: Request) -> None:
        """Puts a request into its place."""
        bisect.insort(self._requests, request, key=_turn)

    def remove(self, request: Request) -> None:
        """Takes a request out; it must be in."""
        self._requests.remove(request)
        self._refused_at.pop(request, None)

    def to_try(self, version: int, *, may_move: bool) -> Iterator[Request]:
        """Requests that may fit now, each to be admitted or `refused` before the next is asked for.

        Ends behind a request that has waited long and does not fit: who passes it again and again would starve it.
        """
        for request in list(self._requests):
            known = self._refused_at.get(request)
            if known is None or known[0] != version or (may_move and not known[1]):
                yield request
            if request in self._refused_at and time.monotonic() - request.arrived > PATIENCE_SECONDS:
                return

    def refused(self, request: Request, version: int, *, may_move: bool) -> None:
        """It does not fit in this version of the pool."""
        self._refused_at[request] = (version, may_move)


def _turn(request: Request) -> float:
    return request.turn
