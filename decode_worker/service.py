"""drystone.internal.v1.Decode over an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import grpc

from decode_worker import messages
from decode_worker.engine import Engine
from decode_worker.opening import Opener
from decode_worker.operating import describe, drop, pin
from decode_worker.request import Request
from shared import logs
from shared.errors import DrystoneError, Reason
from shared.internal.v1 import decode_pb2 as pb
from shared.internal.v1.decode_pb2_grpc import DecodeServicer

# Tokens of an interrupted answer that are read again at once; more would hold up everything else.
_RESUMED_ON_THE_LOOP = 256

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


class DecodeService(DecodeServicer):
    """Each stream is a session of calls; when it ends, every call on it is cancelled."""

    def __init__(self, engine: Engine, opener: Opener) -> None:
        self._engine = engine
        self._opener = opener
        self._log = logs.get("decode")

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Relays one session."""
        session = _Session(self._opener, self._engine)
        reader = asyncio.create_task(session.read(request_iterator))
        try:
            while (message := await session.outbox.get()) is not None:
                yield message
            await reader
        finally:
            reader.cancel()
            session.close()

    async def DescribeBlocks(
        self, request: pb.DescribeResidentRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.DescribeResidentResponse:
        """Resident blocks."""
        return pb.DescribeResidentResponse(
            blocks=describe(self._engine.pool, request.keys, request.after_key, request.page_size)
        )

    async def PinBlocks(
        self, request: pb.PinResidentRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.PinResidentResponse:
        """Keeps resident blocks from eviction, or lets them go again."""
        return pb.PinResidentResponse(changed=pin(self._engine.pool, request.keys, held=not request.unpin))

    async def DropBlocks(
        self, request: pb.DropResidentRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.DropResidentResponse:
        """Takes blocks out of the cache: no request that is admitted from now on finds them."""
        dropped, freed = drop(self._engine.pool, request.keys)
        self._log.info("dropped", blocks=len(dropped), bytes_freed=freed)
        return pb.DropResidentResponse(dropped=dropped, bytes_freed=freed)


class _Session:
    """One stream: its calls and the messages waiting to go out.

    `None` in the outbox ends the stream: put there when the gateway says no more and the last call has ended.
    """

    def __init__(self, opener: Opener, engine: Engine) -> None:
        self._opener = opener
        self._engine = engine
        self._log = logs.get("decode")
        self._calls: dict[int, Request] = {}
        # Calls that are being opened on a thread.
        self._opening: dict[int, asyncio.Task[None]] = {}
        self._unended = 0
        self._half_closed = False
        self.outbox: asyncio.Queue[pb.GenerateResponse | None] = asyncio.Queue()

    async def read(self, incoming: AsyncIterator[pb.GenerateRequest]) -> None:
        """Takes the gateway's messages until it half-closes; one that cannot be read ends the stream."""
        try:
            async for message in incoming:
                self._take(message)
        except BaseException:
            self.outbox.put_nowait(None)
            raise
        self._half_closed = True
        self._end_when_done()

    def send(self, message: pb.GenerateResponse) -> None:
        """Queues a message for the gateway; never blocks."""
        self.outbox.put_nowait(message)
        if message.WhichOneof("message") in ("ended", "failed"):
            self._end_call(message.call_id)

    def _take(self, message: pb.GenerateRequest) -> None:
        kind = message.WhichOneof("message")
        if kind == "open":
            self._open(message.call_id, message.open)
            return
        request = self._calls.get(message.call_id)
        if kind == "cancel" and message.call_id in self._opening:
            self._opening.pop(message.call_id).cancel()
            self._end_call(message.call_id)
        if request is None or request.finished:
            return  # it ended while the message was on its way
        if kind == "encode_here":
            self._engine.encode_here(request, message.encode_here.reservations)
        elif kind == "fetch_failed":
            self._engine.fetch_failed(request, message.fetch_failed.reservations, _why(message.fetch_failed))
        elif kind == "cancel":
            self._engine.cancel(request)
            self._end_call(message.call_id)

    def _end_call(self, call_id: int) -> None:
        self._calls.pop(call_id, None)
        self._unended -= 1
        self._end_when_done()

    def _end_when_done(self) -> None:
        if self._half_closed and not self._unended:
            self.outbox.put_nowait(None)

    def _open(self, call_id: int, message: pb.Open) -> None:
        if call_id in self._calls or call_id in self._opening:
            raise DrystoneError(Reason.MALFORMED_REQUEST, f"call {call_id} of this stream has not ended yet")
        self._unended += 1
        resumed = sum(len(past.token_ids) for past in message.resume.samples)
        if message.HasField("structured_output") or resumed > _RESUMED_ON_THE_LOOP:
            self._opening[call_id] = asyncio.create_task(self._open_aside(call_id, message))
        else:
            self._begin(call_id, message, lambda: self._opener.open(call_id, message, self.send))

    async def _open_aside(self, call_id: int, message: pb.Open) -> None:
        """Opens a message that takes long on a thread; the engine and other calls go on meanwhile."""
        began = time.monotonic()
        opened: Request | Exception
        try:
            opened = await asyncio.to_thread(self._open_whole, call_id, message)
            opened.deadline -= time.monotonic() - began
        except Exception as error:  # noqa: BLE001 - told where every other is, in `_begin`
            opened = error
        finally:
            # A call that was cancelled meanwhile may have a namesake by now.
            if self._opening.get(call_id) is asyncio.current_task():
                del self._opening[call_id]
        self._begin(call_id, message, lambda: _raised(opened))

    def _open_whole(self, call_id: int, message: pb.Open) -> Request:
        return self._opener.open(call_id, message, self.send, self._opener.grammar(message))

    def _begin(self, call_id: int, message: pb.Open, open_it: Callable[[], Request]) -> None:
        with logs.request_scope(message.request_id, message.traceparent):
            try:
                request = open_it()
                # Held before it is submitted: it may end within, and what was refused is let go again.
                self._calls[call_id] = request
                self._engine.submit(request)
                self._log.info("request", blocks=len(request.blocks), prompt_tokens=request.prompt_tokens)
            except DrystoneError as error:
                self._refuse(call_id, error)
            except Exception as error:  # noqa: BLE001 - whatever it was, only this call fails
                self._log.error("open_failed", exc_info=error)
                self._refuse(call_id, DrystoneError(Reason.INTERNAL, f"the request could not be opened: {error}"))

    def _refuse(self, call_id: int, error: DrystoneError) -> None:
        self._log.info("refused", reason=error.reason, detail=error.message)
        self.send(messages.failed_call(call_id, error))

    def close(self) -> None:
        """Cancels every call of the stream."""
        for task in self._opening.values():
            task.cancel()
        for request in list(self._calls.values()):
            self._engine.cancel(request)


def _raised(opened: Request | Exception) -> Request:
    if isinstance(opened, Exception):
        raise opened
    return opened


def _why(failed: pb.FetchFailed) -> DrystoneError:
    """The error of fetches that a gateway gives up: the first reason that it names."""
    for failure in failed.failures:
        if failure.reason in Reason.__members__:
            return DrystoneError(Reason(failure.reason), failure.message, retry_after_ms=failure.retry_after_ms or None)
    return DrystoneError(Reason.BLOCK_UNAVAILABLE, "a block could be had from no worker")
