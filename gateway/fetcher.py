"""Getting missing blocks shipped: prefill workers in hash order, then the decode worker itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import grpc

from gateway.cluster import Cluster, Worker
from gateway.routing import prefill_order
from shared import logs
from shared.errors import Reason
from shared.internal.v1.common_pb2 import BlockRef, KvEndpoint, Reservation
from shared.internal.v1.decode_pb2 import EncodeHere, GenerateRequest, Missing
from shared.internal.v1.prefill_pb2 import BlockDone, EncodeBlocksRequest, EncodeJob
from shared.rpc.errors import from_rpc_error


@dataclass(slots=True, eq=False)
class FetchRecord:
    """How a block came, as far as this gateway saw."""

    done: BlockDone | None = None
    worker_id: str = ""
    failed_attempts: list[str] = field(default_factory=list)


class Fetcher:
    """Drives the fetches of one request. `close` cancels whatever is under way.

    Args:
        blocks: The request's blocks by key.
        send: Sends a message to the decode worker.
        deadline: `time.monotonic()` of the request's end.
    """

    def __init__(
        self,
        cluster: Cluster,
        blocks: Mapping[bytes, BlockRef],
        send: Callable[[GenerateRequest], None],
        *,
        request_id: str,
        traceparent: str,
        deadline: float,
        attempts: int,
        timeout_seconds: float,
    ) -> None:
        self._cluster = cluster
        # Kept: the decode worker may fail a look, and be unusable for others, while this request runs on it.
        self._model_fingerprint = cluster.info.compatibility.model_fingerprint
        self._blocks = blocks
        self._send = send
        self._request_id = request_id
        self._traceparent = traceparent
        self._deadline = deadline
        self._attempts = attempts
        self._timeout = timeout_seconds
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = logs.get("fetcher")
        self.records: dict[bytes, FetchRecord] = {}
        self.retries = 0

    def drive(self, missing: Missing) -> None:
        """Begins to fetch what the decode worker misses."""
        reservations = {bytes(block.key): block.reservation for block in missing.blocks}
        for key in reservations:
            self.records.setdefault(key, FetchRecord())
        self._spread(reservations, missing.endpoint, tried={})

    async def close(self) -> None:
        """Withdraws interest in everything that is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spread(
        self, reservations: Mapping[bytes, Reservation], endpoint: KvEndpoint, tried: Mapping[bytes, frozenset[str]]
    ) -> None:
        """Sends each block to its next worker; those that have no next one are encoded where they are needed."""
        workers = {worker.worker_id: worker for worker in self._cluster.prefill_workers}
        groups: dict[str, dict[bytes, Reservation]] = {}
        here: list[Reservation] = []
        loads = {name: worker.load for name, worker in workers.items()}
        for key, reservation in reservations.items():
            before = tried.get(key, frozenset())
            left = {name: load for name, load in loads.items() if name not in before}
            if not left or len(before) >= self._attempts:
                here.append(reservation)
                continue
            chosen = prefill_order(key, left)[0]
            loads[chosen] += 1
            groups.setdefault(chosen, {})[key] = reservation
        if here:
            self._send(GenerateRequest(call_id=1, encode_here=EncodeHere(reservations=here)))
        for name, group in groups.items():
            task = asyncio.create_task(self._ask(workers[name], group, endpoint, tried))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _ask(
        self,
        worker: Worker,
        group: Mapping[bytes, Reservation],
        endpoint: KvEndpoint,
        tried: Mapping[bytes, frozenset[str]],
    ) -> None:
        left = dict(group)
        worker.load += len(group)
        try:
            async with asyncio.timeout(min(self._timeout, self._deadline - time.monotonic())):
                call = worker.prefill().EncodeBlocks(self._request(group, endpoint))
                async for response in call:
                    failure = response.failed if response.HasField("failed") else None
                    key = bytes(failure.key if failure is not None else response.done.key)
                    if failure is not None:
                        self._note(key, worker, f"{failure.reason}: {failure.message}")
                        if failure.reason == Reason.RESERVATION_ENDED:
                            left.pop(key, None)  # another drive, or another worker's bytes, made this one needless
                        continue
                    left.pop(key, None)
                    self.records[key].done, self.records[key].worker_id = response.done, worker.worker_id
        except TimeoutError:
            self._note_all(left, worker, "no answer in time")
        except grpc.aio.AioRpcError as error:
            caught = from_rpc_error(error, Reason.WORKER_LOST)
            self._note_all(left, worker, f"{caught.reason}: {caught.message}")
        finally:
            worker.load -= len(group)
        if left:
            self.retries += len(left)
            now_tried = {key: tried.get(key, frozenset()) | {worker.worker_id} for key in left}
            self._spread(left, endpoint, now_tried)

    def _request(self, group: Mapping[bytes, Reservation], endpoint: KvEndpoint) -> EncodeBlocksRequest:
        return EncodeBlocksRequest(
            request_id=self._request_id,
            traceparent=self._traceparent,
            time_left_ms=max(1, int((self._deadline - time.monotonic()) * 1e3)),
            jobs=[EncodeJob(block=self._blocks[key], reservation=promise) for key, promise in group.items()],
            endpoint=endpoint,
            model_fingerprint=self._model_fingerprint,
        )

    def _note(self, key: bytes, worker: Worker, problem: str) -> None:
        self.records[key].failed_attempts.append(f"{worker.worker_id}: {problem}")
        self._log.warning("fetch_attempt_failed", key=key.hex(), worker_id=worker.worker_id, detail=problem)

    def _note_all(self, keys: Iterable[bytes], worker: Worker, problem: str) -> None:
        for key in keys:
            self._note(key, worker, problem)


async def token_ids_of(cluster: Cluster, keys: list[str]) -> dict[str, tuple[int, ...]]:
    """Token ids of blocks that callers name by key, as far as a prefill worker knows them."""
    from shared.internal.v1.prefill_pb2 import DescribeStoredRequest

    found: dict[str, tuple[int, ...]] = {}
    wanted = DescribeStoredRequest(keys=[bytes.fromhex(key) for key in keys], with_token_ids=True)
    for worker in cluster.prefill_workers if keys else ():
        try:
            answer = await worker.prefill().DescribeBlocks(wanted, timeout=5.0)
        except grpc.aio.AioRpcError:
            continue  # the cluster's next look will say what is wrong with it
        found.update({bytes(block.key).hex(): tuple(block.token_ids) for block in answer.blocks})
    return found
