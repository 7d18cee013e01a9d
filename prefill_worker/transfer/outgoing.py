"""One extent on its way: what is still to send, what is out, what was answered. No sockets, no clock of its own.

┌── refused: CHECKSUM, SHAPE, NO_OFFER, CREDIT, NO_GROUP; or lost (a Ping was answered) ──┐
▼                                                                                         │
to send ──▶ out ──▶ answered: taken ──▶ … ──▶ Committed
│ the first whose checksum is not made yet holds the rest up, in order
└─ whose source failed ends the transfer
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from prefill_worker.transfer.errors import SourceLostError, refusal_name, refused_block
from prefill_worker.transfer.source import Source
from shared.errors import DrystoneError
from shared.internal.v1.common_pb2 import Reservation
from shared.internal.v1.transfer_pb2 import Abort, Birth, Chunk, ChunkResult, Offer, RefusalReason, TransferHeader
from shared.kv.birth import CHECKSUM_FUNCTION, ChunkRange, chunk_plan
from shared.kv.layout import KvShape

_R = RefusalReason
_TAKEN = frozenset({_R.REFUSAL_REASON_UNSPECIFIED, _R.REFUSAL_REASON_REPEATED})
_AGAIN = frozenset({_R.REFUSAL_REASON_CHECKSUM, _R.REFUSAL_REASON_SHAPE, _R.REFUSAL_REASON_NO_OFFER})
# Nothing was wrong with the chunk.
_NO_FAULT = frozenset({_R.REFUSAL_REASON_CREDIT, _R.REFUSAL_REASON_NO_GROUP})
# Chunks sent again because the receiver refused them, beyond one in eight: more is no accident.
_RESENDS = 8


@dataclass(frozen=True, slots=True)
class Shipped:
    """What a transfer did.

    Attributes:
        bytes: Of all chunks that were sent, those sent again among them.
        resent: Chunks sent again, by reason.
        seconds: From the first message to the answer that it is whole.
        credit_wait_seconds: Of these, those in which a chunk was ready and the receiver had given no credit.
        transport: Such as "zmq-tcp".
    """

    bytes: int
    resent: Counter[str]
    seconds: float
    credit_wait_seconds: float
    transport: str

    @property
    def chunks_resent(self) -> int:
        """Chunks sent again."""
        return self.resent.total()


class Outgoing:
    """A transfer. Used by the sending thread alone.

    Args:
        number: Its number, not used twice in the life of this worker.
        source: What is sent.
        reservation: Where it goes.
        shape: Of one token's KV.
        ended: Told once how it ended, on the sending thread.
    """

    def __init__(
        self,
        number: int,
        source: Source,
        reservation: Reservation,
        shape: KvShape,
        ended: Callable[[Shipped | DrystoneError], None],
    ) -> None:
        self.number = number
        self.source = source
        self.reservation = reservation
        self.chunks = chunk_plan(shape, source.tokens)
        self.ended = False
        self._tell = ended
        self._bytes = shape.extent_bytes(source.tokens)
        self._offered = False
        self._to_send = list(range(len(self.chunks)))
        # Chunks without an answer, with the count of messages of the pair when they were sent, and the time.
        self._out: dict[int, tuple[int, float]] = {}
        # Answered as taken, and not yet asked after with `taken`.
        self._just_taken: tuple[int, float] = (0, 0.0)
        self._refused = 0
        self._sent_bytes = 0
        self.resent: Counter[str] = Counter()
        self.credit_wait_seconds = 0.0
        self._began = time.monotonic()
        self._waiting_since: float | None = None

    @property
    def wants_answers(self) -> bool:
        """True while chunks are out."""
        return bool(self._out)

    def next(self, order: int, credit: int, now: float) -> tuple[TransferHeader, memoryview | None] | None:
        """What to send next; None while there is nothing, or no credit for it.

        Args:
            order: Count of messages of the pair, this one included.
            credit: Bytes that may be sent now.
            now: `time.monotonic()`.
        """
        chunk = self.chunks[self._to_send[0]] if self._to_send else None
        checksum = None if chunk is None else self.source.checksum(chunk.index)
        if not self._offered and (chunk is None or checksum is None or chunk.length > credit):
            self._offered = True
            return TransferHeader(offer=self._offer()), None
        if chunk is None:
            return None
        if checksum is None:
            if self.source.failure is not None:
                self.end(SourceLostError(f"the encoding that was being shipped failed: {self.source.failure}"))
            return None
        if chunk.length > credit:
            if self._waiting_since is None:
                self._waiting_since = now
            return None
        self._credit_waited(now)
        heapq.heappop(self._to_send)
        self._out[chunk.index] = (order, now)
        self._sent_bytes += chunk.length
        header = TransferHeader(chunk=self._chunk(chunk, checksum))
        if not self._offered:
            self._offered = True
            header.chunk.birth.CopyFrom(self._birth())
        return header, self.source.data[chunk.offset : chunk.offset + chunk.length]

    @property
    def waits_for_credit(self) -> bool:
        """True when the last `next` found a chunk ready and no credit for it."""
        return self._waiting_since is not None

    def answered(self, result: ChunkResult) -> bool:
        """Takes what the receiver said of a chunk; True when that is progress."""
        sent = self._out.pop(result.chunk_index, None)
        if sent is None:
            return False  # said before
        if result.refusal in _TAKEN:
            self._just_taken = (self.chunks[result.chunk_index].length, sent[1])
            return True
        if result.refusal in _NO_FAULT:
            self._again(result.chunk_index, refusal_name(result.refusal))
            return False
        if result.refusal == _R.REFUSAL_REASON_NO_OFFER:
            self._offered = False
        self._refused += 1
        if result.refusal not in _AGAIN or self._refused > _RESENDS + len(self.chunks) // _RESENDS:
            self.end(refused_block(result.refusal, result.message))
        else:
            self._again(result.chunk_index, refusal_name(result.refusal))
        return False

    def taken(self, index: int | None) -> tuple[int, float]:
        """Bytes that the last answer was for, and when they were sent; None for all that are out."""
        if index is not None:
            return self._just_taken
        sizes = [self.chunks[one].length for one in self._out]
        return sum(sizes), min((at for _, at in self._out.values()), default=0.0)

    def lost(self, before: int) -> None:
        """What was sent before message `before` of the pair, and is not answered, never arrived."""
        for index in [index for index, (order, _) in self._out.items() if order < before]:
            del self._out[index]
            self._again(index, "LOST")

    def begin_anew(self) -> None:
        """The receiver knows nothing of this pair any more: offer again; it keeps what it has verified."""
        self._offered = False
        for index in list(self._out):
            del self._out[index]
            self._again(index, "RECONNECT")

    def whole(self, transport: str) -> None:
        """The receiver has it all."""
        seconds = time.monotonic() - self._began
        self.end(Shipped(self._sent_bytes, self.resent, seconds, self.credit_wait_seconds, transport))

    def end(self, outcome: Shipped | DrystoneError) -> None:
        """Ends it, once."""
        if not self.ended:
            self.ended = True
            self._to_send.clear()
            self._out.clear()
            self._tell(outcome)

    def abort(self, why: str) -> TransferHeader:
        """Says that the rest will not come."""
        return TransferHeader(
            abort=Abort(
                transfer_id=self.number, reason=why, reservation=self.reservation, birth_id=self.source.birth_id
            )
        )

    def _again(self, index: int, reason: str) -> None:
        heapq.heappush(self._to_send, index)
        self.resent[reason] += 1

    def _credit_waited(self, now: float) -> None:
        if self._waiting_since is not None:
            self.credit_wait_seconds += now - self._waiting_since
            self._waiting_since = None

    def _birth(self) -> Birth:
        return Birth(
            birth_id=self.source.birth_id,
            tokens=self.source.tokens,
            bytes=self._bytes,
            chunk_count=len(self.chunks),
            checksum_function=CHECKSUM_FUNCTION,
        )

    def _offer(self) -> Offer:
        return Offer(transfer_id=self.number, reservation=self.reservation, key=self.source.key, birth=self._birth())

    def _chunk(self, chunk: ChunkRange, checksum: int) -> Chunk:
        return Chunk(
            transfer_id=self.number,
            reservation=self.reservation,
            key=self.source.key,
            birth_id=self.source.birth_id,
            chunk_index=chunk.index,
            first_layer=chunk.first_layer,
            layer_count=chunk.layer_count,
            offset=chunk.offset,
            length=chunk.length,
            checksum=checksum,
        )
