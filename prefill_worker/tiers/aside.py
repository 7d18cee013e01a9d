"""Files of a store that no read wants: bad ones, put aside to be looked at, and strays."""

from __future__ import annotations

from collections.abc import Iterable

from prefill_worker.tiers.object_files import ObjectError, ObjectFiles, ObjectItem
from shared import logs

_log = logs.get("tiers")


class Aside:
    """Keeps bad files, a bounded number of them, and knows strays: blocks of other models, what could not be removed.

    Both go before any block that could be read, strays first, the oldest first.

    Args:
        files: Where they lie.
        limit: Bad files that are kept.

    Attributes:
        bytes: What they take of the place.
    """

    def __init__(self, files: ObjectFiles, limit: int) -> None:
        self.bytes = 0
        self._files = files
        self._limit = limit
        # Name to bytes, oldest first.
        self._bad: dict[str, int] = {}
        self._strays: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._bad) + len(self._strays)

    def know(self, *, bad: Iterable[ObjectItem], strays: Iterable[ObjectItem]) -> None:
        """Takes over what a listing has found."""
        self._bad = {item.name: item.size for item in sorted(bad, key=_age)}
        self._strays = {item.name: item.size for item in sorted(strays, key=_age)}
        self.bytes = sum(self._bad.values()) + sum(self._strays.values())

    def stray(self, name: str, size: int) -> None:
        """A file that should be gone and could not be removed."""
        self.forget(name)
        self._strays[name] = size
        self.bytes += size

    def forget(self, name: str) -> None:
        """This file is gone, or the name is about to hold a block again."""
        self.bytes -= self._strays.pop(name, 0) + self._bad.pop(name, 0)

    async def put(self, name: str, to: str, size: int) -> None:
        """Puts a bad file aside; one that cannot be moved is removed, so that it is not read again."""
        try:
            moved = self._limit > 0 and await self._files.move(name, to)
        except ObjectError as error:
            _log.warning("bad_file_not_moved", name=name, error=str(error))
            moved = False
        if not moved:
            await self._remove(name, size)
            return
        self.forget(to)
        self._bad[to] = size
        self.bytes += size
        await self.trim()

    async def trim(self) -> None:
        """Removes the oldest bad files above the limit."""
        while len(self._bad) > self._limit:
            await self._drop(self._bad)

    async def make_room(self, excess: int) -> None:
        """Removes files until so many bytes are free, or none is left."""
        aim = self.bytes - excess
        for files in (self._strays, self._bad):
            # As many as there are now: what cannot be removed comes back at the end.
            for _ in range(len(files)):
                if self.bytes <= aim or not files:
                    break
                await self._drop(files)

    async def _drop(self, files: dict[str, int]) -> None:
        name, size = next(iter(files.items()))
        self.forget(name)
        await self._remove(name, size)

    async def _remove(self, name: str, size: int) -> None:
        try:
            await self._files.delete(name)
        except ObjectError as error:
            _log.warning("file_not_removed", name=name, error=str(error))
            self.stray(name, size)


def _age(item: ObjectItem) -> float:
    return item.modified
