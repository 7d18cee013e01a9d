"""What one `warm` has sent and heard, for both clients. No I/O happens here."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drystone._block_info import BlockLocation, location
from drystone._exceptions import DeadlineExceededError, DrystoneError, InternalError
from drystone._prompts import Document
from drystone._results import BlockSource
from drystone._retries import Retries
from drystone._rpc_errors import from_rpc_error
from drystone._warm_batches import Batch, batches, warm_request
from drystone._warming import WarmedDocument, WarmOptions, WarmProgress
from drystone.v1 import generation_pb2

if TYPE_CHECKING:
    import grpc


class WarmState:
    """Cuts the documents into calls, and adds up what the calls say.

    A call that failed and may be repeated is sent again with the documents that it had not reported. So a document
    is reported once, and no more than one batch is ever held.

        documents ──► batch ──► call 1: 0 1 2 3 4 … reported: 0 2, then the call breaks
                          └───► call 2: 1 3 4 …

    Args:
        documents: Read a batch at a time.
        options: As the caller gave them.
        address: Gateway's host:port, for errors.
        retries: Which calls are repeated.

    Raises:
        TypeError: When `documents` is one document, or an option is unknown.
        InvalidRequestError: When an option cannot be carried.
    """

    def __init__(
        self, documents: Iterable[Document | str], options: WarmOptions, *, address: str, retries: Retries
    ) -> None:
        if isinstance(documents, str | bytes | Document):
            raise TypeError("documents: an iterable of documents, not a single one")
        self._request = warm_request(options)
        self._known_total = len(documents) if isinstance(documents, Sized) else None
        self._batches = batches(documents)
        self._address = address
        self._retries = retries
        # Documents of the batch that no call has reported yet, by place; `_sent[i]` is the place of the i-th document
        # of the call that runs.
        self._open = Batch()
        self._sent: list[int] = []
        self._done = 0
        self._failures = 0
        # Whether the server has answered: this call, any call.
        self._answered = self._heard = False
        self._ended = _Counts()
        self._running = _Counts()

    def next_step(self) -> generation_pb2.WarmRequest | WarmProgress | None:
        """The next call to make, progress that needs none, or None when everything is done."""
        if not self._open.documents:
            batch = next(self._batches, None)
            if batch is None:
                self._known_total = self._done
                return None
            self._open = batch
            if batch.refused:
                self._done += len(batch.refused)
                return self._progress(tuple(batch.refused))
        self._sent, self._answered = list(self._open.documents), False
        request = generation_pb2.WarmRequest(documents=self._open.documents.values())
        request.MergeFrom(self._request)
        return request

    def take(self, response: generation_pb2.WarmResponse) -> WarmProgress:
        """Reads one message of the call that runs.

        Raises:
            InternalError: When it speaks of a document that the call did not have.
        """
        self._answered = self._heard = True
        self._running = _counts(response)
        news = []
        for reported in response.documents:
            if reported.document_index >= len(self._sent):
                raise InternalError(
                    f"the gateway reported document {reported.document_index} of a call that had {len(self._sent)}"
                )
            index = self._sent[reported.document_index]
            if self._open.documents.pop(index, None) is not None:
                news.append(_warmed(index, reported))
        if news:
            self._done += len(news)
            self._failures = 0
        return self._progress(tuple(news))

    def call_ended(self) -> None:
        """The call ended well.

        Raises:
            InternalError: When it had not reported all of its documents.
        """
        self._add_up()
        if missing := len(self._open.documents):
            raise InternalError(f"the stream ended before it was complete: {missing} documents were not reported")

    def call_failed(self, failure: grpc.RpcError) -> float:
        """The call failed. Returns the seconds to wait before `next_step`.

        Raises:
            DrystoneError: When a repeat cannot help, or enough have been made.
        """
        error = from_rpc_error(failure, address=self._address, answered=self._answered)
        wait = self._wait_seconds(error)
        self._add_up()
        if wait is None:
            raise error from failure
        self._failures += 1
        return wait

    @property
    def progress(self) -> WarmProgress:
        """How far it is, without new documents."""
        return self._progress(())

    def _wait_seconds(self, error: DrystoneError) -> float | None:
        if isinstance(error, DeadlineExceededError) and len(self._open.documents) < len(self._sent):
            # Slow and not stuck: the rest gets a call, and a deadline, of its own.
            return 0.0
        return self._retries.wait_seconds(error, self._failures, heard=self._heard)

    def _add_up(self) -> None:
        self._ended = self._ended.plus(self._running)
        self._running = _Counts()

    def _progress(self, documents: tuple[WarmedDocument, ...]) -> WarmProgress:
        counts = self._ended.plus(self._running)
        return WarmProgress(
            documents_done=self._done,
            documents_total=self._known_total,
            tokens_encoded=counts.tokens,
            bytes_stored=counts.bytes,
            blocks_encoded=counts.blocks,
            documents=documents,
            stored=counts.stored,
        )


@dataclass(frozen=True, slots=True)
class _Counts:
    """Figures of one call, or of several added up."""

    tokens: int = 0
    bytes: int = 0
    blocks: int = 0
    stored: tuple[BlockLocation, ...] = ()

    def plus(self, other: _Counts) -> _Counts:
        """The sum, place by place."""
        sizes: dict[tuple[str, BlockSource], int] = {}
        for found in (*self.stored, *other.stored):
            sizes[found.place, found.source] = sizes.get((found.place, found.source), 0) + found.bytes
        return _Counts(
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
            blocks=self.blocks + other.blocks,
            stored=tuple(BlockLocation(place, source, size) for (place, source), size in sizes.items()),
        )


def _counts(response: generation_pb2.WarmResponse) -> _Counts:
    stored = tuple(map(location, response.stored))
    return _Counts(response.tokens_encoded, response.bytes_stored, response.blocks_encoded, stored)


def _warmed(index: int, reported: generation_pb2.WarmedDocument) -> WarmedDocument:
    return WarmedDocument(
        index=index,
        keys=tuple(reported.block_keys),
        tokens=reported.tokens,
        already_warm=reported.already_warm,
        error=reported.error,
        error_reason=reported.error_reason,
    )
