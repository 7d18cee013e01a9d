"""drystone.internal.v1.Decode over an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from decode_worker import messages
from decode_worker.engine import Engine
from decode_worker.request import Request
from decode_worker.text import TextStream
from shared import logs
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason, not_in_this_version
from shared.internal.v1 import decode_pb2 as pb
from shared.internal.v1.decode_pb2_grpc import DecodeServicer

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


class DecodeService(DecodeServicer):
    """Each stream is a session of calls; when it ends, every call on it is cancelled."""

    def __init__(self, engine: Engine, model: ServedModel, tokenizer: object, default_timeout_seconds: float) -> None:
        self._engine = engine
        self._model = model
        self._tokenizer = tokenizer
        self._default_timeout = default_timeout_seconds
        self._log = logs.get("decode")

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Relays one session."""
        session = _Session(self, self._engine)
        reader = asyncio.create_task(session.read(request_iterator))
        try:
            while (message := await session.outbox.get()) is not None:
                yield message
            await reader
        finally:
            reader.cancel()
            session.close()

    def open(self, call_id: int, message: pb.Open, session: _Session) -> Request:
        """Makes a request of an Open, or raises DrystoneError."""
        if bytes(message.model_fingerprint) != self._model.fingerprint:
            raise DrystoneError(Reason.MODEL_CHANGED, "the gateway's keys are of another model than this worker's")
        incarnation = self._engine.pool.fetches.identity.incarnation
        if message.expected_incarnation not in (0, incarnation):
            raise DrystoneError(Reason.WORKER_LOST, "this worker has restarted since the gateway looked")
        if not message.question_token_ids or any(not block.token_ids for block in message.blocks):
            raise DrystoneError(Reason.INTERNAL, "a block without tokens")
        sampling = message.sampling
        stop_ids = frozenset(sampling.stop_token_ids)
        timeout = message.time_left_ms / 1e3 if message.time_left_ms else self._default_timeout
        request = Request(
            request_id=message.request_id,
            call_id=call_id,
            traceparent=message.traceparent,
            blocks=message.blocks,
            question_ids=message.question_token_ids,
            sampling=sampling,
            stop_ids=stop_ids if sampling.ignore_eos else stop_ids | self._model.eos_token_ids,
            deadline=time.monotonic() + timeout,
            sink=session.send,
            text=TextStream(self._tokenizer, message.question_token_ids, sampling.stop),
        )
        if request.prompt_tokens + sampling.max_new_tokens > self._model.context_tokens:
            raise DrystoneError(
                Reason.PROMPT_TOO_LONG,
                f"{request.prompt_tokens} prompt tokens and {sampling.max_new_tokens} new ones do not fit "
                f"the worker's context of {self._model.context_tokens}",
            )
        with logs.request_scope(message.request_id, message.traceparent):
            self._log.info("request", blocks=len(request.blocks), prompt_tokens=request.prompt_tokens)
        return request

    async def DescribeBlocks(
        self, request: pb.DescribeResidentRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> pb.DescribeResidentResponse:
        """Resident blocks."""
        wanted, now = set(request.keys), time.monotonic()
        shape = self._engine.pool.arena.shape
        return pb.DescribeResidentResponse(
            blocks=[
                pb.ResidentBlock(
                    key=block.key,
                    tokens=block.extent.tokens,
                    bytes=shape.extent_bytes(block.extent.tokens),
                    users=block.pins,
                    hits=block.hits,
                    idle_ms=int((now - block.last_used) * 1e3),
                    pinned=block.held,
                )
                for block in self._engine.pool.blocks.all()
                if not wanted or block.key in wanted
            ]
        )

    async def PinBlocks(self, request: pb.PinResidentRequest, context: Any) -> pb.PinResidentResponse:
        """Not in this version."""
        raise not_in_this_version("Decode.PinBlocks")

    async def DropBlocks(self, request: pb.DropResidentRequest, context: Any) -> pb.DropResidentResponse:
        """Not in this version."""
        raise not_in_this_version("Decode.DropBlocks")


class _Session:
    """One stream: its calls and the messages waiting to go out.

    `None` in the outbox ends the stream: put there when the gateway says no more and the last call has ended.
    """

    def __init__(self, service: DecodeService, engine: Engine) -> None:
        self._service = service
        self._engine = engine
        self._calls: dict[int, Request] = {}
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
            self._unended -= 1
            self._end_when_done()

    def _take(self, message: pb.GenerateRequest) -> None:
        kind = message.WhichOneof("message")
        if kind == "open":
            self._open(message.call_id, message.open)
            return
        request = self._calls.get(message.call_id)
        if request is None or request.finished:
            return  # it ended while the message was on its way
        if kind == "encode_here":
            self._engine.encode_here(request, message.encode_here.reservations)
        elif kind == "fetch_failed":
            self._engine.fetch_failed(request, message.fetch_failed.reservations)
        elif kind == "cancel":
            self._engine.cancel(request)
            self._unended -= 1

    def _end_when_done(self) -> None:
        if self._half_closed and not self._unended:
            self.outbox.put_nowait(None)

    def _open(self, call_id: int, message: pb.Open) -> None:
        self._unended += 1
        try:
            request = self._service.open(call_id, message, self)
            self._calls[call_id] = request
            self._engine.submit(request)
        except DrystoneError as error:
            self.send(messages.failed_call(call_id, error))

    def close(self) -> None:
        """Cancels every call of the stream."""
        for request in self._calls.values():
            self._engine.cancel(request)
