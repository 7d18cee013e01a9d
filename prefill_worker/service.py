"""drystone.internal.v1.Prefill over jobs and holdings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc

from drystone.v1.generation_pb2 import Priority
from prefill_worker.batch_queue import Urgency
from prefill_worker.holdings import Holdings
from prefill_worker.jobs import Errand, Jobs
from prefill_worker.listing import Listing
from prefill_worker.tiers.block_file import TENANT_BYTES_MAX
from shared import logs
from shared.engine.served_model import ServedModel
from shared.enums import enum_name
from shared.errors import DrystoneError, InvalidRequestError, Reason, deadline_exceeded
from shared.internal.v1 import prefill_pb2 as pb
from shared.internal.v1.common_pb2 import BlockFailure, ShipSource
from shared.internal.v1.prefill_pb2_grpc import PrefillServicer
from shared.tracing import NO_TRACING, Tracing, Value

Context = grpc.aio.ServicerContext[Any, Any]
_URGENCIES = {Priority.PRIORITY_HIGH: Urgency.HIGH, Priority.PRIORITY_LOW: Urgency.LOW}


class PrefillService(PrefillServicer):
    """Each job is one task and one span. Leaving the stream cancels its tasks."""

    def __init__(
        self,
        model: ServedModel,
        jobs: Jobs,
        holdings: Holdings,
        default_timeout_seconds: float,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._fingerprint = model.fingerprint
        self._keys = model.key_space()
        self._jobs = jobs
        self._holdings = holdings
        self._listing = Listing(holdings.store, holdings.records, model.geometry.shape)
        self._default_timeout = default_timeout_seconds
        self._tracing = tracing
        self._log = logs.get("prefill")

    async def EncodeBlocks(
        self, request: pb.EncodeBlocksRequest, context: Context
    ) -> AsyncIterator[pb.EncodeBlocksResponse]:
        """An event as each job ends."""
        self._check_model(request.model_fingerprint)
        _check_tenant(request.tenant)
        timeout = request.time_left_ms / 1e3 if request.time_left_ms else self._default_timeout
        with logs.request_scope(request.request_id, request.traceparent):
            self._log.info("encode", jobs=len(request.jobs))
            tasks = [asyncio.create_task(self._outcome(request, job, timeout)) for job in request.jobs]
            try:
                for ended in asyncio.as_completed(tasks):
                    yield await ended
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _errand(self, request: pb.EncodeBlocksRequest, job: pb.EncodeJob) -> Errand:
        warming = not job.HasField("reservation")
        return Errand(
            keys=replace(self._keys, tenant_salt=request.tenant_salt),
            tenant=request.tenant,
            endpoint=request.endpoint,
            urgency=Urgency.WARMING if warming else _URGENCIES.get(request.priority, Urgency.NORMAL),
            tags=tuple(request.tags),
            ttl_seconds=request.ttl_seconds if request.HasField("ttl_seconds") else None,
            keep_records=request.keep_records,
            pin=request.pin,
        )

    async def _traced(self, request: pb.EncodeBlocksRequest, job: pb.EncodeJob, seconds: float) -> pb.BlockDone:
        kind = "ship" if job.HasField("reservation") else "keep"
        about: dict[str, Value] = {"key": job.block.key.hex(), "tokens": len(job.block.token_ids)}
        with self._tracing.span(kind, request.traceparent, **about) as span:
            async with asyncio.timeout(seconds):
                done = await self._jobs.run(job, self._errand(request, job))
            span.set(
                source=enum_name(ShipSource, done.source).removeprefix("SHIP_SOURCE_").lower(),
                bytes=done.bytes,
                queue_ms=done.queue_ms,
                encode_ms=done.encode_ms,
                ship_ms=done.ship_ms,
            )
            return done

    async def _outcome(
        self, request: pb.EncodeBlocksRequest, job: pb.EncodeJob, seconds: float
    ) -> pb.EncodeBlocksResponse:
        try:
            return pb.EncodeBlocksResponse(done=await self._traced(request, job, seconds))
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

    def _check_model(self, fingerprint: bytes) -> None:
        if fingerprint != self._fingerprint:
            raise DrystoneError(Reason.MODEL_CHANGED, "the gateway's keys are of another model than this worker's")

    async def DescribeBlocks(self, request: pb.DescribeStoredRequest, context: Context) -> pb.DescribeStoredResponse:
        """Stored and recorded blocks."""
        blocks, looked_at = await self._listing.describe(request)
        return pb.DescribeStoredResponse(blocks=blocks, looked_at=looked_at)

    async def PinBlocks(self, request: pb.PinStoredRequest, context: Context) -> pb.PinStoredResponse:
        """Keeps blocks from eviction, or lets them go again."""
        return pb.PinStoredResponse(changed=await self._holdings.pin(request.keys, pinned=not request.unpin))

    async def DeleteBlocks(self, request: pb.DeleteStoredRequest, context: Context) -> pb.DeleteStoredResponse:
        """Removes blocks, and their records last; when it answers they are gone."""
        deleted, freed = await self._holdings.delete(request.keys, keep_records=request.keep_records)
        self._log.info("deleted", blocks=len(deleted), bytes_freed=freed)
        return pb.DeleteStoredResponse(deleted=deleted, bytes_freed=freed)

    async def KeepRecords(self, request: pb.KeepRecordsRequest, context: Context) -> pb.KeepRecordsResponse:
        """Keeps copies of another worker's records."""
        self._check_model(request.model_fingerprint)
        return pb.KeepRecordsResponse(changed=await self._holdings.keep_copies(request.records))


def _check_tenant(tenant: str) -> None:
    """Every tier must be able to keep a tenant's blocks, and files have room for so long a name."""
    size = len(tenant.encode())
    if size > TENANT_BYTES_MAX:
        raise InvalidRequestError(
            Reason.INVALID_FIELD,
            "tenant",
            "is too long",
            limit=f"{TENANT_BYTES_MAX} bytes of UTF-8",
            value=f"{size} bytes",
        )
