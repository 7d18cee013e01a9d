"""Where the chunks of one fetch land. The one thing that the event loop and the receiving thread share.

    event loop (owns the extent)              receiving thread (writes into it)
    restart, seize, close, moves              offer, take
                   └──────── lock ────────────────┘

The lock is held while a chunk is copied and summed, for less than a millisecond, so the loop may wait for it: memory
is never freed, moved or given to another writer under a chunk's feet. A landing that is `closed`, or whose epoch
has passed, is not touched any more.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from decode_worker.arena import Extent
from shared.internal.v1.common_pb2 import Reservation
from shared.internal.v1.transfer_pb2 import Birth, Chunk, RefusalReason
from shared.kv.birth import CHECKSUM_FUNCTION, ChunkRange, chunk_plan
from shared.kv.layout import KvShape

_R = RefusalReason


@dataclass(slots=True, eq=False, repr=False)
class Landing:
    """State of one fetch that chunks change.

    Attributes:
        key: Of the block, 32 bytes.
        tokens: Of the block.
        extent: Handle of its memory; its address is read under the lock, each time.
        shape: Of one token's KV.
        lock: Held by whoever reads or changes what is below, or writes the extent.
        epoch: Rises each time the fetch is driven anew.
        birth_id: Birth offered in this epoch; empty before the offer.
        past_births: Births offered in this epoch before it: their late messages change nothing.
        taken: Chunks verified of that birth.
        received_bytes: Of these.
        whole: Every chunk is verified: nothing but the commit follows.
        closed: The extent belongs to somebody else by now.
        local: The engine thread writes the extent: nothing from outside is taken.
        moved_at: `time.monotonic()` of the last chunk taken, or of the last drive.
    """

    key: bytes
    tokens: int
    extent: Extent
    shape: KvShape
    lock: threading.Lock = field(default_factory=threading.Lock)
    epoch: int = 1
    birth_id: bytes = b""
    past_births: set[bytes] = field(default_factory=set)
    taken: set[int] = field(default_factory=set)
    received_bytes: int = 0
    whole: bool = False
    closed: bool = False
    local: bool = False
    moved_at: float = field(default_factory=time.monotonic)
    _plan: tuple[ChunkRange, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._plan = chunk_plan(self.shape, self.tokens)

    # The event loop's.

    def restart(self) -> bool:
        """Begins a new epoch: nothing that was taken before counts. False for what is whole: its commit is near."""
        with self.lock:
            if self.whole:
                return False
            self.epoch += 1
            self.birth_id = b""
            self.past_births.clear()
            self.taken.clear()
            self.received_bytes = 0
            self.moved_at = time.monotonic()
            return True

    def seize(self) -> bool:
        """The engine thread writes the extent until `release`; False for what is whole already."""
        with self.lock:
            self.local = not self.whole
            return self.local

    def release(self) -> None:
        """The engine thread has ended writing."""
        with self.lock:
            self.local = False

    def close(self) -> None:
        """The extent is about to become resident, or free: from here on no chunk touches it."""
        with self.lock:
            self.closed = True

    # The receiving thread's; each is called under the lock.

    def stale(self, reservation: Reservation, key: bytes) -> RefusalReason.ValueType | None:
        """Why a message of a reservation is not for this landing now; None when it is."""
        if self.closed or self.key != key:
            return _R.REFUSAL_REASON_UNKNOWN_RESERVATION
        if reservation.epoch != self.epoch or self.local:
            return _R.REFUSAL_REASON_STALE_EPOCH
        return None

    def offer(self, birth: Birth) -> tuple[RefusalReason.ValueType, str] | None:
        """Takes an offer; why not, else None. Another birth than before begins again at chunk 0."""
        expected = (self.tokens, self.shape.extent_bytes(self.tokens), len(self.plan()), CHECKSUM_FUNCTION)
        if (birth.tokens, birth.bytes, birth.chunk_count, birth.checksum_function) != expected:
            return _R.REFUSAL_REASON_SHAPE, "offer does not fit the reservation"
        if birth.birth_id in self.past_births:
            return _R.REFUSAL_REASON_BIRTH, "another sender has offered the block since"
        if self.birth_id != birth.birth_id:
            if self.birth_id:
                self.past_births.add(self.birth_id)
            self.birth_id = bytes(birth.birth_id)
            self.taken.clear()
            self.received_bytes = 0
        return None

    def misfit(self, chunk: Chunk, size: int | None) -> tuple[RefusalReason.ValueType, str] | None:
        """Why a chunk with `size` bytes of data may not touch the extent; None when it may."""
        if not self.birth_id:
            return _R.REFUSAL_REASON_NO_OFFER, "nothing was offered in this epoch"
        if chunk.birth_id != self.birth_id:
            return _R.REFUSAL_REASON_BIRTH, "another birth than the one offered"
        plan = self.plan()
        if chunk.chunk_index >= len(plan) or size is None:
            return _R.REFUSAL_REASON_SHAPE, f"chunk {chunk.chunk_index} of {len(plan)}, {size} bytes of data"
        expected = plan[chunk.chunk_index]
        if (chunk.offset, chunk.length, size) != (expected.offset, expected.length, expected.length):
            return _R.REFUSAL_REASON_SHAPE, f"{size} bytes at {chunk.offset}; expected {expected.length}"
        if chunk.chunk_index in self.taken:
            return _R.REFUSAL_REASON_REPEATED, "already taken"
        return None

    def took(self, chunk: ChunkRange) -> None:
        """A chunk is in place and verified."""
        self.taken.add(chunk.index)
        self.received_bytes += chunk.length
        self.moved_at = time.monotonic()
        self.whole = len(self.taken) == len(self.plan())

    def plan(self) -> tuple[ChunkRange, ...]:
        """The chunks that the extent is cut into."""
        return self._plan
