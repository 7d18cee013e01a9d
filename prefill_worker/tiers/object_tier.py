"""Blocks in a store of objects: the local disk, or a bucket that all workers share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from prefill_worker.tiers.aside import Aside
from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.block_file import (
    BlockHead,
    FileIdentity,
)
from prefill_worker.tiers.breaker import Breaker
from prefill_worker.tiers.ledger import Ledger
from prefill_worker.tiers.locations import FolderLock, Patience
from prefill_worker.tiers.meter import TierMeter
from prefill_worker.tiers.object_files import ObjectError, ObjectFiles
from prefill_worker.tiers.object_names import BLOCKS, SUFFIX, ObjectNames
from prefill_worker.tiers.object_reader import ObjectReader
from prefill_worker.tiers.object_writer import ObjectWriter
from prefill_worker.tiers.pace import Pace
from prefill_worker.tiers.shelf import Shelf
from prefill_worker.tiers.survey import survey
from shared import logs
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import ShipSource

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_log = logs.get("tiers")


def _never(key: bytes) -> bool:
    """No key is pinned."""
    del key
    return False


class ObjectTier:
    """A tier over a store of objects (obstore). One worker's own folder, or a store shared by many.

    In an own folder the books are the truth: its lock keeps others out, and what is not on the books is not there.
    Files' times are those of their last use, so that eviction and expiry go on after a restart. Other models' blocks
    in it take of the budget and go first. In a shared store others write and remove too: a block that is not on the
    books is asked for, and the books are compared with a listing every so often. Each worker evicts and expires by
    what it has seen itself; a bucket's own rules do that better.

    Args:
        name: "disk" or "object".
        source: What its blocks are said to come from.
        store: From `open_location`.
        identity: Of the model's files.
        ledger: Books that no one else writes to, but for pins; bytes are those of the files.
        pace: Whether reading pays.
        shared: Others use the store too.
        patience: Limits of time.
        quarantine_limit: Bad files that are kept to be looked at.
        refresh_seconds: Between listings of a shared store.
        setting: Name of the setting that gave the store, for messages.
        pinned: Whether a block that a listing finds is pinned.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        name: str,
        source: ShipSource.ValueType,
        store: ObjectStore,
        identity: FileIdentity,
        ledger: Ledger,
        pace: Pace,
        *,
        shared: bool,
        patience: Patience | None = None,
        quarantine_limit: int = 64,
        refresh_seconds: float = 300.0,
        setting: str = "location",
        pinned: Callable[[bytes], bool] = _never,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.source = source
        self.ledger = ledger
        self.meter = TierMeter()
        self.pace = pace
        self._identity = identity
        self._names = ObjectNames.of(identity)
        self._files = ObjectFiles(store, patience or Patience())
        aside = Aside(self._files, quarantine_limit)
        self._shelf = Shelf(name, self._files, self._names, ledger, self.meter, aside, shared, pinned, clock)
        self._shared = shared
        self._own_folder = None if shared else self._files.folder
        self._lock = None if self._own_folder is None else FolderLock(self._own_folder, setting)
        self._refresh_seconds = refresh_seconds
        self._clock = clock
        self._next_listing = 0.0
        reading = Breaker(name, "reading", clock)
        self._reader = ObjectReader(self._shelf, identity, pace, reading, self._own_folder)
        self._writer = ObjectWriter(self._shelf, identity, Breaker(name, "writing", clock))

    @property
    def resting(self) -> bool:
        """The store has failed too often and is left alone for a while."""
        return self._reader.breaker.resting

    @property
    def off(self) -> bool:
        """Reading did not beat encoding when last asked."""
        return self.pace.off

    async def open(self) -> None:
        """Learns what is there, removes what a crash left, applies the budget.

        Raises:
            OSError: The folder cannot be used, or another process uses it. A remote store that does not answer is
                asked again later.
        """
        if self._lock is not None:
            self._lock.take()
        try:
            if self._own_folder is not None:
                await asyncio.to_thread(_remove_leftovers, self._own_folder)
            await self._refresh()
            self._insist_on_own_folder()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Lets another process have the folder."""
        if self._lock is not None:
            self._lock.free()

    async def holds(self, key: bytes) -> bool:
        """By the books; a shared store is asked for what is not on them, unless it rests."""
        return await self._reader.holds(key)

    def pays(self, tokens: int) -> bool:
        """Whether reading beats encoding, as measured; while it does not, one read now and then is let through."""
        return self.pace.pays(tokens)

    async def read(self, key: bytes) -> StoredBlock | None:
        """A block, verified. A bad file is put aside and counted."""
        return await self._reader.read(key)

    async def head(self, key: bytes) -> BlockHead | None:
        """A block's tokens and tenant, verified. A bad file is put aside and counted.

        Raises:
            DrystoneError: BLOCK_UNAVAILABLE: it may be there, and the store does not say.
        """
        return await self._reader.head(key)

    async def write(self, block: StoredBlock, *, pinned: bool) -> bool:
        """Makes room, then writes the block whole or not at all."""
        return await self._writer.write(block, pinned=pinned)

    async def delete(self, key: bytes) -> int:
        """Removes a block and what was put aside of it; returns the bytes freed, as far as the books know.

        A write of it that failed before without an answer may still come to be. Its file is never read, and goes at
        the next sweep.

        Raises:
            DrystoneError: BLOCK_UNAVAILABLE; it may still be there, and is still on the books.
        """
        async with self._shelf.turn(key):
            for name in (self._names.block(key), self._names.quarantined(key)):
                try:
                    await self._files.delete(name)
                except ObjectError as error:
                    raise DrystoneError(
                        Reason.BLOCK_UNAVAILABLE, f"{self.name}: block {key.hex()} was not removed: {error}"
                    ) from error
                self._shelf.aside.forget(name)
            if key in self._shelf.unsure:
                self._shelf.buried[key] = self._shelf.unsure[key]
            entry = self.ledger.remove(key)
            return 0 if entry is None else entry.bytes

    async def sweep(self) -> None:
        """Expiry; writes that came to be after all; what others have written to or removed from a shared store."""
        self._shelf.restore_budget()
        expired = self.ledger.expired()
        self.meter.expirations += len(expired)
        await self._shelf.discard(expired)
        await self._shelf.remove_late()
        if self._shared and self._clock() >= self._next_listing and self._reader.breaker.allows():
            await self._refresh()

    async def _refresh(self) -> None:
        known = {entry.key for entry in self.ledger.entries()} - self._shelf.unwritten
        try:
            found = await survey(self._files, self._names, self._identity, everything=not self._shared)
        except ObjectError as error:
            self._reader.failed(error)
            return
        self._reader.breaker.succeeded()
        self._next_listing = self._clock() + self._refresh_seconds
        await self._shelf.learn(found, known)
        self._reader.listed()

    def _insist_on_own_folder(self) -> None:
        if self._own_folder is not None and self._reader.breaker.failing:
            raise OSError(f"{self.name}: {self._own_folder} cannot be listed; the log says why")


def _remove_leftovers(folder: Path) -> None:
    """Removes what writers left that a crash ended: `NAME#1` beside `NAME` (ObjectFiles)."""
    left = 0
    for path in (folder / BLOCKS).rglob(f"*{SUFFIX}#*"):
        path.unlink(missing_ok=True)
        left += 1
    if left:
        _log.warning("leftovers_removed", folder=str(folder), files=left)
