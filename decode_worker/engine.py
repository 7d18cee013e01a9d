"""The engine: admit → fetch blocks → place → run → emit (design §5).

One asyncio loop owns all state; one thread runs the model. A step in flight uses only memory that its
requests hold: a request that ends meanwhile keeps its holds until the step returns.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from decode_worker import messages
from decode_worker.pool import Pool
from decode_worker.request import Fetch, Phase, Request
from decode_worker.runner import Outcome, Runner
from decode_worker.scheduler import StepEntry, compose
from drystone.v1.sampling_pb2 import FinishReason
from drystone.v1.statistics_pb2 import BlockSource
from shared import logs
from shared.engine.encode import encode_block
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason, deadline_exceeded
from shared.internal.v1.common_pb2 import KvEndpoint, Reservation

P = ParamSpec("P")
T = TypeVar("T")
STEP_BUDGET_TOKENS = 512


class Engine:
    """Runs requests on one model.

    Args:
        model: Owned by the engine thread while `run` runs.
        pool: Owned by the event loop.
        runner: Runs steps on the engine thread.
        max_waiting: Requests that may wait for room; more are refused.
        endpoint: Where blocks are to be shipped.
        stall_seconds: Time without progress after which a fetch is driven anew.
    """

    def __init__(
        self,
        model: ServedModel,
        pool: Pool,
        runner: Runner,
        *,
        max_waiting: int,
        endpoint: KvEndpoint,
        stall_seconds: float = 20.0,
    ) -> None:
        self._model = model
        self.pool = pool
        self._runner = runner
        self._max_waiting = max_waiting
        self._endpoint = endpoint
        self._stall_seconds = stall_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._wake = asyncio.Event()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._to_encode: deque[Fetch] = deque()
        self._in_step: set[Request] = set()
        self._timers: dict[Request, asyncio.TimerHandle] = {}
        self._no_room_at: tuple[Request, int] | None = None
        self._log = logs.get("engine")
        self.requests_total = self.failed_total = self.steps_total = self.tokens_total = 0

    @property
    def requests(self) -> list[Request]:
        """Requests that hold memory."""
        return [*self._running, *(request for request in self._in_step if request.finished)]

    @property
    def running(self) -> int:
        """Admitted and not finished."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Waiting for room."""
        return len(self._waiting)

    # What the service calls.

    def submit(self, request: Request) -> None:
        """Takes a request or raises DrystoneError; from here on its sink gets exactly one last message."""
        self.pool.refuse_if_never(request)
        self._waiting.append(request)
        self._admit()
        if request.phase is Phase.WAITING and len(self._waiting) > self._max_waiting:
            self._waiting.remove(request)
            raise DrystoneError(
                Reason.TOO_MANY_REQUESTS,
                f"{len(self._waiting)} requests wait for room on this decode worker; limit {self._max_waiting}",
                metadata={"limit": str(self._max_waiting)},
                retry_after_ms=1000,
            )
        self.requests_total += 1
        loop = asyncio.get_running_loop()
        self._timers[request] = loop.call_later(request.deadline - time.monotonic(), self._expire, request)

    def cancel(self, request: Request) -> None:
        """Ends a request whose caller is gone; sends nothing."""
        if not request.finished:
            self._end(request)

    def encode_here(self, request: Request, reservations: Sequence[Reservation]) -> None:
        """Encodes blocks on this worker because no prefill worker can."""
        for reservation in reservations:
            fetch = self.pool.fetches.find(reservation)
            if isinstance(fetch, Fetch) and request in fetch.waiters:
                fetch.restart()
                self._to_encode.append(fetch)
        self._wake.set()

    def fetch_failed(self, request: Request, reservations: Sequence[Reservation], error: DrystoneError) -> None:
        """The request's gateway gives fetches up: the request fails, and the next waiters drive them."""
        found = [self.pool.fetches.find(reservation) for reservation in reservations]
        if any(isinstance(fetch, Fetch) and request in fetch.waiters for fetch in found):
            self._fail(request, error)

    async def watch_fetches(self) -> None:
        """Has fetches that make no progress driven anew, by the next waiter's gateway, until cancelled."""
        while True:
            await asyncio.sleep(self._stall_seconds / 4)
            now = time.monotonic()
            for fetch in self.pool.fetches.all():
                if not fetch.encoding and fetch not in self._to_encode and now - fetch.moved_at > self._stall_seconds:
                    self._log.warning("fetch_stalled", key=fetch.key.hex(), waiters=len(fetch.waiters))
                    fetch.waiters.append(fetch.waiters.pop(0))
                    self._drive_anew(fetch)

    def committed(self, fetch: Fetch, *, shipped_bytes: int = 0, encode_ms: float = 0.0) -> None:
        """A block has arrived whole, from outside or from the engine thread."""
        driver = fetch.waiters[0]
        arrival = driver.arrivals[fetch.key]
        arrival.shipped_bytes, arrival.encode_ms = shipped_bytes, encode_ms
        local = BlockSource.BLOCK_SOURCE_ENCODED_ON_DECODE
        arrival.source = local if encode_ms else BlockSource.BLOCK_SOURCE_UNSPECIFIED
        for request in self.pool.commit(fetch):
            self._start(request)
        self._wake.set()

    # The loop.

    async def run(self) -> None:
        """Runs until cancelled; then every request fails with DRAINING and the thread ends."""
        try:
            while True:
                self._admit()
                # One of each in turn: blocks that are encoded here must not hold up those who generate.
                encoded = await self._encode_one()
                if not await self._step() and not encoded:
                    self._wake.clear()
                    await self._wake.wait()
        finally:
            for request in [*self._waiting, *self._running]:
                self._fail(request, DrystoneError(Reason.DRAINING, "the decode worker is stopping"))
            self._thread.shutdown(wait=True)
            self._release_after_step()

    def _admit(self) -> None:
        while self._waiting:
            request = self._waiting[0]
            if self._no_room_at == (request, self.pool.version):
                return  # nothing has been given back since it did not fit
            driven = self.pool.admit(request)
            if driven is None:
                self._no_room_at = (request, self.pool.version)
                return
            self._waiting.popleft()
            self._running.append(request)
            request.phase = Phase.FETCHING
            request.admitted = time.monotonic()
            request.sink(messages.admitted(request, self.pool.fetches))
            if driven:
                request.sink(messages.missing(request, driven, self.pool.fetches, self._endpoint))
            if not request.fetches:
                self._start(request)

    def _start(self, request: Request) -> None:
        self.pool.place(request)
        request.fetched = time.monotonic()
        request.unread = list(request.question_ids)
        request.phase = Phase.PREFILL
        self._wake.set()

    async def _encode_one(self) -> bool:
        while self._to_encode:
            fetch = self._to_encode.popleft()
            if fetch not in self.pool.fetches.all():
                continue
            fetch.encoding = True
            extent = self.pool.arena.view(fetch.extent)
            began = time.monotonic()
            try:
                await self._on_thread(encode_block, self._model, list(fetch.token_ids), extent)
            except Exception as error:  # noqa: BLE001 - whatever it was, only this block's requests fail
                self._encode_failed(fetch, error)
                return True
            finally:
                fetch.encoding = False
            if fetch.waiters:
                self.committed(fetch, encode_ms=(time.monotonic() - began) * 1e3)
            else:
                self.pool.give_up(fetch)
            return True
        return False

    def _encode_failed(self, fetch: Fetch, error: Exception) -> None:
        self._log.error("encode_failed", key=fetch.key.hex(), exc_info=error)
        fetch.encoding = False
        for request in self.pool.give_up(fetch):
            self._fail(request, DrystoneError(Reason.BLOCK_UNAVAILABLE, f"a block could not be encoded: {error}"))

    async def _step(self) -> bool:
        entries = compose(self._running, STEP_BUDGET_TOKENS)
        if not entries:
            return False
        self._in_step = {entry.request for entry in entries}
        try:
            outcomes = await self._on_thread(self._runner.run, entries)
        except Exception as error:  # noqa: BLE001 - whatever it was, only this step's requests fail
            self._log.error("step_failed", requests=len(entries), exc_info=error)
            for entry in entries:
                self._fail(entry.request, DrystoneError(Reason.INTERNAL, f"the model could not run a step: {error}"))
            return True
        finally:
            self._release_after_step()
        self.steps_total += 1
        for entry, outcome in zip(entries, outcomes, strict=True):
            if not entry.request.finished:
                self._advance_or_fail(entry, outcome)
        return True

    def _advance_or_fail(self, entry: StepEntry, outcome: Outcome) -> None:
        try:
            if isinstance(outcome, DrystoneError):
                self._fail(entry.request, outcome)
            else:
                self._advance(entry, outcome)
        except Exception as error:  # noqa: BLE001 - a tokenizer may refuse what a model says; only this request fails
            self._log.error("advance_failed", request_id=entry.request.request_id, exc_info=error)
            self._fail(entry.request, DrystoneError(Reason.INTERNAL, f"a token could not be taken in: {error}"))

    def _advance(self, entry: StepEntry, token: int | None) -> None:
        request, count = entry.request, len(entry.span.token_ids)
        entry.span.tail.filled += count
        request.steps += 1
        request.unread = request.unread[count:]
        if token is None:
            return
        if not request.first_token:
            request.first_token = time.monotonic()
        request.phase = Phase.DECODE
        if token in request.stop_ids:
            self._finish(request, FinishReason.FINISH_REASON_STOP, stop_token=token)
            return
        request.generated.append(token)
        request.unread = [token]
        self.tokens_total += 1
        may_stop = len(request.generated) >= request.sampling.min_new_tokens
        request.sink(messages.tokens(request, [token], request.text.push(token, may_stop=may_stop)))
        if request.text.matched_stop:
            self._finish(request, FinishReason.FINISH_REASON_STOP)
        elif len(request.generated) >= request.sampling.max_new_tokens:
            self._finish(request, FinishReason.FINISH_REASON_LENGTH)

    # How requests end.

    def _finish(self, request: Request, reason: FinishReason.ValueType, stop_token: int | None = None) -> None:
        rest = request.text.finish()
        if rest:
            request.sink(messages.tokens(request, [], rest))
        request.sink(messages.sample_ended(request, reason, stop_token))
        request.sink(messages.ended(request))
        self._end(request)

    def _fail(self, request: Request, error: DrystoneError) -> None:
        if request.finished:
            return  # it ended while the step ran, and has had its last message
        self.failed_total += 1
        request.sink(messages.failed(request, error))
        self._end(request)

    def _expire(self, request: Request) -> None:
        waits = {Phase.WAITING: "waiting for room", Phase.FETCHING: "waiting for blocks"}
        self._fail(request, deadline_exceeded(waits.get(request.phase, "generating")))

    def _end(self, request: Request) -> None:
        """The one way out: whatever a request holds is given back here, or after the step that uses it."""
        if request.finished:
            return
        if request.phase is Phase.WAITING:
            self._waiting.remove(request)
        elif request in self._running:
            self._running.remove(request)
        request.phase = Phase.FINISHED
        self._timers.pop(request).cancel()
        for fetch in self.pool.leave(request):
            self._drive_anew(fetch)
        if request not in self._in_step:
            request.release()
        self._wake.set()

    def _drive_anew(self, fetch: Fetch) -> None:
        fetch.restart()
        driver = fetch.waiters[0]
        driver.sink(messages.missing(driver, [fetch], self.pool.fetches, self._endpoint))

    def _release_after_step(self) -> None:
        ended, self._in_step = [request for request in self._in_step if request.finished], set()
        for request in ended:
            request.release()

    async def _on_thread(self, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
        """Runs on the engine thread and waits for it even when cancelled: the thread may be writing KV."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*arguments, **keywords))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise
