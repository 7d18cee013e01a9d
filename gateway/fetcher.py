"""Getting missing blocks shipped: prefill workers in hash order, then the decode worker itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import grpc

from gateway.cluster import Cluster
from gateway.routing import prefill_order
from gateway.ticket import Ticket
from gateway.worker import Worker
from shared import logs
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import BlockFailure, KvEndpoint, Reservation
from shared.internal.v1.decode_pb2 import EncodeHere, FetchFailed, GenerateRequest, Missing
from shared.internal.v1.prefill_pb2 import BlockDone, EncodeBlocksRequest, EncodeBlocksResponse, EncodeJob
from shared.rpc.errors import from_rpc_error
from shared.tracing import NO_TRACING, Span, Tracing, Value

CALL_ID = 1
_SETTLE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """How hard a fetch is tried; see `GatewaySettings`."""

    attempts: int
    timeout_seconds: float


@dataclass(slots=True, eq=False)
class FetchRecord:
    """How a block came, as far as this gateway saw."""

    done: BlockDone | None = None
    worker_id: str = ""
    failed_attempts: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Wanted:
    """One reservation on its way: whom it was asked of, and what each of them said."""

    key: bytes
    reservation: Reservation
    endpoint: KvEndpoint
    tried: dict[str, BlockFailure] = field(default_factory=dict)

    @property
    def attempts(self) -> int:
        """Attempts that cost time: a full queue says no at once."""
        return sum(failure.reason != Reason.ENCODE_QUEUE_FULL for failure in self.tried.values())


class Fetcher:
    """Drives the fetches of one request. `close` cancels whatever is under way.

    Args:
        cluster: The workers.
        ticket: The request.
        send: Sends a message to the decode worker.
        policy: How hard fetches are tried.
        tracing: Makes a span of each call of a prefill worker.
    """

    def __init__(
        self,
        cluster: Cluster,
        ticket: Ticket,
        send: Callable[[GenerateRequest], None],
        policy: FetchPolicy,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._cluster = cluster
        self._ticket = ticket
        self._blocks = {bytes(ref.key): ref for ref in ticket.refs}
        self._send = send
        self._policy = policy
        self._tracing = tracing
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: dict[bytes, asyncio.TimerHandle] = {}
        self._arrived = False
        self._log = logs.get("fetcher")
        self.records: dict[bytes, FetchRecord] = {}
        self.retries = 0
        # Set when every prefill worker's queue was full: what the client is told when the call then fails.
        self.overload: DrystoneError | None = None

    def drive(self, missing: Missing) -> None:
        """Begins to fetch what the decode worker misses."""
        wanted = [_Wanted(bytes(block.key), block.reservation, missing.endpoint) for block in missing.blocks]
        for one in wanted:
            self.records.setdefault(one.key, FetchRecord())
        self._spread(wanted)

    def all_arrived(self) -> None:
        """The decode worker has gone on: every block is there."""
        self._arrived = True
        self._stop_timers()

    async def settle(self, keys: Iterable[bytes]) -> None:
        """Waits a little for what prefill workers say of blocks that have arrived: an answer may overtake it."""
        awaited = [key for key in keys if key in self.records and self.records[key].done is None]
        if awaited and self._tasks:
            await asyncio.wait(set(self._tasks), timeout=_SETTLE_SECONDS)

    async def close(self) -> None:
        """Withdraws interest in everything that is under way."""
        self.all_arrived()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spread(self, wanted: Iterable[_Wanted]) -> None:
        """Sends each block to its next worker; those that have no next one are encoded where they are needed."""
        compatibility = self._ticket.compatibility
        workers = {one.worker_id: one for one in self._cluster.prefill_workers if one.serves(compatibility)}
        groups: dict[str, list[_Wanted]] = {}
        here: list[_Wanted] = []
        loads = {name: worker.load for name, worker in workers.items()}
        for one in wanted:
            left = {name: load for name, load in loads.items() if name not in one.tried}
            if not left or one.attempts >= self._policy.attempts:
                here.append(one)
                continue
            chosen = prefill_order(one.key, left)[0]
            loads[chosen] += 1
            groups.setdefault(chosen, []).append(one)
        self._give_up(here)
        for name, group in groups.items():
            task = asyncio.create_task(self._ask(workers[name], group))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _give_up(self, wanted: Iterable[_Wanted]) -> None:
        """No prefill worker is left: the decode worker encodes, unless all were merely full (design §6)."""
        here, full = list[Reservation](), list[_Wanted]()
        for one in wanted:
            if one.tried and not one.attempts:
                full.append(one)
            else:
                here.append(one.reservation)
        if here:
            self._send(GenerateRequest(call_id=CALL_ID, encode_here=EncodeHere(reservations=here)))
        if full:
            failures = [max(one.tried.values(), key=lambda each: each.retry_after_ms) for one in full]
            delay = max(failure.retry_after_ms for failure in failures)
            said = f"every prefill worker's queue is full: {failures[0].message}"
            self.overload = DrystoneError(Reason.ENCODE_QUEUE_FULL, said, retry_after_ms=delay or None)
            failed = FetchFailed(reservations=[one.reservation for one in full], failures=failures)
            self._send(GenerateRequest(call_id=CALL_ID, fetch_failed=failed))

    async def _ask(self, worker: Worker, group: Iterable[_Wanted]) -> None:
        left = {one.key: one for one in group}
        worker.load += len(left)
        try:
            about: dict[str, Value] = {"worker": worker.worker_id, "blocks": len(left)}
            with self._tracing.span("fetch", self._ticket.traceparent, **about) as span:
                problem = await self._listen(worker, left, span)
                for one in left.values():
                    span.event("failed", key=one.key.hex(), reason=problem.reason, detail=problem.message)
        finally:
            worker.load -= len(left)
        self._next(list(left.values()), worker, problem)

    async def _listen(self, worker: Worker, left: dict[bytes, _Wanted], span: Span) -> BlockFailure:
        """Takes what ends out of `left` as it ends; returns what is wrong with the rest."""
        try:
            async with asyncio.timeout(min(self._policy.timeout_seconds, self._seconds_left())):
                call = worker.prefill().EncodeBlocks(self._request(left.values(), span.traceparent))
                try:
                    async for response in call:
                        self._take(response, worker, left, span)
                finally:
                    call.cancel()
        except TimeoutError:
            return BlockFailure(message="no answer in time")
        except grpc.aio.AioRpcError as error:
            caught = from_rpc_error(error, Reason.WORKER_LOST)
            delay = caught.retry_after_ms or 0
            return BlockFailure(reason=caught.reason, message=caught.message, retry_after_ms=delay)
        except Exception as error:  # noqa: BLE001 - whatever it was, the blocks are asked of the next worker
            self._log.error("fetch_defect", worker_id=worker.worker_id, exc_info=error)
            return BlockFailure(reason=Reason.INTERNAL, message=f"{type(error).__name__} at the gateway")
        return BlockFailure(message="ended without saying what became of it")

    def _take(self, response: EncodeBlocksResponse, worker: Worker, left: dict[bytes, _Wanted], span: Span) -> None:
        kind = response.WhichOneof("outcome")
        if kind is None:
            return
        one = left.pop(bytes(response.failed.key if kind == "failed" else response.done.key), None)
        if one is None:
            return  # not asked for here, or told twice
        worker.load -= 1
        if kind == "failed":
            failed = response.failed
            span.event("failed", key=one.key.hex(), reason=failed.reason, detail=failed.message)
            self._next([one], worker, failed)
            return
        self.records[one.key].done, self.records[one.key].worker_id = response.done, worker.worker_id
        self._expect(one)

    def _next(self, wanted: list[_Wanted], worker: Worker, problem: BlockFailure) -> None:
        """Notes that a worker failed to ship blocks, and sends them to their next ones."""
        said = f"{problem.reason}: {problem.message}" if problem.reason else problem.message
        for one in wanted:
            self.records[one.key].failed_attempts.append(f"{worker.worker_id}: {said}")
            self._log.warning("fetch_attempt_failed", key=one.key.hex(), worker_id=worker.worker_id, detail=said)
            one.tried[worker.worker_id] = BlockFailure(
                key=one.key, reason=problem.reason, message=problem.message, retry_after_ms=problem.retry_after_ms
            )
        # Another drive, or another worker's bytes, made such a one needless.
        if wanted and problem.reason != Reason.RESERVATION_ENDED:
            self.retries += len(wanted)
            self._spread(wanted)

    def _expect(self, one: _Wanted) -> None:
        """A block was said to be shipped. Should the decode worker not go on, it encodes the block itself.

        When it was in fact committed, the worker knows the reservation no more and ignores the message.
        """
        if (earlier := self._timers.pop(one.key, None)) is not None:
            earlier.cancel()
        if not self._arrived:
            loop = asyncio.get_running_loop()
            message = GenerateRequest(call_id=CALL_ID, encode_here=EncodeHere(reservations=[one.reservation]))
            self._timers[one.key] = loop.call_later(self._policy.timeout_seconds, self._send, message)

    def _stop_timers(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _seconds_left(self) -> float:
        return self._ticket.deadline - time.monotonic()

    def _request(self, wanted: Iterable[_Wanted], traceparent: str) -> EncodeBlocksRequest:
        asked = list(wanted)
        return EncodeBlocksRequest(
            request_id=self._ticket.request_id,
            traceparent=traceparent,
            time_left_ms=max(1, int(self._seconds_left() * 1e3)),
            jobs=[EncodeJob(block=self._blocks[one.key], reservation=one.reservation) for one in asked],
            endpoint=asked[0].endpoint,
            priority=self._ticket.request.priority,
            model_fingerprint=self._ticket.keys.model_fingerprint,
            tenant_salt=self._ticket.keys.tenant_salt,
            tenant=self._ticket.tenant,
        )
