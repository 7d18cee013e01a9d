"""What a prefill worker holds: KV in tiers, and records that outlive it; looked at, pinned, deleted together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prefill_worker.encoder import Encoder
from prefill_worker.records.record import BlockRecord
from prefill_worker.records.records import Records
from prefill_worker.tiers.block_store import BlockStore
from prefill_worker.tiers.ledger import UNKNOWN_TENANT, Entry
from shared.errors import DrystoneError, Reason
from shared.internal.v1 import prefill_pb2 as pb
from shared.internal.v1.common_pb2 import ShipSource
from shared.kv.keys import KeySpace
from shared.kv.layout import KvShape

# An object store answers many deletions in the time of one.
_DELETED_AT_ONCE = 64


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


class Holdings:
    """Tiers and records of one worker.

    Args:
        store: The tiers.
        records: The records.
        encoder: Asked not to keep what is deleted while it is made.
        keys: What this worker's keys are made of.
        shape: Of a token's KV.
    """

    def __init__(self, store: BlockStore, records: Records, encoder: Encoder, keys: KeySpace, shape: KvShape) -> None:
        self.store = store
        self.records = records
        self._encoder = encoder
        self._keys = keys
        self._shape = shape

    def extent_bytes(self, tokens: int) -> int:
        """Bytes of the KV of so many tokens."""
        return self._shape.extent_bytes(tokens)

    async def describe(self, request: pb.DescribeStoredRequest) -> list[pb.StoredBlock]:
        """Blocks that the request selects, in the order of their keys."""
        tenant = request.tenant if request.HasField("tenant") else None
        records = await self._selected_records(request, tenant)
        named = set(request.keys)
        keys = set(records) if request.tags else named or self.store.keys().union(records)
        if named:
            keys &= named
        candidates = await asyncio.to_thread(_in_order, keys, request.after_key, request.key_prefix)
        found: list[pb.StoredBlock] = []
        for key in candidates:
            if len(found) == request.page_size > 0:
                break
            block = await self._described(key, records.get(key), tenant)
            if block is not None:
                if request.with_token_ids:
                    block.token_ids.extend(await self._token_ids(key, records.get(key)))
                found.append(block)
        return found

    async def pin(self, keys: Iterable[bytes], *, pinned: bool) -> list[bytes]:
        """Keeps blocks from eviction in every tier, or lets them go; keys that are known here and changed."""
        named = list(dict.fromkeys(keys))
        recorded = dict.fromkeys(await self.records.set_pinned(named, pinned=pinned))
        changed = [
            key
            for key in named
            if (key in recorded or self.store.entries_of(key)) and self.store.pin(key, pinned=pinned)
        ]
        return list(dict.fromkeys([*recorded, *changed]))

    async def delete(self, keys: Iterable[bytes]) -> tuple[list[bytes], int]:
        """Removes blocks and records everywhere; keys that were known here, and bytes freed.

        Raises:
            DrystoneError: Something may be left; the same call may be made again.
        """
        named = list(dict.fromkeys(keys))
        held = {key for key in named if self.store.entries_of(key)}
        for key in named:
            self._encoder.forget(key)
        recorded = set(await self.records.delete(named))
        freed = 0
        for start in range(0, len(named), _DELETED_AT_ONCE):
            freed += sum(await asyncio.gather(*map(self.store.delete, named[start : start + _DELETED_AT_ONCE])))
        return [key for key in named if key in held or key in recorded], freed

    async def keep_copies(self, records: Sequence[pb.BlockRecord]) -> int:
        """Keeps records of blocks that another worker holds; how many changed.

        Raises:
            DrystoneError: A key is not of its tokens, or there is no room.
        """
        now = time.time()
        copies = [
            BlockRecord(
                key=record.key,
                token_ids=tuple(record.token_ids),
                tenant=record.tenant,
                tenant_salt=record.tenant_salt,
                tags=tuple(record.tags),
                expires_at=now + record.ttl_seconds if record.HasField("ttl_seconds") else None,
                pinned=record.pinned,
            )
            for record in records
        ]
        for copy in copies:
            if not copy.belongs(self._keys):
                raise DrystoneError(Reason.INTERNAL, f"key {copy.key.hex()[:80]} is not of the record's tokens")
        return await self.records.keep(copies)

    async def expire(self) -> None:
        """Lets go of blocks whose records have ended."""
        for key in await self.records.expire():
            self._encoder.forget(key)
            await self.store.delete(key)

    async def _selected_records(
        self, request: pb.DescribeStoredRequest, tenant: str | None
    ) -> dict[bytes, BlockRecord]:
        if request.keys:
            # Those named may be known to the mirror alone.
            found = list((await self.records.get(list(request.keys))).values())
        else:
            found = await self.records.select(
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

    async def _described(self, key: bytes, record: BlockRecord | None, tenant: str | None) -> pb.StoredBlock | None:
        """A block as it is; None for one that is not here, or another tenant's."""
        held = self._held(key)
        if record is None and (held is None or held.tenant == UNKNOWN_TENANT):
            # Known by a listing alone, or to the object store alone: its head says whose it is.
            head = await self.store.head(key)
            held = None if head is None else self._held(key)
        if record is None and (held is None or (tenant is not None and held.tenant != tenant)):
            return None
        tokens = len(record.token_ids) if record is not None else held.tokens if held is not None else 0
        block = pb.StoredBlock(key=key, tokens=tokens, bytes=self.extent_bytes(tokens))
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
        entries = self.store.entries_of(key)
        return Held.of(entries) if entries else None

    async def _token_ids(self, key: bytes, record: BlockRecord | None) -> Sequence[int]:
        if record is not None:
            return record.token_ids
        head = await self.store.head(key)
        return head.token_ids if head is not None else ()


def _in_order(keys: Iterable[bytes], after: bytes, prefix: str) -> list[bytes]:
    """Keys after one and with a beginning, sorted; of 100,000 in a tenth of a second: call it on a thread."""
    return sorted(key for key in keys if key > after and key.hex().startswith(prefix))
