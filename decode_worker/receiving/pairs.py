"""Senders that were welcomed: what each has sent, and how far it may go."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from drystone.v1.operations_pb2 import PairDirection, PairState, PairStatus
from shared.internal.v1.common_pb2 import WorkerIdentity
from shared.kv.birth import CHUNK_BYTES
from shared.transfer.choice import Backend
from shared.transfer.pair_stats import PairStats

# Of one pair: what a long fat wire needs (10 ms at 10 Gb/s is 12 MB).
PAIR_WINDOW_BYTES = 16 << 20
# Least window of a pair: without two chunks on the way a wire idles.
LEAST_WINDOW_BYTES = 2 * CHUNK_BYTES
# A receiver does not know what is still to come: heard lately is open.
_BUSY_SECONDS = 2.0
# Senders whose last message is older are forgotten first when there are too many.
MAX_PAIRS = 4096


@dataclass(slots=True, eq=False)
class Pair:
    """One sender's connection. Used by the receiving thread alone.

    Attributes:
        peer: Routing id of its connection.
        stats: What status shows of it.
        session: Number that it drew for this connection.
        seen_bytes: Highest count of sent bytes that it told.
        credit_limit: Highest count that it was allowed.
        heard_at: `time.monotonic()` of its last message.
        backend: Process group that its sender may ask for.
    """

    peer: bytes
    stats: PairStats
    session: int
    seen_bytes: int = 0
    credit_limit: int = 0
    heard_at: float = field(default_factory=time.monotonic)
    backend: Backend | None = None

    def saw(self, sent_bytes: int) -> bool:
        """Notes how much was sent; False when that is beyond the credit."""
        if sent_bytes > self.credit_limit:
            return False
        self.seen_bytes = max(self.seen_bytes, sent_bytes)
        return True

    def look(self) -> PairStats:
        """What status shows, as it is now."""
        busy = time.monotonic() - self.heard_at < _BUSY_SECONDS
        self.stats.state = PairState.PAIR_STATE_OPEN if busy else PairState.PAIR_STATE_IDLE
        self.stats.credit_free_bytes = self.credit_limit - self.seen_bytes
        return self.stats


class Pairs:
    """Every pair of a decode worker, and the memory that they may fill together.

    Args:
        budget_bytes: What all senders together may have sent that is not in its place yet.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._pairs: OrderedDict[bytes, Pair] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pairs)

    def __contains__(self, peer: object) -> bool:
        return peer in self._pairs

    def all(self) -> list[Pair]:
        """Every pair, the one that was heard last at the end. From any thread."""
        return list(self._pairs.values())

    def statuses(self) -> list[PairStatus]:
        """What status shows of each. From any thread."""
        return [pair.look().snapshot() for pair in self.all()]

    @property
    def window_bytes(self) -> int:
        """Bytes that a pair may have outstanding now."""
        return max(LEAST_WINDOW_BYTES, min(PAIR_WINDOW_BYTES, self._budget // max(1, len(self._pairs))))

    def welcome(self, peer: bytes, session: int, sender: WorkerIdentity, transport: str, *, curve: bool) -> Pair:
        """Books of a greeting; one that was told twice keeps them, another session of the connection begins anew."""
        pair = self._pairs.get(peer)
        if pair is None or pair.session != session:
            stats = PairStats(sender.worker_id, "", PairDirection.PAIR_DIRECTION_RECEIVE, transport, curve)
            pair = self._pairs[peer] = Pair(peer, stats, session)
            while len(self._pairs) > MAX_PAIRS:
                self._pairs.popitem(last=False)
        self.granted(pair)
        return pair

    def heard(self, peer: bytes) -> Pair | None:
        """The pair of a message; None when it has not greeted."""
        pair = self._pairs.get(peer)
        if pair is not None:
            pair.heard_at = time.monotonic()
            self._pairs.move_to_end(peer)
        return pair

    def granted(self, pair: Pair) -> int:
        """How far the pair may go now. Never less than it was told before: what is allowed stays allowed."""
        pair.credit_limit = max(pair.credit_limit, pair.seen_bytes + self.window_bytes)
        return pair.credit_limit

    def forget(self, peer: bytes) -> None:
        """The connection is gone."""
        self._pairs.pop(peer, None)

    def forget_silent(self, seconds: float) -> None:
        """Lets go of those that have said nothing for so long: a new message makes them greet again."""
        before = time.monotonic() - seconds
        for peer in [peer for peer, pair in self._pairs.items() if pair.heard_at < before]:
            self.forget(peer)
