"""One operation at a time changes a record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from weakref import WeakValueDictionary

from shared.errors import deadline_exceeded


class KeyLocks:
    """Locks by key, which exist while somebody holds or awaits them.

    A record lies in two places, and changing it takes several steps. Whoever holds its key sees both places agree:
    a late write cannot bring a deleted record back.

    Args:
        timeout_s: Longest wait for all the keys of one hold.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._locks: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._locks)

    @asynccontextmanager
    async def hold(self, keys: Iterable[bytes]) -> AsyncIterator[None]:
        """Holds keys. All take them in the same order, so that no two wait for each other.

        Raises:
            DrystoneError: DEADLINE_EXCEEDED; none is held then.
        """
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(self._timeout_s):
                    for key in sorted(set(keys)):
                        await held.enter_async_context(self._locks.setdefault(key, asyncio.Lock()))
            except TimeoutError:
                raise deadline_exceeded("waiting for another change of the same records") from None
            yield
