"""One pair: greeting, credit, the transfers that share it, and what proves that something was lost. No sockets.

Credit is a count and not a sum of messages: every chunk carries the bytes sent so far in this session, every answer
how far that count may go. So an answer that is lost costs nothing, and a chunk that is lost gives its bytes back with
the next chunk or Ping. Bytes outside this process and not yet with the receiver never exceed the receiver's window: a
slow decode worker holds the sender up, it does not make the sender's memory grow.

Messages of a pair keep their order. What was sent before a Ping and has no answer when its Pong comes is lost, and is
sent again; a slow wire alone never causes that.

    GREETING ──Welcome──▶ OPEN ──NO_HELLO (the connection was made anew)──▶ GREETING
        │ refused, or no answer            │ no progress for too long
        └──────────────▶ BROKEN ◀──────────┘
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from enum import Enum

from drystone.v1.operations_pb2 import PairState
from prefill_worker.transfer.errors import LinkBrokenError, refused_block, refused_pair
from prefill_worker.transfer.group_way import GroupWay
from prefill_worker.transfer.outgoing import Outgoing
from shared import logs
from shared.errors import DrystoneError
from shared.internal.v1.common_pb2 import Compatibility, WorkerIdentity
from shared.internal.v1.transfer_pb2 import Committed, Hello, Ping, RefusalReason, Refused, TransferHeader
from shared.transfer.choice import told
from shared.transfer.pair_stats import PairStats

# Of a greeting: to its repetition, and to its being given up.
HELLO_AGAIN_SECONDS = 1.0
HELLO_SECONDS = 5.0
# Silence after which a Ping asks whether anything was lost.
PING_SECONDS = 0.25
# A link without transfers is closed: its receiver may be gone for good.
IDLE_SECONDS = 300.0
_R = RefusalReason
Send = Callable[[TransferHeader, memoryview | None], None]


class State(Enum):
    """Of a link."""

    GREETING = "greeting"
    OPEN = "open"
    BROKEN = "broken"


class Link:
    """The sending end of one pair. Used by the sending thread alone.

    Args:
        sender: This worker.
        receiver: The life of the decode worker that it is for.
        compatibility: What this worker's KV is.
        timeout_seconds: Longest time without progress.
        send: Sends a message; never blocks.
        now: `time.monotonic()`.
        stats: What status shows of the pair; kept up to date here.
        way: Process group beside ZeroMQ; owned by the link.
    """

    def __init__(
        self,
        sender: WorkerIdentity,
        receiver: WorkerIdentity,
        compatibility: Compatibility,
        timeout_seconds: float,
        send: Send,
        now: float,
        stats: PairStats,
        way: GroupWay | None = None,
    ) -> None:
        self.receiver = receiver
        self.way = way
        self.stats = stats
        self.state = State.GREETING
        self.failure: DrystoneError | None = None
        self.sent_bytes = self.credit_limit = 0
        self.greetings_total = 0
        self._hello = Hello(sender=sender, receiver=receiver, compatibility=compatibility)
        if way is not None:
            self._hello.end.CopyFrom(told(way.end))
        self._timeout = timeout_seconds
        self._send_now = send
        self._transfers: dict[int, Outgoing] = {}
        # Whose turn it is; a transfer that is not in it has nothing to send.
        self._turns: deque[Outgoing] = deque()
        self._order = 0
        self._pings: dict[int, tuple[int, float]] = {}
        self._nonce = 0
        self._greeted_at = self._hello_at = self._progress_at = self._heard_at = self._used_at = now
        self._asked_at = now
        self._expecting = False
        self._garbled = ""
        self._window = 0
        self._log = logs.get("link")
        self._greet(now)

    @property
    def idle(self) -> bool:
        """True without transfers."""
        return not self._transfers

    @property
    def outstanding_bytes(self) -> int:
        """Bytes sent that the receiver has not said to have dealt with."""
        return max(0, self.sent_bytes - (self.credit_limit - self._window))

    def begin(self, transfer: Outgoing, now: float) -> None:
        """Takes a transfer; it ends by itself, or with the link."""
        self._used_at = now
        self._transfers[transfer.number] = transfer
        self._turns.append(transfer)
        self.pump(now)

    def cancel(self, transfer: Outgoing, why: str) -> None:
        """Nobody wants it any more; what is out will be answered to nobody."""
        if transfer.number in self._transfers:
            self._leave(transfer)
            if self.state is State.OPEN:
                self._send(transfer.abort(why))

    def pump(self, now: float) -> None:
        """Sends what may be sent, each transfer in its turn."""
        without = 0
        while self.state is State.OPEN and self._turns and without < len(self._turns):
            transfer = self._turns.popleft()
            if transfer.number not in self._transfers:
                continue
            message = transfer.next(self._order + 1, self.credit_limit - self.sent_bytes, now)
            if transfer.ended:
                self._leave(transfer)
                self._send(transfer.abort("the encoding failed"))
                continue
            self._turns.append(transfer)
            if transfer.waits_for_credit:
                self._expect(now)
                self._turns.rotate(1)  # it is the first when credit comes
                return
            if message is None:
                without += 1
                continue
            without = 0
            self._expect(now)
            self._send_piece(*message, now)
            self._used_at = now

    def heard(self, header: TransferHeader, now: float) -> None:
        """Takes a message of the receiver."""
        kind = header.WhichOneof("message")
        if self.state is State.GREETING:
            self._greeted(header, now)
            return
        if self.state is State.BROKEN:
            return
        self._heard_at = now
        match kind:
            case "chunk_result":
                self._credit(header.chunk_result.credit_limit)
                transfer = self._transfers.get(header.chunk_result.transfer_id)
                if transfer is not None and transfer.answered(header.chunk_result):
                    self._arrived(transfer, header.chunk_result.chunk_index, now)
                self._settle(transfer)
            case "committed":
                self._committed(header.committed, now)
            case "refused":
                self._refused(header.refused, now)
            case "pong":
                self._pong(header.pong.nonce, header.pong.credit_limit, now)
            case "grant":
                self._credit(header.grant.credit_limit)
            case "group_invite" | "group_end":
                self._of_group(header, now)
        self.pump(now)

    def _committed(self, committed: Committed, now: float) -> None:
        self._credit(committed.credit_limit)
        done = self._transfers.pop(committed.transfer_id, None)
        if done is not None:
            self._arrived(done, None, now)
            done.whole(self.stats.transport)
            self._forget(done)

    def _of_group(self, header: TransferHeader, now: float) -> None:
        if self.way is None:
            return
        if header.HasField("group_invite"):
            self.way.invited(header.group_invite, now)
        else:
            self.way.ended(header.group_end, now)

    def look(self) -> PairStats:
        """What status shows, as it is now. From any thread."""
        if self.state is State.OPEN:
            self.stats.state = PairState.PAIR_STATE_IDLE if self.idle else PairState.PAIR_STATE_OPEN
        else:
            greeting = self.state is State.GREETING
            self.stats.state = PairState.PAIR_STATE_GREETING if greeting else PairState.PAIR_STATE_BROKEN
        self.stats.outstanding_bytes = self.outstanding_bytes
        self.stats.credit_free_bytes = self.credit_limit - self.sent_bytes
        return self.stats

    def garbled(self, detail: str, now: float) -> None:
        """Something came that cannot be read: it may have been an answer."""
        self._garbled = f"; what came could not be read: {detail}"
        self._heard_at = min(self._heard_at, now - PING_SECONDS)

    def tick(self, now: float) -> float:
        """Does what time asks for; returns the seconds until it asks again."""
        if self.way is None:
            return self._tick(now)
        return min(self.way.tick(now), self._tick(now))

    def _tick(self, now: float) -> float:
        if self.state is State.GREETING:
            if now - self._greeted_at > min(HELLO_SECONDS, self._timeout):
                waited = f"did not answer within {min(HELLO_SECONDS, self._timeout)} s{self._garbled}"
                self.break_off(LinkBrokenError(f"decode worker {self.receiver.worker_id} {waited}"))
            elif now - self._hello_at > HELLO_AGAIN_SECONDS:
                self._hello_at = now
                self._send(TransferHeader(hello=self._hello))
            return min(HELLO_AGAIN_SECONDS, self._timeout) / 4
        if self.state is State.BROKEN or not self._transfers:
            self._expecting = False
            return IDLE_SECONDS
        waits_for_credit = any(one.waits_for_credit for one in self._transfers.values())
        if not waits_for_credit and not any(one.wants_answers for one in self._transfers.values()):
            self._expecting = False  # sources are behind
            return IDLE_SECONDS
        if now - self._progress_at > self._timeout:
            what = "no credit from the decode worker" if waits_for_credit else "no progress of a transfer"
            self.break_off(LinkBrokenError(f"{what} within {self._timeout} s"))
            return IDLE_SECONDS
        self._ping(now)
        return min(PING_SECONDS, self._timeout) / 2

    def idle_seconds(self, now: float) -> float:
        """Since it was used last."""
        return 0.0 if self._transfers else now - self._used_at

    def break_off(self, why: DrystoneError) -> None:
        """Ends the link and every transfer on it."""
        if self.state is State.BROKEN:
            return
        self.state, self.failure = State.BROKEN, why
        self.stats.last_error = why.message
        transfers, self._transfers = list(self._transfers.values()), {}
        self._turns.clear()
        if self.way is not None:
            self.way.close()
        for transfer in transfers:
            transfer.end(why)

    def _greet(self, now: float) -> None:
        """A session begins: neither side owes the other anything."""
        self.state = State.GREETING
        self._hello.session = secrets.randbits(64) | 1
        self.sent_bytes = self.credit_limit = 0
        self._pings.clear()
        self._greeted_at = self._hello_at = now
        self.greetings_total += 1
        for transfer in self._transfers.values():
            transfer.begin_anew()
        self._send(TransferHeader(hello=self._hello))

    def _greeted(self, header: TransferHeader, now: float) -> None:
        if header.HasField("welcome") and header.welcome.session == self._hello.session:
            self.state = State.OPEN
            self._progress_at = self._heard_at = now
            self._window = header.welcome.credit_limit
            self._credit(self._window)
            if self.way is not None:
                self.way.welcomed(header.welcome.group_backend)
            self.pump(now)
        elif header.HasField("refused") and header.refused.transfer_id == 0:
            refused = header.refused
            # What was sent before the greeting is refused for want of one; a greeting that was spoilt is said again.
            if refused.reason not in (_R.REFUSAL_REASON_NO_HELLO, _R.REFUSAL_REASON_MALFORMED):
                name = self.receiver.worker_id
                self.break_off(refused_pair(name, refused.reason, refused.message, refused.field))

    def _refused(self, refused: Refused, now: float) -> None:
        if refused.transfer_id:
            self._credit(refused.credit_limit)
            transfer = self._transfers.get(refused.transfer_id)
            if transfer is not None:
                transfer.end(refused_block(refused.reason, refused.message))
            self._settle(transfer)
        elif refused.reason == _R.REFUSAL_REASON_NO_HELLO:
            self._log.info("greeting_anew", receiver=self.receiver.worker_id)
            self._greet(now)
        elif refused.reason == _R.REFUSAL_REASON_MALFORMED:
            self._heard_at = min(self._heard_at, now - PING_SECONDS)  # something was spoilt on its way: ask what
        else:
            name = self.receiver.worker_id
            self.break_off(refused_pair(name, refused.reason, refused.message, refused.field))

    def _expect(self, now: float) -> None:
        """Something is expected of the receiver; where nothing was until now, its time begins."""
        if not self._expecting:
            self._expecting = True
            self._progress_at = self._heard_at = self._asked_at = now

    def _ping(self, now: float) -> None:
        """Asks what was lost: soon when nothing is heard, once in a while when answers come to other chunks."""
        silent = now - self._heard_at >= PING_SECONDS
        if now - self._asked_at >= (PING_SECONDS if silent else 4 * PING_SECONDS):
            self._nonce += 1
            self._asked_at = now
            self._send(TransferHeader(ping=Ping(nonce=self._nonce, sent_bytes=self.sent_bytes)))
            self._pings[self._nonce] = (self._order, now)

    def _pong(self, nonce: int, limit: int, now: float) -> None:
        self._credit(limit)
        order, sent_at = self._pings.get(nonce, (0, now))
        if not order:
            return
        self.stats.round_trip_seconds = now - sent_at
        self._pings = {number: ping for number, ping in self._pings.items() if number > nonce}
        for transfer in self._transfers.values():
            transfer.lost(order)

    def _credit(self, limit: int) -> None:
        self.credit_limit = max(self.credit_limit, limit)

    def _settle(self, transfer: Outgoing | None) -> None:
        if transfer is not None and transfer.ended:
            self._leave(transfer)

    def _leave(self, transfer: Outgoing) -> None:
        if self._transfers.pop(transfer.number, None) is not None:
            self._forget(transfer)

    def _forget(self, transfer: Outgoing) -> None:
        self.stats.resent_total += transfer.resent.total()
        self.stats.credit_wait_seconds_total += transfer.credit_wait_seconds

    def _arrived(self, transfer: Outgoing, index: int | None, now: float) -> None:
        """Progress: a chunk is in its place, or all that were out are."""
        self._progress_at = now
        size, sent_at = transfer.taken(index)
        if size:
            self.stats.bandwidth.answered(size, sent_at, now)

    def _send_piece(self, header: TransferHeader, data: memoryview | None, now: float) -> None:
        if data is not None:
            self.sent_bytes += len(data)
            self.stats.bytes_total += len(data)
            self.stats.chunks_total += 1
            header.chunk.sent_bytes = self.sent_bytes
            run = None if self.way is None else self.way.send(data, now)
            if run is not None:
                header.chunk.group, header.chunk.run = run
                data = None  # it lies in the group's staging by now
        self._send(header, data)

    def _send(self, header: TransferHeader, data: memoryview | None = None) -> None:
        self._order += 1
        self._send_now(header, data)


def closed() -> LinkBrokenError:
    """What transfers on a link that its owner closes end with."""
    return LinkBrokenError("the link was closed")
