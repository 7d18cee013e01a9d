"""One job of a gateway: a block that is found or encoded, then shipped to a decode worker, or kept.

    in memory? ── yes ─────────────────────────────────────────────┐
        │ no                                                       ▼
    on disk, in the object store? ── yes: into memory ────────► ship ──► done
        │ no                                                       ▲
    encode (joined by whoever else wants it) ──────────────────────┘  its first layers leave while later ones are made

The extent that the forward filled is the buffer that memory keeps, that files are written from and that links send:
on a CPU no byte of KV is copied between them (docs/prefill.md counts the copies).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from prefill_worker.batch_queue import Urgency
from prefill_worker.encoder import Encoder
from prefill_worker.encoding import Encoding
from prefill_worker.holdings import Holdings
from prefill_worker.newborn import Newborn
from prefill_worker.records.record import BlockRecord
from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.deletions import Watch
from prefill_worker.transfer.errors import SourceLostError
from prefill_worker.transfer.shipper import Shipper
from shared.errors import DrystoneError, Reason
from shared.internal.v1 import prefill_pb2 as pb
from shared.internal.v1.common_pb2 import BlockRef, KvEndpoint, ShipSource
from shared.kv.checks import check_block
from shared.kv.keys import KeySpace


@dataclass(frozen=True, slots=True)
class Errand:
    """What all jobs of a call share.

    Attributes:
        keys: What their keys are made of, the tenant's salt among it.
        tenant: Whose blocks they are.
        endpoint: Where they are shipped.
        urgency: Who is encoded first.
        tags: Kept with records.
        ttl_seconds: Life of records; None is for ever.
        keep_records: Keep a record of each block.
        pin: Keep the blocks from eviction.
    """

    keys: KeySpace
    tenant: str
    endpoint: KvEndpoint
    urgency: Urgency
    tags: tuple[str, ...] = ()
    ttl_seconds: float | None = None
    keep_records: bool = False
    pin: bool = False


class Jobs:
    """Runs jobs. Leaving one withdraws its interest in the encoding."""

    def __init__(self, holdings: Holdings, encoder: Encoder, shipper: Shipper, vocabulary_size: int) -> None:
        self._holdings = holdings
        self._encoder = encoder
        self._shipper = shipper
        self._vocabulary_size = vocabulary_size

    async def run(self, job: pb.EncodeJob, errand: Errand) -> pb.BlockDone:
        """Does a job; the caller bounds its time.

        Raises:
            DrystoneError: It could not be done; other jobs are not touched by that.
        """
        if job.block.token_ids:
            check_block(job.block, errand.keys, self._vocabulary_size)
        await self._note(job.block, errand)
        if job.HasField("reservation"):
            return await self._ship(job, errand)
        return await self._keep(job.block, errand)

    async def _note(self, ref: BlockRef, errand: Errand) -> None:
        """The record first: should the KV never be made, the key is valid all the same."""
        if errand.keep_records:
            expires = None if errand.ttl_seconds is None else time.time() + errand.ttl_seconds
            record = BlockRecord(
                key=ref.key,
                token_ids=tuple(ref.token_ids),
                tenant=errand.tenant,
                tenant_salt=errand.keys.tenant_salt,
                tags=errand.tags,
                expires_at=expires,
                pinned=errand.pin,
            )
            await self._holdings.records.keep([record])
        if errand.pin:
            self._holdings.store.pin(ref.key, pinned=True)

    async def _ship(self, job: pb.EncodeJob, errand: Errand) -> pb.BlockDone:
        done = pb.BlockDone(key=job.block.key)
        found = await self._holdings.store.find(job.block.key, len(job.block.token_ids) or None)
        if found is not None:
            block, done.source = found
            await self._send(block, job, errand, done)
            return done
        ref = job.block if job.block.token_ids else await self._recorded(job.block, errand)
        # Others may have made it while tiers and records were asked; nothing is awaited from here to the request.
        made = self._holdings.store.in_memory(ref.key)
        if made is not None:
            done.source = ShipSource.SHIP_SOURCE_RAM
            await self._send(made, job, errand, done)
            return done
        encoding, shared = self._encoder.request(
            ref.key, ref.token_ids, store=ref.store, urgency=errand.urgency, tenant=errand.tenant
        )
        try:
            await self._send_early(encoding, job, errand, done)
            _tell(done, encoding, shared=shared)
        finally:
            self._encoder.leave(encoding)
        return done

    async def _send_early(self, encoding: Encoding, job: pb.EncodeJob, errand: Errand, done: pb.BlockDone) -> None:
        """Ships the first layers while the later ones are made; the whole block, where that forward failed."""
        source = await asyncio.shield(encoding.begun)
        try:
            await self._send(source, job, errand, done)
        except SourceLostError:
            # The next forward of the encoding, if there is one, has another birth: nothing of this one was committed.
            await self._send(await asyncio.shield(encoding.done), job, errand, done)
        else:
            await asyncio.shield(encoding.done)

    async def _send(self, source: StoredBlock | Newborn, job: pb.EncodeJob, errand: Errand, done: pb.BlockDone) -> None:
        began = time.monotonic()
        shipped = await self._shipper.ship(source, job.reservation, errand.endpoint)
        done.birth_id, done.bytes = source.birth_id, source.bytes
        done.ship_ms = (time.monotonic() - began) * 1e3
        done.shipped_bytes, done.chunks_resent = shipped.bytes, shipped.chunks_resent

    async def _keep(self, ref: BlockRef, errand: Errand) -> pb.BlockDone:
        """Warming: done once the block is in every tier that can keep it."""
        store = self._holdings.store
        done = pb.BlockDone(key=ref.key)
        with store.watch(ref.key) as watch:
            if await store.where(ref.key):
                tiers = await store.kept(ref.key)
            else:
                whole = ref if ref.token_ids else await self._recorded(ref, errand)
                # Others may have made it meanwhile; nothing is awaited from here to the request.
                if store.in_memory(ref.key) is not None:
                    tiers = await store.kept(ref.key)
                else:
                    tiers = await self._encode_and_keep(whole, errand, done, watch)
        if watch.deleted:
            raise _deleted_meanwhile()
        if not tiers:
            raise DrystoneError(
                Reason.BLOCK_UNAVAILABLE,
                "the block was encoded and no tier of the worker keeps it: they are too small, full of pinned blocks, "
                "or cannot be written",
            )
        done.tiers.extend(tiers)
        done.source = done.source or tiers[0]
        done.bytes = self._holdings.extent_bytes(len(ref.token_ids))
        return done

    async def _encode_and_keep(
        self, ref: BlockRef, errand: Errand, done: pb.BlockDone, watch: Watch
    ) -> tuple[ShipSource.ValueType, ...]:
        """Tiers that keep the block.

        The encoding is left only when they have it: until then its bytes count as unshipped, and the encoder pauses
        rather than fill memory ahead of slow tiers. Tiers never wait for the encoder, so this comes to an end.
        """
        encoding, shared = self._encoder.request(
            ref.key, ref.token_ids, store=True, urgency=errand.urgency, tenant=errand.tenant
        )
        try:
            block = await asyncio.shield(encoding.done)
            if watch.deleted or not encoding.store:
                raise _deleted_meanwhile()
            done.birth_id = block.birth.birth_id
            _tell(done, encoding, shared=shared)
            return await self._holdings.store.kept(ref.key, block)
        finally:
            self._encoder.leave(encoding)

    async def _recorded(self, ref: BlockRef, errand: Errand) -> BlockRef:
        """A block that came without its tokens, with those of its record."""
        record = (await self._holdings.records.get([ref.key])).get(ref.key)
        if record is None or errand.keys.key(record.token_ids) != ref.key:
            raise DrystoneError(Reason.UNKNOWN_BLOCK_KEY, f"this worker does not know block {ref.key.hex()}")
        return BlockRef(key=ref.key, token_ids=record.token_ids, store=ref.store)


def _tell(done: pb.BlockDone, encoding: Encoding, *, shared: bool) -> None:
    done.source = ShipSource.SHIP_SOURCE_SHARED_ENCODE if shared else ShipSource.SHIP_SOURCE_ENCODED
    done.encode_ms, done.queue_ms = (0.0 if shared else encoding.encode_ms), encoding.queue_ms


def _deleted_meanwhile() -> DrystoneError:
    return DrystoneError(Reason.BLOCK_UNAVAILABLE, "the block was deleted meanwhile")
