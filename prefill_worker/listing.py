"""What a prefill worker tells of the blocks that it holds or has records of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prefill_worker.records.record import BlockRecord
from prefill_worker.records.records import Records
from prefill_worker.tiers.block_file import BlockHead
from prefill_worker.tiers.block_store import BlockStore
from prefill_worker.tiers.ledger import UNKNOWN_TENANT, Entry
from shared.errors import deadline_exceeded
from shared.internal.v1 import prefill_pb2 as pb
from shared.internal.v1.common_pb2 import ShipSource
from shared.kv.layout import KvShape

# An object store answers many small reads in the time of one.
_LOOKED_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Held:
    """A block's KV over all tiers, as their books have it."""

    tiers: tuple[ShipSource.ValueType, ...]
    tokens: int
    hits: int
    last_used: float
    pinned: bool
    tenant: str

    @classmethod
    def of(cls, entries: Sequence[tuple[ShipSource.ValueType, Entry]]) -> Held:
        """Put together from each tier's entry; at least one."""
        own = [entry for _, entry in entries]
        return cls(
            tiers=tuple(source for source, _ in entries),
            tokens=own[0].tokens,
            hits=max(entry.hits for entry in own),
            last_used=max(entry.last_used for entry in own),
            pinned=any(entry.pinned for entry in own),
            tenant=next((entry.tenant for entry in own if entry.tenant != UNKNOWN_TENANT), UNKNOWN_TENANT),
        )


class Listing:
    """Looks at tiers and records; changes neither.

    A block that only a listing of a tier told of says whose it is in its file's head. Those are read many at once, and
    what a call had no time for is left to the next.

    Args:
        store: The tiers.
        records: The records.
        shape: Of a token's KV.
        seconds: Longest time of one call.
    """

    def __init__(self, store: BlockStore, records: Records, shape: KvShape, *, seconds: float = 10.0) -> None:
        self._store = store
        self._records = records
        self._shape = shape
        self._seconds = seconds

    async def describe(self, request: pb.DescribeStoredRequest) -> tuple[list[pb.StoredBlock], bytes]:
        """Blocks that the request selects, in the order of their keys, and where to go on.

        Returns:
            The blocks, and the last key that was looked at when time ran out; empty when the page is full or the end
            was reached.

        Raises:
            DrystoneError: BLOCK_UNAVAILABLE: a tier could not be read; DEADLINE_EXCEEDED: not even the first block
                could be looked at in time.
        """
        ends = time.monotonic() + self._seconds
        tenant = request.tenant if request.HasField("tenant") else None
        records = await self._selected_records(request, tenant)
        named = set(request.keys)
        keys = set(records) if request.tags else named or self._store.keys().union(records)
        if named:
            keys &= named
        candidates = await asyncio.to_thread(_in_order, keys, request.after_key, request.key_prefix)
        found: list[pb.StoredBlock] = []
        looked_at = b""
        for start in range(0, len(candidates), _LOOKED_AT_ONCE):
            batch = candidates[start : start + _LOOKED_AT_ONCE]
            heads = await self._heads(batch, records, ends, always=request.with_token_ids)
            for key in batch:
                if len(found) == request.page_size > 0:
                    return found, b""
                if key not in heads:
                    if not looked_at:
                        raise deadline_exceeded("looking at stored blocks")
                    return found, looked_at
                looked_at = key
                block = self._described(key, records.get(key), heads[key], tenant)
                if block is not None:
                    if request.with_token_ids:
                        block.token_ids.extend(_token_ids(records.get(key), heads[key]))
                    found.append(block)
        return found, b""

    async def _selected_records(
        self, request: pb.DescribeStoredRequest, tenant: str | None
    ) -> dict[bytes, BlockRecord]:
        if request.keys:
            # Those named may be known to the mirror alone.
            found = list((await self._records.get(list(request.keys))).values())
        else:
            found = await self._records.select(
                key_prefix=request.key_prefix,
                tags=request.tags,
                tenant=tenant,
                after_key=request.after_key,
                limit=request.page_size,
            )
        tags = set(request.tags)
        return {
            record.key: record
            for record in found
            if (tenant is None or record.tenant == tenant) and (not tags or not tags.isdisjoint(record.tags))
        }

    async def _heads(
        self, keys: Sequence[bytes], records: dict[bytes, BlockRecord], ends: float, *, always: bool
    ) -> dict[bytes, BlockHead | None]:
        """Heads of blocks that tell what is not known without; None for others. Keys are left out when time ran out.

        Args:
            keys: Which.
            records: What records tell needs no head.
            ends: When time runs out, on the monotonic clock.
            always: Tokens are wanted too.
        """
        heads: dict[bytes, BlockHead | None] = {}
        reading: dict[bytes, asyncio.Task[BlockHead | None]] = {}
        for key in keys:
            held = self._held(key)
            if key not in records and (always or held is None or held.tenant == UNKNOWN_TENANT):
                reading[key] = asyncio.create_task(self._store.head(key), name="read_head")
            else:
                heads[key] = None
        try:
            if reading:
                await asyncio.wait(reading.values(), timeout=max(0.0, ends - time.monotonic()))
            return heads | {key: task.result() for key, task in reading.items() if task.done()}
        finally:
            await asyncio.gather(*(_ended(task) for task in reading.values()))

    def _described(
        self, key: bytes, record: BlockRecord | None, head: BlockHead | None, tenant: str | None
    ) -> pb.StoredBlock | None:
        """A block as it is; None for one that is not here, or another tenant's."""
        held = self._held(key)
        if record is None and head is None and held is not None and held.tenant == UNKNOWN_TENANT:
            return None  # on the books, and not there
        if record is None and (held is None or (tenant is not None and held.tenant != tenant)):
            return None
        tokens = len(record.token_ids) if record is not None else held.tokens if held is not None else 0
        block = pb.StoredBlock(key=key, tokens=tokens, bytes=self._shape.extent_bytes(tokens))
        if held is not None:
            block.tiers.extend(held.tiers)
            block.hits, block.pinned, block.tenant = held.hits, held.pinned, held.tenant
            block.idle_ms = max(0, int((time.time() - held.last_used) * 1e3))
        if record is not None:
            block.recorded, block.tenant = True, record.tenant
            block.tags.extend(record.tags)
            block.pinned |= record.pinned
            if record.expires_at is not None:
                block.ttl_seconds = max(0, int(record.expires_at - time.time()))
        return block

    def _held(self, key: bytes) -> Held | None:
        entries = self._store.entries_of(key)
        return Held.of(entries) if entries else None


async def _ended(task: asyncio.Task[BlockHead | None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _token_ids(record: BlockRecord | None, head: BlockHead | None) -> Sequence[int]:
    if record is not None:
        return record.token_ids
    return head.token_ids if head is not None else ()


def _in_order(keys: Iterable[bytes], after: bytes, prefix: str) -> list[bytes]:
    """Keys after one and with a beginning, sorted; of 100,000 in a tenth of a second: call it on a thread."""
    return sorted(key for key in keys if key > after and key.hex().startswith(prefix))
