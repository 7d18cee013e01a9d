"""Objects of a store by name: every operation has a deadline and one kind of error."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError

from prefill_worker.tiers.locations import Patience, folder_of

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_MULTIPART_BYTES = 64 << 20
_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 4
_LIST_CHUNK = 1000
# Linux: EFBIG, ENOSPC, EDQUOT.
_FULL = ("(os error 27)", "(os error 28)", "(os error 122)")
_QUERY = re.compile(r"\?\S*")
_MESSAGE_LENGTH = 300


class ObjectError(Exception):
    """The store could not do it, or not in time.

    Attributes:
        full: The store has no room left.
    """

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


@dataclass(frozen=True, slots=True)
class ObjectItem:
    """One object of a listing; `modified` is in seconds since 1970."""

    name: str
    size: int
    modified: float


class ObjectFiles:
    """One store's objects. What is not there is None or False; every other failure is an ObjectError.

    A write is atomic. A local store writes beside the name, as `NAME#1`, and renames: a crash leaves such a file and
    no other, and listings pass over it. The rename is not synced to the device: after a loss of power a file may be
    cut off, which its size and checksums tell. Parts that a remote store keeps of an upload that was cut off are for
    the bucket's own rules to remove.
    """

    def __init__(self, store: ObjectStore, patience: Patience) -> None:
        self._store = store
        self._patience = patience
        self.folder: Path | None = folder_of(store)

    async def get(self, name: str) -> memoryview | None:
        """All bytes of an object, as the store's client has read them."""
        with _errors():
            async with asyncio.timeout(self._patience.read_seconds):
                found = await obstore.get_async(self._store, name)
                return memoryview(await found.bytes_async())
        return None

    async def beginning(self, name: str, length: int) -> memoryview | None:
        """The first bytes of an object, at most so many."""
        with _errors():
            async with asyncio.timeout(self._patience.look_seconds):
                return memoryview(await obstore.get_range_async(self._store, name, start=0, length=length))
        return None

    async def size(self, name: str) -> int | None:
        """Bytes of an object, without reading it."""
        with _errors():
            async with asyncio.timeout(self._patience.look_seconds):
                return (await obstore.head_async(self._store, name))["size"]
        return None

    async def put(self, name: str, pieces: Sequence[bytes | memoryview]) -> None:
        """Writes an object of these pieces. They are not copied; after a failure it may still come to be, for a while.

        Raises:
            ObjectError: It was not written, or nobody knows.
        """
        size = sum(memoryview(piece).nbytes for piece in pieces)
        in_parts = self.folder is None and size > _MULTIPART_BYTES
        with _errors():
            async with asyncio.timeout(self._patience.write_seconds):
                await obstore.put_async(
                    self._store,
                    name,
                    iter(pieces),
                    use_multipart=in_parts,
                    chunk_size=_PART_BYTES,
                    max_concurrency=_PARTS_AT_ONCE,
                )
            return
        raise ObjectError("the place to write to is not there")

    async def delete(self, name: str) -> bool:
        """Removes an object; False when the store says that it was not there."""
        with _errors():
            async with asyncio.timeout(self._patience.delete_seconds):
                await obstore.delete_async(self._store, name)
                return True
        return False

    async def move(self, name: str, to: str) -> bool:
        """Renames an object, over any other of that name."""
        with _errors():
            async with asyncio.timeout(self._patience.delete_seconds):
                await obstore.rename_async(self._store, name, to)
                return True
        return False

    async def list(self, prefix: str) -> AsyncIterator[list[ObjectItem]]:
        """Objects under a prefix, some at a time; the deadline is of each such step."""
        stream = obstore.list(self._store, prefix, chunk_size=_LIST_CHUNK)
        while True:
            items: list[ObjectItem] = []
            with _errors():
                async with asyncio.timeout(self._patience.list_seconds):
                    try:
                        found = await stream.__anext__()
                    except StopAsyncIteration:
                        return
                items = [ObjectItem(one["path"], one["size"], one["last_modified"].timestamp()) for one in found]
            yield items


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What is not there passes silently; the rest becomes an ObjectError without the secrets of a signed URL."""
    try:
        yield
    except FileNotFoundError:
        return
    except TimeoutError:
        raise ObjectError("no answer in time") from None
    except (BaseError, OSError) as error:
        text = str(error)
        message = _QUERY.sub("", text.partition("\n")[0])[:_MESSAGE_LENGTH]
        raise ObjectError(message, full=any(code in text for code in _FULL)) from None
