"""What a prefill worker holds: KV in tiers, and records that outlive it; pinned and deleted together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence

from prefill_worker.encoder import Encoder
from prefill_worker.records.record import BlockRecord
from prefill_worker.records.records import Records
from prefill_worker.tiers.block_store import BlockStore
from shared import logs
from shared.errors import DrystoneError, Reason
from shared.internal.v1 import prefill_pb2 as pb
from shared.kv.keys import KeySpace
from shared.kv.layout import KvShape

# An object store answers many deletions in the time of one.
_DELETED_AT_ONCE = 64


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
        self._log = logs.get("prefill")
        records.on_pinned = lambda key: store.pin(key, pinned=True)

    def extent_bytes(self, tokens: int) -> int:
        """Bytes of the KV of so many tokens."""
        return self._shape.extent_bytes(tokens)

    async def pin(self, keys: Iterable[bytes], *, pinned: bool) -> list[bytes]:
        """Keeps blocks from eviction in every tier, or lets them go; keys that are known here and changed."""
        named = list(dict.fromkeys(keys))
        changed = set(await self.records.set_pinned(named, pinned=pinned))
        recorded = await self.records.get(named)
        for key in named:
            # A pin without record or KV would never go; letting go needs neither.
            known = not pinned or key in recorded or self.store.entries_of(key)
            if known and self.store.pin(key, pinned=pinned):
                changed.add(key)
        return [key for key in named if key in changed]

    async def delete(self, keys: Iterable[bytes], *, keep_records: bool = False) -> tuple[list[bytes], int]:
        """Removes blocks and records everywhere; keys that were known here, and bytes freed.

        Records go last: until the KV is gone from every tier they are what finds the blocks again.

        Args:
            keys: Which.
            keep_records: Leave the records; a later call without this removes them.

        Raises:
            DrystoneError: KV may be left, and all records are; the same call may be made again.
        """
        named = list(dict.fromkeys(keys))
        held = {key for key in named if self.store.entries_of(key)}
        freed, failures = 0, list[BaseException]()
        for outcome in (await self._delete_kv(named)).values():
            if isinstance(outcome, BaseException):
                failures.append(outcome)
            else:
                freed += outcome
        if failures:
            raise failures[0]
        recorded = set() if keep_records else set(await self.records.delete(named))
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
        await self.records.expire(self._let_go)

    async def _let_go(self, keys: Sequence[bytes]) -> list[bytes]:
        outcomes = await self._delete_kv(keys)
        failures = {key: error for key, error in outcomes.items() if isinstance(error, BaseException)}
        if failures:
            self.records.figures.not_expired += len(failures)
            self._log.warning(
                "blocks_not_expired", blocks=len(failures), error=repr(next(iter(failures.values())))[:300]
            )
        return [key for key in keys if key not in failures]

    async def _delete_kv(self, keys: Sequence[bytes]) -> dict[bytes, int | BaseException]:
        """Bytes freed, or what went wrong, by key. All are tried, and none is left under way."""
        for key in keys:
            self._encoder.forget(key)
        outcomes: dict[bytes, int | BaseException] = {}
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            batch = keys[start : start + _DELETED_AT_ONCE]
            ended = await asyncio.gather(*map(self.store.delete, batch), return_exceptions=True)
            outcomes.update(zip(batch, ended, strict=True))
        return outcomes
