"""The records of a prefill worker: a table of its own, and a mirror that workers share.

Order within every change: the key's lock, then the table, then the mirror; deleting takes the mirror first. So
whatever a crash leaves is either whole in the table and not yet in the mirror (the refresh writes it), or still
there to be deleted again.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeAlias, TypeVar

from prefill_worker.records.figures import RecordFigures
from prefill_worker.records.key_locks import KeyLocks
from prefill_worker.records.mirror import Mirror
from prefill_worker.records.record import BlockRecord
from prefill_worker.records.selection import Selection
from prefill_worker.records.table import FIRST_PLACE, Table
from shared import logs
from shared.errors import DrystoneError, Reason, deadline_exceeded
from shared.kv.keys import KeySpace

T = TypeVar("T")
LetGo: TypeAlias = Callable[[Sequence[bytes]], Awaitable[Sequence[bytes]]]

_BATCH = 256
_LOCK_TIMEOUT_S = 60.0
# Another worker may be about to prolong a record that has just ended; the mirror's object stays this long after.
_GRACE_S = 3600.0


async def _nothing_to_let_go(keys: Sequence[bytes]) -> Sequence[bytes]:
    return keys


def _nobody_listens(key: bytes) -> None:
    """A pin that concerns records alone."""


class Records:
    """Keeps records of warmed blocks, so that their keys stay valid without their KV. Used by one event loop.

    Args:
        path: Folder of the table. None: memory, and the mirror alone outlives the process.
        mirror: Where workers share records; None without an object store.
        key_space: Everything but salt and tokens that keys are made with; records of another one are kept apart.
        max_records: Most records in the table.
        table_timeout_s: Longest wait for the table.
        clock: Unix seconds now.

    Attributes:
        on_pinned: Told the key of each pinned record that is kept or taken in.
    """

    def __init__(
        self,
        path: Path | None,
        mirror: Mirror | None,
        *,
        key_space: KeySpace,
        max_records: int = 1_000_000,
        table_timeout_s: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.figures = RecordFigures() if mirror is None else mirror.figures
        self._table = Table(path, key_space, max_records, self.figures)
        self._mirror = mirror
        self._space = key_space
        self._max_records = max_records
        self._table_timeout_s = table_timeout_s
        self._clock = clock
        self._locks = KeyLocks(_LOCK_TIMEOUT_S)
        # SQLite's connection lives on this one thread; calls are done in the order in which they were made.
        self._thread = ThreadPoolExecutor(1, "records")
        self._next_shard = ""
        self.on_pinned: Callable[[bytes], object] = _nobody_listens
        self._closed = False

    async def open(self) -> None:
        """Opens the table; a damaged one is set aside and begun afresh.

        Raises:
            DrystoneError: INTERNAL: it cannot be opened, or another process holds it.
        """
        await self._on_table(self._table.open)

    async def close(self) -> None:
        """Closes the table, after the calls that were made before. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            await self._on_table(self._table.close)
            self._thread.shutdown(wait=False)

    def __len__(self) -> int:
        return self._table.count

    async def keep(self, records: Sequence[BlockRecord]) -> int:
        """Keeps records, uniting each with what is known of its key: all tags, the later end, a pin.

        When this returns, the records outlive the process. The mirror has them too unless it fails; then the next
        refresh writes them.

        Returns:
            How many are kept now that were not, or not alike, before.

        Raises:
            DrystoneError: RECORDS_FULL (none was kept); INCOMPATIBLE_WORKERS: a key is not of its tokens; INTERNAL:
                the table cannot be written.
        """
        live = [record for record in records if not record.ended(self._clock())]
        for record in live:
            if not record.belongs(self._space):
                raise DrystoneError(
                    Reason.INCOMPATIBLE_WORKERS,
                    f"the key {record.key.hex()} is not of its record's tokens, salt and this worker's key space",
                )
        keys = [record.key for record in live]
        async with self._locks.hold(keys):
            if self._mirror is not None:
                await self._take_in(await self._on_table(self._table.lacks, keys, self._clock()))
            changed = await self._on_table(self._table.keep, live, self._clock(), mirrored=False)
            self._tell_pins([*live, *changed])
            await self._write_mirror(changed)
        self.figures.kept += len(changed)
        return len(changed)

    async def get(self, keys: Sequence[bytes]) -> dict[bytes, BlockRecord]:
        """Records by key, from the table or else from the mirror; unknown and ended ones are left out."""
        found = await self._read_table(keys)
        missing = [key for key in keys if key not in found]
        if missing and self._mirror is not None:
            async with self._locks.hold(missing):
                # Whoever held a key before may have brought its record.
                found |= await self._read_table(missing)
                found |= await self._take_in(key for key in missing if key not in found)
        return found

    async def select(
        self,
        *,
        key_prefix: str = "",
        tags: Sequence[str] = (),
        tenant: str | None = None,
        after_key: bytes = b"",
        limit: int = 0,
    ) -> list[BlockRecord]:
        """Records of the table that match every criterion given, in the order of their keys; see `Selection`.

        Raises:
            DrystoneError: INVALID_BLOCK_KEY: the prefix is none; INTERNAL: the table cannot be read.
        """
        selection = Selection(key_prefix, tuple(tags), tenant, after_key, limit)
        return await self._on_table(self._table.select, selection, self._clock())

    async def set_pinned(self, keys: Sequence[bytes], *, pinned: bool) -> list[bytes]:
        """Pins or unpins records; the keys that changed."""
        await self.get(keys)
        async with self._locks.hold(keys):
            changed = await self._on_table(self._table.set_pinned, keys, self._clock(), pinned=pinned)
            await self._write_mirror(changed)
        return [record.key for record in changed]

    async def pinned_keys(self) -> list[bytes]:
        """Keys of the table's pinned records, in order."""
        return await self._on_table(self._table.pinned_keys, self._clock())

    async def delete(self, keys: Sequence[bytes]) -> list[bytes]:
        """Removes records from table and mirror; the keys there were, in the order given.

        Raises:
            DrystoneError: The mirror cannot be reached. Nothing is promised then but that asking again is safe.
        """
        distinct = list(dict.fromkeys(keys))
        async with self._locks.hold(distinct):
            known = set(distinct).difference(await self._on_table(self._table.lacks, distinct, self._clock()))
            if self._mirror is not None:
                known |= await self._delete_mirror(self._mirror, distinct, known)
            await self._on_table(self._table.delete, distinct)
        self.figures.deleted += len(known)
        return [key for key in distinct if key in known]

    async def expire(self, let_go: LetGo = _nothing_to_let_go) -> list[bytes]:
        """Removes records whose time is up, after what they stand for; their keys. Their objects go with a refresh.

        A record that another worker has prolonged is taken in instead. One that the mirror cannot tell of now, or that
        `let_go` did not manage, stays for the next call.

        Args:
            let_go: Given keys whose time is up, which nobody changes meanwhile; returns those that it let go of.
        """
        gone: list[bytes] = []
        now, after = self._clock(), FIRST_PLACE
        while batch := await self._on_table(self._table.ended, now, after, _BATCH):
            after = batch[-1][1]
            keys = [key for key, _ in batch]
            async with self._locks.hold(keys):
                over = await self._on_table(self._table.lacks, keys, now)
                if self._mirror is not None and over:
                    answers = await self._mirror.read(over)
                    prolonged = await self._accept(answers)
                    over = [key for key in over if key in answers and key not in prolonged]
                if over:
                    gone += await self._on_table(self._table.drop_ended, await let_go(over), now)
        self.figures.expired += len(gone)
        return gone

    async def refresh(self, most: int = 10_000) -> int:
        """Writes to the mirror what it lacks, and takes in what this table lacks; how many were taken in.

        Args:
            most: Most objects to read. The next refresh goes on where this one stopped.
        """
        if self._mirror is None:
            return 0
        await self._write_unmirrored()
        taken, left = 0, most
        shards = await self._mirror.shards()
        ahead = [shard for shard in shards if shard >= self._next_shard]
        for shard in ahead + shards[: len(shards) - len(ahead)]:
            self._next_shard = shard
            keys = await self._mirror.keys(shard) if left > 0 and len(self) < self._max_records else None
            if keys is None:
                break
            unknown = iter((await self._on_table(self._table.lacks, keys, self._clock()))[:left])
            while batch := list(islice(unknown, _BATCH)):
                async with self._locks.hold(batch):
                    taken += len(await self._take_in(batch))
                left -= len(batch)
        return taken

    async def _read_table(self, keys: Iterable[bytes]) -> dict[bytes, BlockRecord]:
        try:
            return await self._on_table(self._table.get, keys, self._clock())
        except DrystoneError:
            # Counted and logged where it arose; the mirror may know.
            return {}

    async def _take_in(self, keys: Iterable[bytes]) -> dict[bytes, BlockRecord]:
        """Reads records from the mirror into the table. The caller holds the keys."""
        if self._mirror is None:
            return {}
        answers = await self._mirror.read(keys)
        live = await self._accept(answers)
        over = [key for key, record in answers.items() if record is not None and record.ended(self._clock() - _GRACE_S)]
        await self._mirror.discard(over)
        return live

    async def _accept(self, answers: Mapping[bytes, BlockRecord | None]) -> dict[bytes, BlockRecord]:
        """Takes what the mirror answered into the table; the records that have not ended. The caller holds the keys."""
        now = self._clock()
        live = {key: record for key, record in answers.items() if record is not None and not record.ended(now)}
        try:
            await self._on_table(self._table.keep, list(live.values()), now, mirrored=True)
            self.figures.taken_in += len(live)
        except DrystoneError as error:
            # What the mirror says is true whether or not the table has room for it.
            self.figures.not_taken_in += len(live)
            logs.get("records").warning("records_not_taken_in", records=len(live), error=error.message)
        self._tell_pins(live.values())
        return live

    def _tell_pins(self, records: Iterable[BlockRecord]) -> None:
        for record in records:
            if record.pinned:
                self.on_pinned(record.key)

    async def _write_mirror(self, records: Sequence[BlockRecord]) -> bool:
        """Writes what changed; False when some of it could not be. The caller holds the keys."""
        if self._mirror is None or not records:
            return True
        written = await self._mirror.write(records)
        await self._on_table(self._table.mark, written, mirrored=True)
        return len(written) == len(records)

    async def _delete_mirror(self, mirror: Mirror, keys: Sequence[bytes], known: set[bytes]) -> set[bytes]:
        """Deletes objects; the keys that were known to the mirror alone. The caller holds the keys."""
        answers = await mirror.read((key for key in keys if key not in known), always=True)
        try:
            await mirror.delete(keys)
        except DrystoneError:
            # Some objects are gone while their records stay: a refresh may write them again.
            await self._on_table(self._table.mark, keys, mirrored=False)
            raise
        now = self._clock()
        return {key for key, record in answers.items() if record is not None and not record.ended(now)}

    async def _write_unmirrored(self) -> None:
        after = b""
        while batch := await self._on_table(self._table.unmirrored, after, _BATCH, self._clock()):
            after = batch[-1]
            async with self._locks.hold(batch):
                there = await self._on_table(self._table.get, batch, self._clock())
                if not await self._write_mirror(list(there.values())):
                    return

    async def _on_table(self, work: Callable[..., T], *args: object, **kwargs: object) -> T:
        """Does work on the table's thread. Work that was begun ends even if its caller has gone."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._table_timeout_s):
                return await loop.run_in_executor(self._thread, lambda: work(*args, **kwargs))
        except TimeoutError:
            self.figures.table_failures += 1
            raise deadline_exceeded("waiting for the table of records") from None
        except (sqlite3.Error, OSError) as error:
            self.figures.table_failures += 1
            logs.get("records").error("record_table_failed", error=str(error))
            full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            reason = Reason.RECORDS_FULL if full else Reason.INTERNAL
            raise DrystoneError(reason, f"the table of records failed: {error}") from error
