"""Has prefill workers encode and keep blocks, and copies their records to a second worker."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from drystone.v1.generation_pb2 import Priority
from gateway.cluster import Cluster
from gateway.routing import rendezvous_order
from gateway.tenants import Tenant
from gateway.worker import Worker
from shared import logs
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import BlockFailure, BlockRef, Compatibility, ShipSource
from shared.internal.v1.prefill_pb2 import BlockDone, BlockRecord, EncodeBlocksRequest, EncodeJob, KeepRecordsRequest
from shared.rpc.errors import from_rpc_error

_KEEP_SECONDS = 10.0
_FULL_WAIT_MS = 1000
_AGAIN_SECONDS = 1.0
# Workers that are gone may come back; what else went wrong would go wrong again.
_GONE = frozenset({Reason.WORKER_LOST, Reason.DRAINING, Reason.NO_PREFILL_WORKER})
_COMPUTED = frozenset({ShipSource.SHIP_SOURCE_ENCODED, ShipSource.SHIP_SOURCE_SHARED_ENCODE})


@dataclass(frozen=True, slots=True)
class WarmedBlock:
    """A block that a prefill worker holds now."""

    worker_id: str
    tokens: int
    done: BlockDone

    @property
    def encoded(self) -> bool:
        """True when it was not there before."""
        return self.done.source in _COMPUTED


class BlockWarmer:
    """Warms the blocks of one call.

    Args:
        cluster: The workers; those of another kind than `compatibility` take no part.
        compatibility: The KV that keys were made for.
        request_id: Name of the call, for logs.
        traceparent: Its trace context.
        tenant: Whose blocks they are.
        tags: Kept with their records.
        ttl_seconds: Life of the records; None for the workers' default.
        pin: Keep the blocks from eviction.
        places: Bounds the blocks that workers are asked for at once.
        timeout_seconds: Time that a worker has for a block.
        patience_seconds: How long workers that are gone are waited for.
    """

    def __init__(
        self,
        cluster: Cluster,
        compatibility: Compatibility,
        *,
        request_id: str,
        traceparent: str,
        tenant: Tenant,
        tags: Sequence[str],
        ttl_seconds: int | None,
        pin: bool,
        places: asyncio.Semaphore,
        timeout_seconds: float,
        patience_seconds: float = 60.0,
    ) -> None:
        self._cluster = cluster
        self._compatibility = compatibility
        self._request_id = request_id
        self._traceparent = traceparent
        self._tenant = tenant
        self._tags = tags
        self._pin = pin
        self._places = places
        self._timeout = timeout_seconds
        # One end for all attempts: a record that is kept again is kept alike.
        self._expires = None if ttl_seconds is None else time.time() + ttl_seconds
        self._patience = patience_seconds
        self._log = logs.get("warming")

    async def warm(self, refs: Sequence[BlockRef], *, recorded: bool = True) -> list[WarmedBlock]:
        """Warms blocks at once. The caller bounds the time: a worker that is full is asked again until then.

        Args:
            refs: The blocks.
            recorded: Their keys go to the caller: keep records of them, tagged and pinned as the call asks.

        Raises:
            DrystoneError: A block could be kept by no worker.
        """
        distinct = {bytes(ref.key): ref for ref in refs}
        tasks = [asyncio.create_task(self._warm_one(ref, recorded=recorded)) for ref in distinct.values()]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _warm_one(self, ref: BlockRef, *, recorded: bool) -> WarmedBlock:
        failures: dict[str, DrystoneError] = {}
        patient_until: float | None = None
        while True:
            workers = self._workers()
            order = [name for name in rendezvous_order(ref.key, list(workers)) if name not in failures]
            if not order:
                worst = _worst(failures)
                now = time.monotonic()
                patient_until = now + self._patience if patient_until is None else patient_until
                if worst.reason not in _GONE or now + _AGAIN_SECONDS > patient_until:
                    raise worst
                # A worker that restarts is back in seconds; a corpus must not fail in the meantime.
                await asyncio.sleep(_AGAIN_SECONDS)
                failures.clear()
                continue
            worker = workers[order[0]]
            try:
                async with self._places:
                    done = await self._ask(worker, ref, recorded=recorded)
            except DrystoneError as error:
                if error.reason == Reason.ENCODE_QUEUE_FULL:
                    # Full is not broken: the block belongs to this worker, where requests will look for it.
                    # Not all at the same moment, or all but a few are refused again.
                    spread = random.uniform(1.0, 1.5)  # noqa: S311 - no secret
                    await asyncio.sleep((error.retry_after_ms or _FULL_WAIT_MS) / 1e3 * spread)
                    continue
                self._log.warning("warm_attempt_failed", worker_id=worker.worker_id, detail=error.message)
                failures[worker.worker_id] = error
                continue
            if recorded:
                await self._copy_record(ref, worker.worker_id)
            return WarmedBlock(worker.worker_id, len(ref.token_ids), done)

    def _ttl_left(self) -> int | None:
        return None if self._expires is None else max(1, round(self._expires - time.time()))

    def _workers(self) -> dict[str, Worker]:
        fitting = (worker for worker in self._cluster.prefill_workers if worker.serves(self._compatibility))
        return {worker.worker_id: worker for worker in fitting}

    async def _ask(self, worker: Worker, ref: BlockRef, *, recorded: bool) -> BlockDone:
        request = EncodeBlocksRequest(
            request_id=self._request_id,
            traceparent=self._traceparent,
            time_left_ms=max(1, int(self._timeout * 1e3)),
            jobs=[EncodeJob(block=ref)],
            priority=Priority.PRIORITY_LOW,
            tenant=self._tenant.name,
            tenant_salt=self._tenant.salt,
            model_fingerprint=self._compatibility.model_fingerprint,
            tags=self._tags,
            ttl_seconds=self._ttl_left(),
            keep_records=recorded,
            pin=recorded and self._pin,
        )
        call = worker.prefill().EncodeBlocks(request)
        try:
            async for response in call:
                if response.HasField("failed"):
                    raise _error(response.failed)
                return response.done
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, Reason.WORKER_LOST) from error
        finally:
            call.cancel()
        raise DrystoneError(Reason.WORKER_LOST, f"worker {worker.worker_id} did not say what became of the block")

    async def _copy_record(self, ref: BlockRef, holder: str) -> None:
        """The first other worker in the key's order that can keeps the record too: the key outlives its holder."""
        workers = self._workers()
        record = BlockRecord(
            key=ref.key,
            token_ids=ref.token_ids,
            tenant=self._tenant.name,
            tenant_salt=self._tenant.salt,
            tags=self._tags,
            ttl_seconds=self._ttl_left(),
            pinned=self._pin,
        )
        wanted = KeepRecordsRequest(records=[record], model_fingerprint=self._compatibility.model_fingerprint)
        for name in rendezvous_order(ref.key, [name for name in workers if name != holder]):
            try:
                await workers[name].prefill().KeepRecords(wanted, timeout=_KEEP_SECONDS)
            except grpc.aio.AioRpcError as error:
                self._log.warning("record_not_copied", worker_id=name, detail=error.details())
            else:
                return


def _error(failure: BlockFailure) -> DrystoneError:
    reason = Reason(failure.reason) if failure.reason in Reason.__members__ else Reason.INTERNAL
    return DrystoneError(reason, failure.message, retry_after_ms=failure.retry_after_ms or None)


def _worst(failures: dict[str, DrystoneError]) -> DrystoneError:
    """What is told when every worker failed: the last one's error, and that there was no other."""
    if not failures:
        return DrystoneError(Reason.NO_PREFILL_WORKER, "no prefill worker is ready", retry_after_ms=1000)
    name, last = list(failures.items())[-1]
    return DrystoneError(last.reason, f"no prefill worker could keep the block; {name}: {last.message}")
