"""What one end of a pair tells of itself: its line in `drystone status`.

The thread that owns the pair writes; anybody reads. Fields stand for themselves, so a reader may see one that is newer
than another, never half of one.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from drystone.v1.operations_pb2 import PairDirection, PairState, PairStatus

# Busy time after which what was measured counts half.
_HALF_LIFE_SECONDS = 5.0
_LAST_ERROR_CHARACTERS = 200


class Bandwidth:
    """Bytes a second while something was on its way; recent times count more.

    Chunks overlap on a wire, so each is given the time from the answer before it, or from its own sending where the
    wire was empty, until its answer. These times do not overlap, and none of them is idle:

        chunk 1   ├─────────┤
        chunk 2      ├──────────┤
        chunk 3                      ├─────┤
        given to  1111111111122222.....3333333
    """

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0
        self._answered_at = -math.inf

    @property
    def bytes_per_second(self) -> float:
        """0.0 while nothing was measured."""
        return self._bytes / self._seconds if self._seconds else 0.0

    def answered(self, size: int, sent_at: float, now: float) -> float:
        """Takes a chunk that arrived; returns its share of the busy time, in seconds.

        Args:
            size: Its bytes.
            sent_at: `time.monotonic()` when it was sent.
            now: `time.monotonic()`.
        """
        seconds = max(0.0, now - max(self._answered_at, sent_at))
        self._answered_at = now
        kept = 0.5 ** (seconds / _HALF_LIFE_SECONDS)
        self._bytes = self._bytes * kept + size
        self._seconds = self._seconds * kept + seconds
        return seconds


@dataclass(slots=True, eq=False)
class PairStats:
    """Books of one end, from its making on. Units and meanings are those of PairStatus in operations.proto.

    Attributes:
        peer: Worker id of the other end.
        address: Where KV travels to; empty where a receiver does not know its sender's.
        direction: To the peer or from it.
        transport: "zmq-tcp", "zmq-ipc", "nccl" or "gloo".
        curve: Encrypted and authenticated.
        bandwidth: Fed with each answered chunk; senders only.
        made_at: `time.monotonic()`.
    """

    peer: str
    address: str
    direction: PairDirection.ValueType
    transport: str
    curve: bool = False
    state: PairState.ValueType = PairState.PAIR_STATE_GREETING
    bytes_total: int = 0
    chunks_total: int = 0
    resent_total: int = 0
    refused_total: int = 0
    outstanding_bytes: int = 0
    credit_free_bytes: int = 0
    credit_wait_seconds_total: float = 0.0
    round_trip_seconds: float = 0.0
    fallbacks_total: int = 0
    last_error: str = ""
    bandwidth: Bandwidth = field(default_factory=Bandwidth)
    made_at: float = field(default_factory=time.monotonic)

    def snapshot(self) -> PairStatus:
        """Itself as it is now, as a message."""
        return PairStatus(
            peer=self.peer,
            address=self.address,
            direction=self.direction,
            transport=self.transport,
            curve=self.curve,
            state=self.state,
            bytes_total=self.bytes_total,
            chunks_total=self.chunks_total,
            resent_total=self.resent_total,
            refused_total=self.refused_total,
            outstanding_bytes=max(0, self.outstanding_bytes),
            credit_free_bytes=max(0, self.credit_free_bytes),
            credit_wait_seconds_total=self.credit_wait_seconds_total,
            bandwidth_bytes_per_second=self.bandwidth.bytes_per_second,
            round_trip_seconds=self.round_trip_seconds,
            fallbacks_total=self.fallbacks_total,
            last_error=self.last_error[:_LAST_ERROR_CHARACTERS],
            age_seconds=time.monotonic() - self.made_at,
        )
