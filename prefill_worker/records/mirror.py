"""Records in an object store, which all workers of a cluster share.

    records/<key space, 16 digits>/<first 2 digits of the key>/<key>.json

An object is written whole or not at all (the store's own promise) and believed only when its checksum and its key are
right. The mirror is a second place: while it fails, the table goes on alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore

from prefill_worker.records.figures import RecordFigures
from prefill_worker.records.record import BlockRecord, space_name
from prefill_worker.records.record_json import from_json, to_json
from shared import logs
from shared.errors import DrystoneError, Reason
from shared.kv.keys import KEY_BYTES, KeySpace

K = TypeVar("K")
T = TypeVar("T")

# A record of a million tokens is smaller; what is larger was not written here.
_MAX_OBJECT_BYTES = 16 << 20
_AT_ONCE = 16
# What stores raise when they cannot be reached, refuse, or answer nonsense.
_FAILURES = (BaseError, OSError, TimeoutError, ValueError)


class Mirror:
    """Reads and writes records as objects.

    Args:
        store: A bucket or folder, with its credentials.
        space: Everything but salt and tokens that keys are made with.
        timeout_s: Longest time of one operation on one object.
        batch_timeout_s: Longest time of one call.
        pause_s: How long nothing is read or written after a failure, so that a store that is gone costs each request
            nothing; deleting is always tried.
    """

    def __init__(
        self,
        store: ObjectStore,
        space: KeySpace,
        *,
        timeout_s: float = 5.0,
        batch_timeout_s: float = 30.0,
        pause_s: float = 5.0,
    ) -> None:
        self._store = store
        self._space = space
        self._root = f"records/{space_name(space)}"
        self._timeout_s = timeout_s
        self._batch_timeout_s = batch_timeout_s
        self._pause_s = pause_s
        self._paused_until = 0.0
        self.figures = RecordFigures()

    @property
    def paused(self) -> bool:
        """True shortly after a failure."""
        return time.monotonic() < self._paused_until

    async def read(self, keys: Iterable[bytes], *, always: bool = False) -> dict[bytes, BlockRecord | None]:
        """Records by key; None where the mirror holds none. Keys that it could not tell of are left out.

        Args:
            keys: Their keys.
            always: Read even if the mirror has failed a moment ago.
        """
        return await self._each("read", keys, self._read_one, always=always)

    async def write(self, records: Sequence[BlockRecord]) -> list[bytes]:
        """Writes records over what is there; keys of those that are now in the mirror."""
        contents = {record.key: to_json(record) for record in records}

        async def put(key: bytes) -> None:
            await obstore.put_async(self._store, self._path(key), contents[key])
            self.figures.mirror_writes += 1

        return list(await self._each("write", contents, put))

    async def delete(self, keys: Sequence[bytes]) -> None:
        """Removes records; those that are not there are no error.

        Raises:
            DrystoneError: BLOCK_UNAVAILABLE; some may be there still.
        """
        gone = await self._each("delete", keys, self._delete_one, always=True)
        if left := len(set(keys)) - len(gone):
            raise DrystoneError(
                Reason.BLOCK_UNAVAILABLE,
                f"the store of records cannot be reached: {left} records may not have been deleted; try again",
            )

    async def discard(self, keys: Iterable[bytes]) -> None:
        """Removes records that nobody needs any more; what cannot be removed now stays for another time."""
        await self._each("discard", keys, self._delete_one)

    async def shards(self) -> list[str]:
        """First two digits of the keys that there are, in order. Empty when the mirror cannot tell."""

        async def listed(root: str) -> list[str]:
            found = await obstore.list_with_delimiter_async(self._store, root)
            return sorted(path.rpartition("/")[2] for path in found["common_prefixes"])

        return (await self._each("list", [self._root], listed)).get(self._root, [])

    async def keys(self, shard: str) -> list[bytes] | None:
        """Keys in a shard, in order. None when the mirror cannot tell."""

        async def listed(folder: str) -> list[bytes]:
            names: list[str] = []
            async for batch in obstore.list(self._store, folder):
                names += (meta["path"].rpartition("/")[2] for meta in batch)
            return sorted(key for key in map(_key_of, names) if key is not None)

        folder = f"{self._root}/{shard}"
        return (await self._each("list", [folder], listed)).get(folder)

    def _path(self, key: bytes) -> str:
        digits = key.hex()
        return f"{self._root}/{digits[:2]}/{digits}.json"

    async def _read_one(self, key: bytes) -> BlockRecord | None:
        try:
            found = await obstore.get_async(self._store, self._path(key))
        except FileNotFoundError:
            return None
        if found.meta["size"] > _MAX_OBJECT_BYTES:
            self._damaged(key, "it is too large")
            return None
        data = bytes(await found.bytes_async())
        try:
            record = from_json(data)
            if record.key != key or not record.belongs(self._space):
                raise ValueError("the key is not of the tokens")  # noqa: TRY301 - both kinds of damage end alike
        except ValueError as error:
            self._damaged(key, str(error))
            return None
        return record

    async def _delete_one(self, key: bytes) -> None:
        try:
            await obstore.delete_async(self._store, self._path(key))
        except FileNotFoundError:
            return

    def _damaged(self, key: bytes, why: str) -> None:
        """A damaged object counts as none; it is left to be written over."""
        self.figures.damaged_objects += 1
        logs.get("records").error("record_object_damaged", key=key.hex(), error=why)

    async def _each(
        self, verb: str, items: Iterable[K], work: Callable[[K], Awaitable[T]], *, always: bool = False
    ) -> dict[K, T]:
        """Does work for each item, a few at once, and gives what came of it. After a failure no more is begun."""
        distinct = dict.fromkeys(items)
        if distinct and self.paused and not always:
            self.figures.mirror_skips += 1
            return {}
        done: dict[K, T] = {}
        waiting = iter(distinct)
        until = asyncio.get_running_loop().time() + self._batch_timeout_s
        failures: list[Exception] = []

        async def take() -> None:
            for item in waiting:
                if failures:
                    return
                try:
                    async with asyncio.timeout_at(min(asyncio.get_running_loop().time() + self._timeout_s, until)):
                        done[item] = await work(item)
                except _FAILURES as error:
                    failures.append(error)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(_AT_ONCE, len(distinct))):
                group.create_task(take())
        if failures:
            self.figures.mirror_failures += len(failures)
            self._paused_until = time.monotonic() + self._pause_s
            error = repr(failures[0])[:300]
            logs.get("records").error("record_mirror_failed", verb=verb, failures=len(failures), error=error)
        return done


def _key_of(name: str) -> bytes | None:
    """The key that an object's name says; other people's objects are passed over."""
    digits, dot, ending = name.rpartition(".")
    if ending != "json" or not dot or len(digits) != 2 * KEY_BYTES:
        return None
    try:
        return bytes.fromhex(digits)
    except ValueError:
        return None
