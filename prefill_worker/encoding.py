"""One block on its way from the queue through the model to those who asked for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from prefill_worker.batch_queue import Entry
from prefill_worker.newborn import Newborn
from prefill_worker.tiers.block import StoredBlock
from shared.errors import DrystoneError


@dataclass(slots=True, eq=False, kw_only=True)
class Encoding(Entry):
    """One block that is queued, on the thread, or on its way; only the encoder changes it.

    Attributes:
        key: 32 bytes.
        token_ids: Its tokens.
        tenant: Whose request asked first.
        store: Somebody wants it kept, and it was not deleted since.
        begun: What can be shipped already: the newborn of the forward that runs, which may fail and be followed by
            another; the block itself, where nobody saw it being made; or what `done` failed with. Shielded, as `done`.
        done: The block, or the DrystoneError that it failed with. Callers shield it, for it is shared; cancelled
            when nobody wanted it any more before it was begun.
        interested: Requests that have joined and not left.
        queue_ms: From its arrival to its being taken; 0 until then.
        encode_ms: Of the batch that it was made in; 0 until it is made.
        held_bytes: Bytes of the extent, from the beginning of its forward until the last of the interested has left.
    """

    key: bytes
    token_ids: tuple[int, ...]
    begun: asyncio.Future[Newborn | StoredBlock]
    done: asyncio.Future[StoredBlock]
    tenant: str = ""
    store: bool = False
    interested: int = 0
    queue_ms: float = 0.0
    encode_ms: float = 0.0
    held_bytes: int = 0

    def begin(self, newborn: Newborn | None) -> None:
        """A forward began; None: it failed, and another may follow.

        Those who ship the failed one hear of it from itself; whoever joins now shall not begin with it.
        """
        if self.begun.done():
            self.begun = self.done.get_loop().create_future()
        if newborn is not None:
            self.begun.set_result(newborn)

    def succeed(self, block: StoredBlock) -> None:
        """It is made."""
        for future in (self.begun, self.done):
            if not future.done():
                future.set_result(block)

    def fail(self, error: DrystoneError) -> None:
        """It will not be made."""
        for future in (self.begun, self.done):
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen, even when every requester has gone

    def cancel(self) -> None:
        """Nobody wants it any more."""
        self.begun.cancel()
        self.done.cancel()
