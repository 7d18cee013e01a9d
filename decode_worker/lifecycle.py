"""How requests begin and end: submitted once, ended in one place, whatever the reason.

submit ──▶ waiting ──▶ fetching ──▶ ready ──▶ question ──▶ answer ──▶ finished

Any of them ends by a cancel, a failure or the deadline too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Protocol

from decode_worker import messages
from decode_worker.observer import Observer
from decode_worker.pool import Pool
from decode_worker.request import Fetch, Phase, Request
from decode_worker.sample import Sample
from decode_worker.waiting import PATIENCE_SECONDS, WaitingQueue
from drystone.v1.sampling_pb2 import FinishReason
from shared.errors import DrystoneError, Reason, deadline_exceeded
from shared.internal.v1.common_pb2 import KvEndpoint


class Timer(Protocol):
    """A call that is to come."""

    def cancel(self) -> None:
        """It shall not come."""
        ...


CallLater = Callable[[float, Callable[[Request], None], Request], Timer]


class Lifecycle:
    """Every request of one engine. Used by its event loop alone.

    A step in flight uses only memory that its requests hold: one that ends meanwhile keeps its holds until the
    step returns.

    Args:
        pool: What requests hold.
        endpoint: Where blocks are to be shipped.
        max_waiting: Requests that may wait for room; more are refused.
        changed: Called when there may be something new to do.
        observer: Takes times and counts.
        call_later: Calls a function with a request after some seconds; None: the running loop's.
    """

    def __init__(
        self,
        pool: Pool,
        endpoint: KvEndpoint,
        *,
        max_waiting: int,
        changed: Callable[[], None],
        observer: Observer,
        call_later: CallLater | None = None,
    ) -> None:
        self._pool = pool
        self._endpoint = endpoint
        self._max_waiting = max_waiting
        self._changed = changed
        self._observer = observer
        self._call_later = call_later or _on_running_loop
        self.waiting = WaitingQueue()
        self.running: list[Request] = []
        self.in_step: set[Request] = set()
        self._timers: dict[Request, Timer] = {}
        self.requests_total = self.failed_total = 0

    @property
    def holding(self) -> list[Request]:
        """Requests that hold memory."""
        return [*self.running, *(request for request in self.in_step if request.finished)]

    @property
    def samples(self) -> int:
        """Samples that read their question or generate."""
        seated = (request for request in self.running if request.phase in (Phase.PREFILL, Phase.DECODE))
        return sum(len(request.live) for request in seated)

    def submitted(self, request: Request) -> None:
        """Takes a request in, or raises DrystoneError; from here on its sink gets exactly one last message."""
        self._pool.refuse_if_never(request)
        self.waiting.add(request)
        self._timers[request] = self._call_later(request.deadline - time.monotonic(), self._expire, request)

    def refuse_beyond_queue(self, request: Request) -> None:
        """Takes a request out again, with DrystoneError, when it would have to wait and too many do."""
        if request.phase is not Phase.WAITING or len(self.waiting) <= self._max_waiting:
            self.requests_total += 1
            return
        self.waiting.remove(request)
        self._timers.pop(request).cancel()
        request.phase = Phase.FINISHED
        raise DrystoneError(
            Reason.TOO_MANY_REQUESTS,
            f"{len(self.waiting)} requests wait for room on this decode worker; limit {self._max_waiting}",
            metadata={"limit": str(self._max_waiting)},
            retry_after_ms=1000,
        )

    def over_already(self, request: Request) -> None:
        """Every sample had ended before the interruption: there is nothing to run."""
        self.requests_total += 1
        self._observer.ended(request, "over_already")
        request.phase = Phase.FINISHED
        request.sink(messages.admitted(request, self._pool.fetches))
        self.tell_replayed(request)
        request.sink(messages.ended(request))

    def tell_replayed(self, request: Request) -> None:
        """What an interruption kept from the caller: text that had been certain, and samples that had ended."""
        for sample in request.samples:
            if sample.untold:
                request.sink(messages.tokens(request, sample, [], sample.untold))
            if sample.over is not None:
                request.sink(messages.sample_ended(request, sample, sample.over, None))

    def admitted(self, request: Request, driven: list[Fetch]) -> None:
        """Everything the request needs is reserved; its gateway is told what is missing."""
        self.waiting.remove(request)
        self.running.append(request)
        request.phase = Phase.FETCHING
        request.admitted = time.monotonic()
        self._observer.admitted(request)
        request.sink(messages.admitted(request, self._pool.fetches))
        if driven:
            request.sink(messages.missing(request, driven, self._pool.fetches, self._endpoint))

    def start(self, request: Request) -> None:
        """Every block is there: the question may run."""
        self._pool.place(request)
        request.fetched = time.monotonic()
        reader = request.live[0]
        read = reader.tail.filled if reader.tail is not None else 0
        reader.unread = list(request.question_ids[read:])
        request.phase = Phase.READY
        self.tell_replayed(request)
        self._changed()

    def seat(self, most: int) -> None:
        """Lets requests whose blocks are there take part, up to `most` samples, in the order of their turn.

        A smaller one may pass one for which too few places are free, but only for a while.
        """
        ready = sorted((r for r in self.running if r.phase is Phase.READY), key=lambda request: request.turn)
        free = most - self.samples
        for request in ready:
            if len(request.live) <= free:
                request.phase = Phase.PREFILL
                free -= len(request.live)
            elif time.monotonic() - request.fetched > PATIENCE_SECONDS:
                return

    def cancel(self, request: Request) -> None:
        """Ends a request whose caller is gone; sends nothing."""
        if not request.finished:
            self._observer.ended(request, "cancelled")
            self._end(request)

    def fail(self, request: Request, error: DrystoneError) -> None:
        """Ends a request with an error."""
        if request.finished:
            return  # it ended while the step ran, and has had its last message
        self.failed_total += 1
        self._observer.ended(request, str(error.reason).lower())
        request.sink(messages.failed(request, error))
        self._end(request)

    def finish_sample(
        self, request: Request, sample: Sample, reason: FinishReason.ValueType, stop_token: int | None = None
    ) -> None:
        """Ends one sample, and with the last one the request."""
        rest = sample.text.finish()
        if rest:
            request.sink(messages.tokens(request, sample, [], rest))
        request.sink(messages.sample_ended(request, sample, reason, stop_token))
        sample.finished = True
        if request.keep_tail:
            request.tail_keys = list(dict.fromkeys([*request.tail_keys, *self._pool.seal(request, sample)]))
        sample.release()
        if not request.live:
            self._observer.ended(request, FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower())
            request.sink(messages.ended(request))
            self._end(request)

    def drive_anew(self, fetch: Fetch) -> None:
        """Has the first waiter's gateway ship a block, in a new epoch."""
        if not fetch.restart():
            return
        driver = fetch.waiters[0]
        driver.sink(messages.missing(driver, [fetch], self._pool.fetches, self._endpoint))

    def begin_step(self, requests: Collection[Request]) -> None:
        """The engine thread uses what these hold."""
        self.in_step = set(requests)

    def end_step(self) -> None:
        """The engine thread has let go: what ended meanwhile gives back what it held."""
        ended, self.in_step = [request for request in self.in_step if request.finished], set()
        for request in ended:
            request.release()

    def fail_all(self, error: DrystoneError) -> None:
        """Ends everything."""
        for request in [*self.waiting, *self.running]:
            self.fail(request, error)

    def _expire(self, request: Request) -> None:
        generated = any(len(sample.generated) > len(sample.resumed) for sample in request.samples)
        if request.phase is Phase.DECODE and generated and request not in self.in_step:
            self._cut_short(request)
        elif request.phase is Phase.DECODE and generated:
            # Its tail is being written: it ends as soon as the step returns.
            request.deadline = 0.0
        else:
            waits = {
                Phase.WAITING: "waiting for room",
                Phase.FETCHING: "waiting for blocks",
                Phase.READY: "waiting for its turn",
            }
            self.fail(request, deadline_exceeded(waits.get(request.phase, "generating")))

    def cut_short_if_late(self, request: Request) -> None:
        """Ends a request whose deadline passed during a step; what was generated until then stands."""
        if not request.finished and request.deadline == 0.0:
            self._cut_short(request)

    def _cut_short(self, request: Request) -> None:
        for sample in request.live:
            self.finish_sample(request, sample, FinishReason.FINISH_REASON_DEADLINE)

    def _end(self, request: Request) -> None:
        """The one way out: whatever a request holds is given back here, or after the step that uses it."""
        if request.phase is Phase.WAITING:
            self.waiting.remove(request)
        elif request in self.running:
            self.running.remove(request)
        request.phase = Phase.FINISHED
        self._timers.pop(request).cancel()
        for fetch in self._pool.leave(request):
            self.drive_anew(fetch)
        if request not in self.in_step:
            request.release()
        self._changed()


def _on_running_loop(seconds: float, callback: Callable[[Request], None], request: Request) -> Timer:
    return asyncio.get_running_loop().call_later(seconds, callback, request)
