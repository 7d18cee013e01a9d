"""drystone.internal.v1.Prefill over an encoder, a store and a shipper."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc

from prefill_worker.encoder import Encoder
from prefill_worker.shipper import Shipper
from prefill_worker.store import RamStore, StoredBlock
from shared import logs
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason, deadline_exceeded, not_in_this_version
from shared.internal.v1 import prefill_pb2 as pb
from shared.internal.v1.common_pb2 import BlockFailure, KvEndpoint, ShipSource
from shared.internal.v1.prefill_pb2_grpc import PrefillServicer
from shared.kv.checks import check_block
from shared.kv.keys import KeySpace

Context = grpc.aio.ServicerContext[Any, Any]


class PrefillService(PrefillServicer):
    """Each job is one task: find or encode, then ship. Leaving the stream cancels its tasks."""

    def __init__(
        self, model: ServedModel, store: RamStore, encoder: Encoder, shipper: Shipper, default_timeout_seconds: float
    ) -> None:
        self._model = model
        self._store = store
        self._encoder = encoder
        self._shipper = shipper
        self._default_timeout = default_timeout_seconds
        self._keys = model.key_space()
        self._log = logs.get("prefill")

    async def EncodeBlocks(
        self, request: pb.EncodeBlocksRequest, context: Context
    ) -> AsyncIterator[pb.EncodeBlocksResponse]:
        """An event as each job ends."""
        if bytes(request.model_fingerprint) != self._model.fingerprint:
            raise DrystoneError(Reason.MODEL_CHANGED, "the gateway's keys are of another model than this worker's")
        timeout = request.time_left_ms / 1e3 if request.time_left_ms else self._default_timeout
        keys = replace(self._keys, tenant_salt=request.tenant_salt)
        with logs.request_scope(request.request_id, request.traceparent):
            self._log.info("encode", jobs=len(request.jobs))
            tasks = [asyncio.create_task(self._outcome(job, request.endpoint, keys, timeout)) for job in request.jobs]
            try:
                for ended in asyncio.as_completed(tasks):
                    yield await ended
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _outcome(
        self, job: pb.EncodeJob, endpoint: KvEndpoint, keys: KeySpace, seconds: float
    ) -> pb.EncodeBlocksResponse:
        try:
            async with asyncio.timeout(seconds):
                return pb.EncodeBlocksResponse(done=await self._run(job, endpoint, keys))
        except TimeoutError:
            error = deadline_exceeded("encoding and shipping a block")
        except DrystoneError as caught:
            error = caught
        except Exception as defect:  # noqa: BLE001 - one block's defect must not end the others of its request
            self._log.error("job_defect", key=job.block.key.hex(), exc_info=defect)
            error = DrystoneError(Reason.INTERNAL, f"a block could not be encoded or shipped: {defect}")
        self._log.warning("job_failed", key=job.block.key.hex(), reason=error.reason, detail=error.message)
        failure = BlockFailure(
            key=job.block.key,
            reason=error.reason,
            message=error.message,
            retryable=error.retryable,
            retry_after_ms=error.retry_after_ms or 0,
        )
        return pb.EncodeBlocksResponse(failed=failure)

    async def _run(self, job: pb.EncodeJob, endpoint: KvEndpoint, keys: KeySpace) -> pb.BlockDone:
        done = pb.BlockDone(key=job.block.key)
        stored = self._store.get(job.block.key)
        if stored is not None:
            done.source = ShipSource.SHIP_SOURCE_RAM
            await self._ship(stored, job, endpoint, done)
            return done
        if not job.block.token_ids:
            raise DrystoneError(Reason.UNKNOWN_BLOCK_KEY, f"this worker does not hold block {job.block.key.hex()}")
        check_block(job.block, keys, self._model.vocabulary_size)
        encoding, shared = self._encoder.request(job.block.key, job.block.token_ids, store=job.block.store)
        try:
            block = await asyncio.shield(encoding.done)
            done.source = ShipSource.SHIP_SOURCE_SHARED_ENCODE if shared else ShipSource.SHIP_SOURCE_ENCODED
            done.encode_ms, done.queue_ms = (0.0 if shared else encoding.encode_ms), encoding.queue_ms
            await self._ship(block, job, endpoint, done)
        finally:
            self._encoder.leave(encoding)
        return done

    async def _ship(self, block: StoredBlock, job: pb.EncodeJob, endpoint: KvEndpoint, done: pb.BlockDone) -> None:
        done.birth_id = block.birth.birth_id
        if job.HasField("reservation"):
            began = time.monotonic()
            shipped = await self._shipper.ship(block, job.reservation, endpoint)
            done.ship_ms = (time.monotonic() - began) * 1e3
            done.shipped_bytes, done.chunks_resent = shipped.bytes, shipped.chunks_resent

    async def DescribeBlocks(self, request: pb.DescribeStoredRequest, context: Context) -> pb.DescribeStoredResponse:
        """Stored blocks."""
        found = [self._store.peek(key) for key in request.keys] if request.keys else self._store.all()
        now = time.monotonic()
        return pb.DescribeStoredResponse(
            blocks=[
                pb.StoredBlock(
                    key=block.key,
                    tokens=len(block.token_ids),
                    token_ids=block.token_ids if request.with_token_ids else (),
                    tiers=[ShipSource.SHIP_SOURCE_RAM],
                    bytes=block.bytes,
                    hits=block.hits,
                    idle_ms=int((now - block.last_used) * 1e3),
                    pinned=block.pinned,
                )
                for block in found
                if block is not None
            ]
        )

    async def PinBlocks(self, request: pb.PinStoredRequest, context: Context) -> pb.PinStoredResponse:
        """Not in this version."""
        raise not_in_this_version("Prefill.PinBlocks")

    async def DeleteBlocks(self, request: pb.DeleteStoredRequest, context: Context) -> pb.DeleteStoredResponse:
        """Not in this version."""
        raise not_in_this_version("Prefill.DeleteBlocks")
