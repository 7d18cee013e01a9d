"""Blocks that this worker encodes itself, because no prefill worker can."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

from decode_worker.lifecycle import Lifecycle
from decode_worker.pool import Pool
from decode_worker.request import Fetch
from shared import logs
from shared.engine.encode import encode_block
from shared.engine.native.encoder import NativeEncoder
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason

OnThread = Callable[[Callable[[], None]], Awaitable[None]]


class LocalEncoding:
    """A queue of fetches, encoded one at a time between steps.

    Args:
        model: Used on the engine thread.
        pool: Owns the extents that are written.
        lifecycle: Fails who waited for a block that cannot be encoded.
        committed: Told of a block that is whole, with the milliseconds that it took.
        native: Encodes where it was proved for the model.
    """

    def __init__(
        self,
        model: ServedModel,
        pool: Pool,
        lifecycle: Lifecycle,
        committed: Callable[[Fetch, float], None],
        native: NativeEncoder | None = None,
    ) -> None:
        self._model = model
        self._pool = pool
        self._lifecycle = lifecycle
        self._committed = committed
        self._native = native
        self._queue: deque[Fetch] = deque()
        self._log = logs.get("local_encoding")

    def __contains__(self, fetch: Fetch) -> bool:
        return fetch in self._queue

    def add(self, fetch: Fetch) -> None:
        """Queues a fetch; what is shipped for it from now on is of an older epoch. One that is whole needs nothing."""
        if fetch.restart() and fetch not in self._queue:
            self._queue.append(fetch)

    async def encode_one(self, on_thread: OnThread) -> bool:
        """Encodes the first block that is still wanted; False when none is."""
        while self._queue:
            fetch = self._queue.popleft()
            if fetch not in self._pool.fetches.all():
                continue
            if not fetch.landing.seize():
                continue  # it came from outside meanwhile
            extent = self._pool.arena.view(fetch.extent)
            began = time.monotonic()
            try:
                await on_thread(partial(encode_block, self._model, list(fetch.token_ids), extent, native=self._native))
            except Exception as error:  # noqa: BLE001 - whatever it was, only this block's requests fail
                self._failed(fetch, error)
                return True
            finally:
                fetch.landing.release()
            if fetch.waiters:
                self._committed(fetch, (time.monotonic() - began) * 1e3)
            else:
                self._pool.give_up(fetch)
            return True
        return False

    def _failed(self, fetch: Fetch, error: Exception) -> None:
        self._log.error("encode_failed", key=fetch.key.hex(), exc_info=error)
        for request in self._pool.give_up(fetch):
            wrong = DrystoneError(Reason.BLOCK_UNAVAILABLE, f"a block could not be encoded: {error}")
            self._lifecycle.fail(request, wrong)
