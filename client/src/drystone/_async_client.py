"""The asynchronous client. Its twin is _client.py; what they share is in _base.py."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio

from drystone import _replies as replies
from drystone._async_blocks import AsyncBlocks
from drystone._async_warm_stream import AsyncWarmStream
from drystone._base import BaseClient, Progress
from drystone._config import DEFAULT_ADDRESS, Timeouts
from drystone._events import Completed, Event
from drystone._tasks import task_is_cancelled
from drystone.v1 import generation_pb2, generation_pb2_grpc, operations_pb2, operations_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType
    from typing import Self, Unpack

    from drystone._prompts import Document, GenerateOptions
    from drystone._results import Answer, ModelInfo
    from drystone._status import ProcessStatus
    from drystone._warming import WarmOptions

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
        self._blocks = AsyncBlocks(self._generation, self._call, self.timeouts.blocks)

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
        call = self._generation().Generate(request, timeout=timeout)
        return AsyncStream(call, Progress(self.address, request.request_id))

    def warm(self, documents: Iterable[Document | str], **options: Unpack[WarmOptions]) -> AsyncWarmStream:
        """Encodes documents ahead of the requests that will use them. Leaving the stream cancels.

        The documents are read as they are sent, at most 256 or 4 MiB in one call, so a generator of any length may
        give them. What is there already is skipped, so repeating a warm that was interrupted goes on from there.

        Args:
            documents: Documents, or texts without titles.
            **options: See `WarmOptions`.

        Example:
            >>> result = await client.warm(documents, tags=["handbook"]).result()
            >>> answer = await client.generate("Why?", documents=[drystone.Document(key=result.documents[0].keys[0])])

        Raises:
            DrystoneError: Here when the request cannot be sent, while iterating when a call fails for good.
        """
        return AsyncWarmStream(self._generation().Warm, *self._warm_state(documents, options))

    @property
    def blocks(self) -> AsyncBlocks:
        """The blocks that the cluster holds."""
        return self._blocks

    async def model(self, name: str = "") -> ModelInfo:
        """What a model is and what it takes. An empty name means the gateway's only model."""
        request = generation_pb2.GetModelRequest(model=name)
        return replies.model_info(await self._call(self._generation().GetModel, request, self.timeouts.control))

    async def status(self) -> tuple[ProcessStatus, ...]:
        """State of the gateway and of every worker that it knows, the gateway first."""
        stub = operations_pb2_grpc.OperationsStub(self._open())
        request = operations_pb2.GetStatusRequest()
        return replies.processes(await self._call(stub.GetStatus, request, self.timeouts.control))

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

    def _generation(self) -> generation_pb2_grpc.GenerationAsyncStub:
        return generation_pb2_grpc.GenerationStub(self._open())

    async def _call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Reply], request: _Request, seconds: float | None
    ) -> _Reply:
        try:
            return await method(request, timeout=seconds)
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
                if self._closed and not task_is_cancelled():
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
