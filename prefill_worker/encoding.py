"""One block on its way from the queue through the model to those who asked for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from prefill_worker.batch_queue import Entry
from prefill_worker.tiers.block import StoredBlock


@dataclass(slots=True, eq=False, kw_only=True)
class Encoding(Entry):
    """One block that is queued, on the thread, or on its way; only the encoder changes it.

    Attributes:
        key: 32 bytes.
        token_ids: Its tokens.
        tenant: Whose request asked first.
        store: Somebody wants it kept, and it was not deleted since.
        done: The block, or the DrystoneError that it failed with. Callers shield it, for it is shared; cancelled
            when nobody wanted it any more before it was begun.
        interested: Requests that have joined and not left.
        queue_ms: From its arrival to its being taken; 0 until then.
        encode_ms: Of the batch that it was made in; 0 until it is made.
        held_bytes: Bytes of the extent, from its making until the last of the interested has left.
    """

    key: bytes
    token_ids: tuple[int, ...]
    done: asyncio.Future[StoredBlock]
    tenant: str = ""
    store: bool = False
    interested: int = 0
    queue_ms: float = 0.0
    encode_ms: float = 0.0
    held_bytes: int = 0
