"""What a prefill worker holds: KV in tiers, and records that outlive it; looked at, pinned, deleted together."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prefill_worker.encoder import Encoder
from prefill_worker.records.record import BlockRecord
from prefill_worker.records.records import Records
from prefill_worker.tiers.block_store import BlockStore
from prefill_worker.tiers.ledger import Entry
from shared.errors import DrystoneError, Reason
from shared.internal.v1 import prefill_pb2 as pb
from shared.internal.v1.common_pb2 import ShipSource
from shared.kv.keys import KeySpace
from shared.kv.layout import KvShape


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
            tenant=next((entry.tenant for entry in own if entry.tenant), ""),
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
        records = {
            record.key: record
            for record in await self.records.select(
                keys=request.keys,
                key_prefix=request.key_prefix,
                tags=request.tags,
                tenant=tenant,
                after_key=request.after_key,
                limit=request.page_size,
            )
        }
        keys, held = set(records), self._held()
        if request.keys:
            # A key may be known to the object store alone, and its record to the mirror alone.
            for key, record in (await self.records.get([key for key in request.keys if key not in keys])).items():
                if _matches(request, record):
                    records[key] = record
                    keys.add(key)
        if not request.tags:
            wanted = set(request.keys)
            keys.update(
                key
                for key, one in held.items()
                if (not wanted or key in wanted)
                and (tenant is None or one.tenant == tenant)
                and key > request.after_key
                and key.hex().startswith(request.key_prefix)
            )
        ordered = sorted(keys)[: request.page_size or None]
        found = [self._described(key, held.get(key), records.get(key)) for key in ordered]
        if request.with_token_ids:
            for block in found:
                block.token_ids.extend(await self._token_ids(block, records.get(block.key)))
        return found

    async def pin(self, keys: Iterable[bytes], *, pinned: bool) -> list[bytes]:
        """Keeps blocks from eviction in every tier, or lets them go; keys that are known here and changed."""
        named = list(dict.fromkeys(keys))
        recorded = await self.records.set_pinned(named, pinned=pinned)
        entries = self.store.entries()
        known = [key for key in named if key in entries or key in recorded]
        changed = [key for key in known if self.store.pin(key, pinned=pinned)]
        return list(dict.fromkeys([*recorded, *changed]))

    async def delete(self, keys: Iterable[bytes]) -> tuple[list[bytes], int]:
        """Removes blocks and records everywhere; keys that were known here, and bytes freed.

        Raises:
            DrystoneError: Something may be left; the same call may be made again.
        """
        named = list(dict.fromkeys(keys))
        held = self.store.entries()
        for key in named:
            self._encoder.forget(key)
        recorded = await self.records.delete(named)
        freed = 0
        for key in named:
            freed += await self.store.delete(key)
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

    def _held(self) -> dict[bytes, Held]:
        return {key: Held.of(entries) for key, entries in self.store.entries().items()}

    async def _token_ids(self, block: pb.StoredBlock, record: BlockRecord | None) -> Sequence[int]:
        if record is not None:
            return record.token_ids
        found = await self.store.find(block.key, None)
        return found[0].token_ids if found is not None else ()

    def _described(self, key: bytes, held: Held | None, record: BlockRecord | None) -> pb.StoredBlock:
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


def _matches(request: pb.DescribeStoredRequest, record: BlockRecord) -> bool:
    return (
        (not request.HasField("tenant") or record.tenant == request.tenant)
        and (not request.tags or not set(request.tags).isdisjoint(record.tags))
        and record.key > request.after_key
        and record.key.hex().startswith(request.key_prefix)
    )
