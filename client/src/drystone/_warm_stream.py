"""Warming on its way, for the synchronous client. Its twin is _async_warm_stream.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc

from drystone._warming import WarmProgress, WarmResult, warm_result
from drystone.v1 import generation_pb2

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from drystone._warm_state import WarmState


class WarmStream(Iterator[WarmProgress]):
    """Warming on its way: an iterator of progress that cancels its call when it is left.

    The call that runs is owned by this object: it ends by itself, with `close`, or with the object's life. What was
    encoded until then stays, so warming the same documents again goes on from there.

    Example:
        >>> with client.warm(documents, tags=["handbook"]) as stream:
        ...     for progress in stream:
        ...         print(progress.documents_done, [document.error for document in progress.documents])
    """

    def __init__(
        self,
        method: grpc.UnaryStreamMultiCallable[generation_pb2.WarmRequest, generation_pb2.WarmResponse],
        state: WarmState,
        timeout: float | None,
    ) -> None:
        self._method = method
        self._state = state
        self._timeout = timeout
        self._call: grpc._CallIterator[generation_pb2.WarmResponse] | None = None
        # Set once and for all: also ends the wait before a repeat.
        self._closed = threading.Event()

    def __next__(self) -> WarmProgress:
        """The next progress. Calls that may be repeated are, after a wait.

        Raises:
            DrystoneError: When a call failed for good. Failures of single documents are in their progress.
        """
        try:
            progress = self._advance()
        except Exception:
            self.close()
            raise
        if progress is None:
            self._closed.set()
            raise StopIteration
        return progress

    def result(self) -> WarmResult:
        """Reads what is left and returns the whole result: memory for the keys of every document that is left.

        Raises:
            DrystoneError: When a call failed for good.
        """
        documents = [document for progress in self for document in progress.documents]
        return warm_result(documents, self._state.progress)

    def close(self) -> None:
        """Cancels the call that runs. May be called from any thread, and repeatedly."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    def __enter__(self) -> Self:
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()

    def __del__(self) -> None:
        """Closes, for loops that were left by `break`."""
        self.close()

    def _advance(self) -> WarmProgress | None:
        while not self._closed.is_set():
            if self._call is None:
                step = self._state.next_step()
                if not isinstance(step, generation_pb2.WarmRequest):
                    return step
                self._call = self._method(step, timeout=self._timeout)
                continue  # `close` may have come while there was no call to cancel
            try:
                response = next(self._call)
            except StopIteration:
                self._call = None
                self._state.call_ended()
            except grpc.RpcError as error:
                self._call = None
                if not self._closed.is_set():
                    self._closed.wait(self._state.call_failed(error))
            else:
                return self._state.take(response)
        return None
