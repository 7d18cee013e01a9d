"""The engine: admit → fetch blocks → place → run → emit (design §5).

One asyncio loop owns all state; one thread runs the model, one thing at a time. Memory is moved only while that
thread has nothing to do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from decode_worker.answering import Answering
from decode_worker.lifecycle import Lifecycle
from decode_worker.local_encoding import LocalEncoding
from decode_worker.observer import Observer
from decode_worker.pool import Pool
from decode_worker.request import Fetch, Phase, Request
from decode_worker.runner import Runner
from decode_worker.scheduler import StepBudget, compose
from drystone.v1.statistics_pb2 import BlockSource
from shared import logs
from shared.engine.native.encoder import NativeEncoder
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import KvEndpoint, Reservation

T = TypeVar("T")
# Seconds between two looks at the whole pool.
_CHECK_SECONDS = 5.0


class Engine:
    """Runs requests on one model.

    Args:
        model: Owned by the engine thread while `run` runs.
        pool: Owned by the event loop.
        runner: Runs steps on the engine thread.
        endpoint: Where blocks are to be shipped.
        max_waiting: Requests that may wait for room; more are refused.
        max_samples: Samples that may take part in a step; further requests wait, their blocks at hand.
        budget: Most rows of a step.
        stall_seconds: Time without progress after which a fetch is driven anew.
        observer: Takes times and counts.
        native: Encodes blocks where it was proved for the model.
    """

    def __init__(
        self,
        model: ServedModel,
        pool: Pool,
        runner: Runner,
        *,
        endpoint: KvEndpoint,
        max_waiting: int,
        max_samples: int = 256,
        budget: StepBudget | None = None,
        stall_seconds: float = 20.0,
        observer: Observer | None = None,
        native: NativeEncoder | None = None,
    ) -> None:
        self.pool = pool
        self._runner = runner
        self._max_samples = max_samples
        self._budget = budget or StepBudget(tokens=2 * max_samples)
        self._stall_seconds = stall_seconds
        self._observer = observer or Observer()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._thread_busy = False
        self._wake = asyncio.Event()
        self.lifecycle = Lifecycle(
            pool, endpoint, max_waiting=max_waiting, changed=self._wake.set, observer=self._observer
        )
        self.answering = Answering(pool, self.lifecycle, self._observer)
        self._local = LocalEncoding(
            model, pool, self.lifecycle, lambda fetch, took: self.committed(fetch, encode_ms=took), native
        )
        self._log = logs.get("engine")
        self._checked_at = 0.0
        self.steps_total = self.integrity_failures_total = 0

    # What the service calls.

    def submit(self, request: Request) -> None:
        """Takes a request or raises DrystoneError; from here on its sink gets exactly one last message."""
        if not request.live:
            self.lifecycle.over_already(request)
            return
        self.lifecycle.submitted(request)
        self._admit()
        self.lifecycle.refuse_beyond_queue(request)
        self._wake.set()

    def cancel(self, request: Request) -> None:
        """Ends a request whose caller is gone; sends nothing."""
        self.lifecycle.cancel(request)

    def encode_here(self, request: Request, reservations: Sequence[Reservation]) -> None:
        """Encodes blocks on this worker because no prefill worker can."""
        for reservation in reservations:
            fetch = self.pool.fetches.find(reservation)
            if isinstance(fetch, Fetch) and request in fetch.waiters:
                self._local.add(fetch)
        self._wake.set()

    def fetch_failed(self, request: Request, reservations: Sequence[Reservation], error: DrystoneError) -> None:
        """The request's gateway gives fetches up: the request fails, and the next waiters drive them."""
        found = [self.pool.fetches.find(reservation) for reservation in reservations]
        if any(isinstance(fetch, Fetch) and request in fetch.waiters for fetch in found):
            self.lifecycle.fail(request, error)

    def committed(self, fetch: Fetch, *, shipped_bytes: int = 0, encode_ms: float = 0.0) -> None:
        """A block has arrived whole, from outside or from the engine thread."""
        arrival = fetch.waiters[0].arrivals[fetch.key]
        arrival.shipped_bytes, arrival.encode_ms = shipped_bytes, encode_ms
        local = BlockSource.BLOCK_SOURCE_ENCODED_ON_DECODE
        arrival.source = local if encode_ms else BlockSource.BLOCK_SOURCE_UNSPECIFIED
        for request in self.pool.commit(fetch):
            self.lifecycle.start(request)

    async def watch_fetches(self) -> None:
        """Has fetches that make no progress driven anew, by the next waiter's gateway, until cancelled."""
        while True:
            await asyncio.sleep(self._stall_seconds / 4)
            now = time.monotonic()
            for fetch in self.pool.fetches.all():
                still = now - fetch.landing.moved_at > self._stall_seconds
                if still and not fetch.encoding and fetch not in self._local:
                    self._log.warning("fetch_stalled", key=fetch.key.hex(), waiters=len(fetch.waiters))
                    fetch.waiters.append(fetch.waiters.pop(0))
                    self.lifecycle.drive_anew(fetch)

    # The loop.

    async def run(self) -> None:
        """Runs until cancelled; then every request fails with DRAINING and the thread ends."""
        try:
            while True:
                self._admit()
                # One of each in turn: blocks that are encoded here must not hold up those who generate.
                encoded = await self._local.encode_one(self._on_thread)
                if not await self._step() and not encoded:
                    self._check_when_idle()
                    self._wake.clear()
                    await self._wake.wait()
        finally:
            self.lifecycle.fail_all(DrystoneError(Reason.DRAINING, "the decode worker is stopping"))
            self._thread.shutdown(wait=True)
            self.lifecycle.end_step()

    def _admit(self) -> None:
        may_move = not self._thread_busy
        for request in self.lifecycle.waiting.to_try(self.pool.version, may_move=may_move):
            try:
                driven = self.pool.admit(request, may_move=may_move)
            except Exception as error:  # noqa: BLE001 - whatever it was, only this request fails
                self._log.error("admit_failed", request_id=request.request_id, exc_info=error)
                wrong = DrystoneError(Reason.INTERNAL, f"the request could not be admitted: {error}")
                self.lifecycle.fail(request, wrong)
                continue
            if driven is None:
                self.lifecycle.waiting.refused(request, self.pool.version, may_move=may_move)
                continue
            self.lifecycle.admitted(request, driven)
            if not request.fetches:
                self.lifecycle.start(request)

    async def _step(self) -> bool:
        self.lifecycle.seat(self._max_samples)
        entries = compose(self.lifecycle.running, self._budget)
        if not entries:
            return False
        began = time.monotonic()
        self.lifecycle.begin_step([entry.request for entry in entries])
        try:
            outcomes = await self._on_thread(lambda: self._runner.run(entries))
        except Exception as error:  # noqa: BLE001 - whatever it was, only this step's requests fail
            self._log.error("step_failed", requests=len(entries), exc_info=error)
            for entry in entries:
                wrong = DrystoneError(Reason.INTERNAL, f"the model could not run a step: {error}")
                self.lifecycle.fail(entry.request, wrong)
            return True
        finally:
            self.lifecycle.end_step()
        self.steps_total += 1
        self._observer.step(entries, time.monotonic() - began)
        self.answering.take(entries, outcomes)
        return True

    def _check_when_idle(self) -> None:
        """Memory must tile when nothing runs; looked at now and then, and a defect is said loudly."""
        now = time.monotonic()
        if self.lifecycle.holding or now - self._checked_at < _CHECK_SECONDS:
            return
        self._checked_at = now
        try:
            self.pool.check_integrity([])
        except AssertionError as error:
            self.integrity_failures_total += 1
            self._log.critical("memory_does_not_tile", exc_info=error)

    async def _on_thread(self, work: Callable[[], T]) -> T:
        """Runs on the engine thread and waits for it even when cancelled: the thread may be writing KV."""
        self._thread_busy = True
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise
        finally:
            self._thread_busy = False


def waiting_for_blocks(requests: Sequence[Request]) -> int:
    """Requests that are admitted and wait for blocks."""
    return sum(request.phase is Phase.FETCHING for request in requests)
