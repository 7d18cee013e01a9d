"""Warming on its way, for the asynchronous client. Its twin is _warm_stream.py."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from drystone._tasks import task_is_cancelled
from drystone._warming import WarmProgress, WarmResult, warm_result
from drystone.v1 import generation_pb2

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    import grpc.aio

    from drystone._warm_state import WarmState


class AsyncWarmStream(AsyncIterator[WarmProgress]):
    """Warming on its way: an asynchronous iterator of progress that cancels its call when it is left.

    The call that runs is owned by this object: it ends by itself, with `close`, or with the object's life. What was
    encoded until then stays, so warming the same documents again goes on from there.

    Example:
        >>> async with client.warm(documents, tags=["handbook"]) as stream:
        ...     async for progress in stream:
        ...         print(progress.documents_done, [document.error for document in progress.documents])
    """

    def __init__(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[generation_pb2.WarmRequest, generation_pb2.WarmResponse],
        state: WarmState,
        timeout: float | None,
    ) -> None:
        self._method = method
        self._state = state
        self._timeout = timeout
        self._call: grpc.aio.UnaryStreamCall[generation_pb2.WarmRequest, generation_pb2.WarmResponse] | None = None
        # Set once and for all: also ends the wait before a repeat.
        self._closed = asyncio.Event()

    async def __anext__(self) -> WarmProgress:
        """The next progress. Calls that may be repeated are, after a wait.

        Raises:
            DrystoneError: When a call failed for good. Failures of single documents are in their progress.
        """
        try:
            progress = await self._advance()
        except Exception:
            self._cancel()
            raise
        if progress is None:
            self._closed.set()
            raise StopAsyncIteration
        return progress

    async def result(self) -> WarmResult:
        """Reads what is left and returns the whole result: memory for the keys of every document that is left.

        Raises:
            DrystoneError: When a call failed for good.
        """
        documents = [document async for progress in self for document in progress.documents]
        return warm_result(documents, self._state.progress)

    async def close(self) -> None:
        """Cancels the call that runs. May be called repeatedly."""
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
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    async def _advance(self) -> WarmProgress | None:
        while not self._closed.is_set():
            if self._call is None:
                step = self._state.next_step()
                if not isinstance(step, generation_pb2.WarmRequest):
                    return step
                self._call = self._method(step, timeout=self._timeout)
            try:
                response = await self._call.read()
            except asyncio.CancelledError:
                if self._closed.is_set() and not task_is_cancelled():
                    break
                raise
            except grpc.RpcError as error:
                self._call = None
                if not self._closed.is_set():
                    await self._wait(self._state.call_failed(error))
                continue
            if isinstance(response, generation_pb2.WarmResponse):
                return self._state.take(response)
            self._call = None
            self._state.call_ended()
        return None

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), seconds)
