"""The queue in front of the model: each block is encoded once however many ask, one at a time.

On CPU blocks are looped, not packed: a packed block-diagonal mask costs the square of the whole
(measured 5 to 8 times slower; docs/measurements.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from prefill_worker.store import RamStore, StoredBlock
from shared import logs
from shared.engine.encode import encode_block, new_extent
from shared.engine.native.encoder import NativeEncoder
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason
from shared.kv.birth import make_birth
from shared.transfer.raw import raw_bytes


@dataclass(slots=True, eq=False)
class Encoding:
    """One block in the queue, on the thread, or on its way; `interested` requests want it.

    Attributes:
        held_bytes: Bytes of the extent, from its making until the last of them has left.
    """

    key: bytes
    token_ids: tuple[int, ...]
    store: bool
    done: asyncio.Future[StoredBlock]
    interested: int = 0
    queued_at: float = field(default_factory=time.monotonic)
    queue_ms: float = 0.0
    encode_ms: float = 0.0
    held_bytes: int = 0


class Encoder:
    """Encodes blocks on one thread. All state belongs to the event loop."""

    def __init__(
        self,
        model: ServedModel,
        store: RamStore,
        max_queued: int,
        max_unshipped_bytes: int = 1 << 30,
        native: NativeEncoder | None = None,
    ) -> None:
        self._model = model
        self._native = native
        self._store = store
        self._max_queued = max_queued
        self._max_unshipped_bytes = max_unshipped_bytes
        self._unshipped_bytes = 0
        self._room = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._queue: asyncio.Queue[Encoding] = asyncio.Queue()
        self._open: dict[bytes, Encoding] = {}
        self._log = logs.get("encoder")
        self.blocks_total = self.tokens_total = 0
        self.seconds_total = 0.0

    @property
    def queued(self) -> int:
        """Blocks that are not encoded yet."""
        return len(self._open)

    def request(self, key: bytes, token_ids: Sequence[int], *, store: bool) -> tuple[Encoding, bool]:
        """Joins the encoding of a block, or begins it.

        Returns:
            The encoding, which the caller must `leave` once, and whether another request began it.

        Raises:
            DrystoneError: ENCODE_QUEUE_FULL.
        """
        encoding = self._open.get(key)
        shared = encoding is not None
        if encoding is None:
            if len(self._open) >= self._max_queued:
                raise DrystoneError(
                    Reason.ENCODE_QUEUE_FULL,
                    f"{len(self._open)} blocks wait to be encoded; limit {self._max_queued}",
                    metadata={"limit": str(self._max_queued)},
                    retry_after_ms=1000,
                )
            future = asyncio.get_running_loop().create_future()
            encoding = self._open[key] = Encoding(key, tuple(token_ids), store, future)
            self._queue.put_nowait(encoding)
        encoding.interested += 1
        encoding.store |= store
        return encoding, shared

    def leave(self, encoding: Encoding) -> None:
        """A request has shipped what it wanted, or gave up; an encoding that nobody wants is not begun."""
        encoding.interested -= 1
        if not encoding.interested:
            self._unshipped_bytes -= encoding.held_bytes
            encoding.held_bytes = 0
            self._room.set()

    async def run(self) -> None:
        """Encodes until cancelled; what is then open fails."""
        try:
            while True:
                encoding = await self._queue.get()
                # Extents that wait for a slow decode worker must not pile up: no more are made until some have left.
                while self._unshipped_bytes > self._max_unshipped_bytes:
                    self._room.clear()
                    await self._room.wait()
                await self._encode(encoding)
        finally:
            for encoding in self._open.values():
                _fail(encoding, DrystoneError(Reason.DRAINING, "the prefill worker is stopping"))
            self._thread.shutdown(wait=True)

    async def _encode(self, encoding: Encoding) -> None:
        if not encoding.interested:
            del self._open[encoding.key]
            encoding.done.cancel()
            return
        began = time.monotonic()
        encoding.queue_ms = (began - encoding.queued_at) * 1e3
        try:
            block = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, encoding)
        except Exception as error:  # noqa: BLE001 - whatever it was, only this block fails
            self._log.error("encode_failed", key=encoding.key.hex(), exc_info=error)
            _fail(encoding, DrystoneError(Reason.BLOCK_UNAVAILABLE, f"a block could not be encoded: {error}"))
        else:
            seconds = time.monotonic() - began
            encoding.encode_ms = seconds * 1e3
            self.blocks_total += 1
            self.tokens_total += len(encoding.token_ids)
            self.seconds_total += seconds
            if encoding.store:
                self._store.put(block)
            if encoding.interested:
                encoding.held_bytes = block.bytes
                self._unshipped_bytes += block.bytes
            if not encoding.done.done():
                encoding.done.set_result(block)
        del self._open[encoding.key]

    def _run(self, encoding: Encoding) -> StoredBlock:
        tokens = len(encoding.token_ids)
        extent = new_extent(self._model.geometry.shape, tokens)
        encode_block(self._model, list(encoding.token_ids), extent, native=self._native)
        birth = make_birth(encoding.key, self._model.geometry.shape, tokens, raw_bytes(extent))
        return StoredBlock(encoding.key, encoding.token_ids, extent, birth)


def _fail(encoding: Encoding, error: DrystoneError) -> None:
    if not encoding.done.done():
        encoding.done.set_exception(error)
        encoding.done.exception()  # seen, even when every requester has gone
