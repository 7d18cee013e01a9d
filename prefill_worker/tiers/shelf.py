"""A store's blocks together with their books: what goes to make room, what a listing teaches, what came too late."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from weakref import WeakValueDictionary

from prefill_worker.tiers.aside import Aside
from prefill_worker.tiers.ledger import UNKNOWN_TENANT, Entry, Ledger
from prefill_worker.tiers.meter import TierMeter
from prefill_worker.tiers.object_files import ObjectError, ObjectFiles
from prefill_worker.tiers.object_names import ObjectNames
from prefill_worker.tiers.survey import Survey
from shared import logs

_log = logs.get("tiers")

# For so long a write that got no answer may still come to be.
_LATE_SECONDS = 600.0
_REMOVALS_AT_ONCE = 32
# Entries made from a listing before other work of the loop has its turn.
_ENTRIES_AT_ONCE = 500


@dataclass(eq=False)
class Shelf:
    """Keeps the books and the store in step.

    A change of an object has a turn of its own. A writer takes the turns of its victims while it has its own, and
    these are held only by whoever began after it, since it passes over those still unwritten: no circle of waits.

    Attributes:
        tier: For the log.
        files: The store.
        names: Of the model's blocks.
        ledger: The books; bytes are those of files.
        meter: Of the tier.
        aside: Files that no read wants.
        shared: Others write to the store too. Else all of it is ours, and the budget covers strays and bad files.
        pinned: Whether a block that a listing finds is pinned.
        clock: Seconds, monotonic.
        unwritten: On the books, for the sake of the budget, and not yet in the store.
        unsure: Writes that failed, when, and nobody knows whether they come to be; a later write does not settle that.
        buried: Those of them that were deleted since: never to be found again.
    """

    tier: str
    files: ObjectFiles
    names: ObjectNames
    ledger: Ledger
    meter: TierMeter
    aside: Aside
    shared: bool
    pinned: Callable[[bytes], bool]
    clock: Callable[[], float]
    unwritten: set[bytes] = field(default_factory=set)
    unsure: dict[bytes, float] = field(default_factory=dict)
    buried: dict[bytes, float] = field(default_factory=dict)
    _turns: WeakValueDictionary[bytes, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    def __post_init__(self) -> None:
        self._budget = self.ledger.budget_bytes

    def turn(self, key: bytes) -> asyncio.Lock:
        """To be held while this object is changed."""
        return self._turns.setdefault(key, asyncio.Lock())

    async def enter(self, key: bytes, tokens: int, size: int, tenant: str) -> None:
        """Books a block that was found in the store, if it fits."""
        pinned = self.pinned(key)
        await self.evict(self.ledger.admit(key, tokens=tokens, bytes_=size, tenant=tenant, pinned=pinned) or ())

    def strike_off(self, key: bytes, entry: Entry | None) -> None:
        """The block of this entry is not there. Another entry of the same key may have come meanwhile, and stays."""
        if entry is not None and self.ledger.get(key) is entry:
            self.ledger.remove(key)

    async def evict(self, victims: Iterable[Entry]) -> None:
        """Removes what the books have let go of, and what else must go for the budget's sake."""
        gone = list(victims)
        self.meter.evictions += len(gone)
        await self.discard(gone)
        await self._fit_aside()

    async def discard(self, entries: Iterable[Entry]) -> None:
        """Removes the files of entries that are off the books."""
        left = iter(entries)
        while batch := list(islice(left, _REMOVALS_AT_ONCE)):
            await asyncio.gather(*(self._discard_one(entry) for entry in batch))

    async def clear(self, key: bytes, size: int) -> None:
        """Removes a file that is on no books. The caller has its turn."""
        if not await self._remove(key) and not self.shared:
            self.aside.stray(self.names.block(key), size)

    async def put_aside(self, key: bytes, size: int, reason: str) -> None:
        """Takes a bad file out of every reader's way, unless it has been written anew."""
        self.meter.corruptions += 1
        _log.warning("bad_block_file", tier=self.tier, key=key.hex(), bytes=size, reason=reason)
        async with self.turn(key):
            if key not in self.ledger:
                await self.aside.put(self.names.block(key), self.names.quarantined(key), size)

    async def learn(self, found: Survey, known: set[bytes]) -> None:
        """Brings the books in line with a listing; `known` was on them when it began."""
        self.aside.know(bad=found.bad, strays=found.strays)
        for key in known - {one.key for one in found.blocks} - self.unwritten:
            self.ledger.remove(key)
        victims: list[Entry] = []
        for index, one in enumerate(found.blocks):
            if index % _ENTRIES_AT_ONCE == 0:
                await asyncio.sleep(0)
            if one.key in self.ledger or one.key in self.buried:
                continue
            room = self.ledger.admit(
                one.key,
                tokens=one.tokens,
                bytes_=one.item.size,
                tenant=UNKNOWN_TENANT,
                pinned=self.pinned(one.key),
                last_used=one.item.modified,
            )
            if room is not None:
                victims += room
            elif not self.shared:
                self.aside.stray(one.item.name, one.item.size)
        await self.evict(victims)
        for key, item in found.misfits:
            await self.put_aside(key, item.size, "its size is of no block: cut off")
        await self.aside.trim()

    async def remove_late(self) -> None:
        """Removes what came to be after its write had failed: deleted blocks, and in an own folder all such."""
        ends = self.buried | ({} if self.shared else self.unsure)
        for key in ends:
            async with self.turn(key):
                if key not in self.ledger:
                    await self._remove(key)
        limit = self.clock() - _LATE_SECONDS
        self.buried = {key: at for key, at in self.buried.items() if at > limit}
        self.unsure = {key: at for key, at in self.unsure.items() if at > limit}

    async def no_room(self, size: int) -> None:
        """The place is fuller than the budget says: until it is restored, what is there is all that may be."""
        self.ledger.budget_bytes = self.ledger.used_bytes
        if not self.shared:
            await self.aside.make_room(size)

    def restore_budget(self) -> None:
        """Room may have come back."""
        self.ledger.budget_bytes = self._budget

    async def _fit_aside(self) -> None:
        if self.shared or self._budget is None:
            return
        excess = self.ledger.used_bytes + self.aside.bytes - self._budget
        if excess > 0:
            await self.aside.make_room(excess)

    async def _discard_one(self, entry: Entry) -> None:
        if entry.key in self.unwritten:  # its writer will see that it is off the books
            return
        async with self.turn(entry.key):
            if entry.key not in self.ledger:
                await self.clear(entry.key, entry.bytes)

    async def _remove(self, key: bytes) -> bool:
        try:
            await self.files.delete(self.names.block(key))
        except ObjectError as error:
            _log.warning("block_not_removed", tier=self.tier, key=key.hex(), error=str(error))
            return False
        return True
