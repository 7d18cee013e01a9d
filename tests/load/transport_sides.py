"""What a measured way of shipping must do at either end, and the sizes that all of them use.

One side is one process (`transport_process.py`). A receiver is told how many blocks come, a sender to send them; a
block counts when the sender has heard that it is in its place.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from decode_worker.receiving.pairs import PAIR_WINDOW_BYTES
from shared.kv.layout import KvShape

# Qwen3-8B's: 147,456 bytes a token.
SHAPE = KvShape(layers=36, kv_heads=8, head_dim=128, dtype="bfloat16")
# What may be under way at once, for every way of shipping that has a window.
WINDOW_BYTES = PAIR_WINDOW_BYTES
# Distinct blocks that a sender sends in turn: together they are more than a core's cache.
SOURCES = 4
Transport = Literal["tcp", "ipc"]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Sent:
    """One round of a sender, on the clock that all processes of a machine share.

    Args:
        began: When the first block was handed over.
        ended: When each block was known to be in its place, by rising time.
        block_bytes: Of each.
        busy_seconds: Processor time of the sender meanwhile.
    """

    began: float
    ended: tuple[float, ...]
    block_bytes: int
    busy_seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return len(self.ended) * self.block_bytes / (self.ended[-1] - self.began)

    @property
    def latency(self) -> float:
        """Median seconds of a block, of a round that sent one at a time."""
        begins = (self.began, *self.ended[:-1])
        return statistics.median(end - begin for begin, end in zip(begins, self.ended, strict=True))

    def bytes_by(self, moment: float) -> int:
        """Bytes in their place by then."""
        return self.block_bytes * sum(end <= moment for end in self.ended)


class SendingSide(Protocol):
    """A sender. Its buffers are made and touched by `connect`."""

    def connect(self, told: Mapping[str, Any], tokens: int) -> None:
        """Makes ready to send blocks of `tokens` tokens to the receiver that told this."""
        ...

    def prepare(self, tickets: Sequence[str]) -> None:
        """Does what a sender has done before it ships: nothing of it is timed."""
        ...

    def send(self, tickets: Sequence[str], at_once: int) -> tuple[float, list[float]]:
        """Sends a block for each ticket, `at_once` under way together: when it began, and when each ended."""
        ...


class ReceivingSide(Protocol):
    """A receiver. Its memory is made and touched by `listen`."""

    def listen(self, address: str, tokens: int, count: int) -> Mapping[str, Any]:
        """Makes ready for rounds of at most `count` blocks of `tokens` tokens; what a sender must know."""
        ...

    def expect(self, count: int) -> list[str]:
        """Takes the next `count` blocks: a ticket for each."""
        ...

    def clear(self) -> int:
        """Waits for the blocks expected, forgets them, and says how many are in their places."""
        ...


def sources(tokens: int) -> list[Bytes]:
    """Blocks' bytes, touched."""
    generator = np.random.default_rng(1)
    return [generator.integers(0, 256, SHAPE.extent_bytes(tokens), dtype=np.uint8) for _ in range(SOURCES)]


def busy_seconds() -> float:
    """Processor time of this process since it began, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
