"""The asynchronous client. Its twin is _client.py; what they share is in _base.py."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio

from drystone import _replies as replies
from drystone._base import BaseClient, Progress
from drystone._config import DEFAULT_ADDRESS, Timeouts
from drystone._events import Completed, Event
from drystone.v1 import generation_pb2, generation_pb2_grpc, operations_pb2, operations_pb2_grpc

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self, Unpack

    from drystone._prompts import GenerateOptions
    from drystone._results import Answer, ModelInfo, ProcessStatus

_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


class AsyncClient(BaseClient):
    """A client of one gateway for one event loop. Close it, or use it in `async with`.

    Args:
        address: Gateway's host:port.
        timeouts: How long to wait. None takes the defaults of `Timeouts`.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeouts: Timeouts | None = None) -> None:
        super().__init__(address, timeouts=timeouts)
        # Opened by the first call: a channel belongs to the loop that runs then.
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    async def generate(self, question: str | None = None, **options: Unpack[GenerateOptions]) -> Answer:
        """Answers one prompt and returns when the answer is complete.

        Args:
            question: Question over `documents`; or give `blocks` or `messages` instead.
            **options: See `GenerateOptions`.

        Raises:
            DrystoneError: As its subclasses say.
        """
        async with self.stream(question, **options) as stream:
            return await stream.read()

    def stream(self, question: str | None = None, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Answers one prompt event by event. Leaving the stream cancels the call.

        Args:
            question: Question over `documents`; or give `blocks` or `messages` instead.
            **options: See `GenerateOptions`.

        Raises:
            DrystoneError: Here when the request cannot be sent, while iterating when it fails.
        """
        request, timeout = self._generate_request(question, options)
        stub = generation_pb2_grpc.GenerationStub(self._open())
        return AsyncStream(stub.Generate(request, timeout=timeout), Progress(self.address, request.request_id))

    async def model(self, name: str = "") -> ModelInfo:
        """What a model is and what it takes. An empty name means the gateway's only model."""
        stub = generation_pb2_grpc.GenerationStub(self._open())
        return replies.model_info(await self._call(stub.GetModel, generation_pb2.GetModelRequest(model=name)))

    async def status(self) -> tuple[ProcessStatus, ...]:
        """State of the gateway and of every worker that it knows, the gateway first."""
        stub = operations_pb2_grpc.OperationsStub(self._open())
        return replies.processes(await self._call(stub.GetStatus, operations_pb2.GetStatusRequest()))

    async def close(self) -> None:
        """Closes the connection and cancels every call on it."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        await self.close()

    def _open(self) -> grpc.aio.Channel:
        if self._closed:
            raise ValueError("this client is closed")
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self.address, options=self._channel_options())
        return self._channel

    async def _call(self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Reply], request: _Request) -> _Reply:
        try:
            return await method(request, timeout=self.timeouts.control)
        except grpc.RpcError as error:
            raise self._error(error) from error


class AsyncStream(AsyncIterator[Event]):
    """An answer on its way: an asynchronous iterator of events that cancels its call when it is left.

    The call is owned by this object: it ends with the last event, with `close`, or with the object's life.
    """

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse],
        progress: Progress,
    ) -> None:
        self._call = call
        self._progress = progress
        self._closed = False

    @property
    def request_id(self) -> str:
        """The request's name: the caller's, and the server's once the first event has come."""
        return self._progress.request_id

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            DrystoneError: When the call failed.
        """
        while not self._closed:
            try:
                response = await self._call.read()
            except asyncio.CancelledError:
                if self._closed and not _task_is_cancelled():
                    break
                raise
            except grpc.RpcError as error:
                self._closed = True
                raise self._progress.error(error) from error
            if not isinstance(response, generation_pb2.GenerateResponse):
                break
            event = self._progress.take(response)
            if isinstance(event, Completed):
                await self._finish()
            if event is not None:
                return event
        self._closed = True
        raise StopAsyncIteration

    async def read(self) -> Answer:
        """Reads what is left and returns the whole answer.

        Raises:
            DrystoneError: When the call failed or ended too early.
        """
        async for _ in self:
            pass
        return self._progress.answer()

    async def close(self) -> None:
        """Cancels the call unless it has ended. May be called repeatedly."""
        self._cancel()

    async def __aenter__(self) -> Self:
        """The stream itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        await self.close()

    def __del__(self) -> None:
        """Closes, for loops that were left by `break`."""
        self._cancel()

    def _cancel(self) -> None:
        if not self._closed:
            self._closed = True
            self._call.cancel()

    async def _finish(self) -> None:
        """Takes the call's end, so that it counts as done and not as cancelled. Nothing can change the answer now."""
        self._closed = True
        with contextlib.suppress(grpc.RpcError):
            await self._call.read()


def _task_is_cancelled() -> bool:
    """True when it is the running task that someone cancelled, and not only a call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
