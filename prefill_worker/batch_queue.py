"""What waits for the model, most urgent first: a state machine without a loop, a thread or a model.

Entries lie in the order of their **due** times, the arrival plus the patience of the class:

    due    8.9    9.2      9.4     11.0    36.0     37.5        patience: HIGH -1 s, NORMAL 0, LOW 5 s,
         ┌──────┬────────┬───────┬───────┬────────┬─────────┐             WARMING 30 s
         │ HIGH │ NORMAL │ HIGH  │  LOW  │WARMING │ WARMING │
         └──────┴────────┴───────┴───────┴────────┴─────────┘
           ▲ taken first

Aging is in the order itself. A due time only falls, when an entry is raised to a more urgent class. So what arrives
more than one patience after an entry (less the smallest patience) lies behind it, whatever its class: everything in
the queue is taken after a bounded number of takes, and warming ends however much interactive work arrives.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import count, islice
from operator import itemgetter
from types import MappingProxyType
from typing import Generic, TypeVar

from shared.errors import DrystoneError, Reason

_MIN_RETRY_SECONDS = 0.1
_MAX_RETRY_SECONDS = 60.0
# Said while nothing has been measured yet.
_UNMEASURED_RETRY_SECONDS = 1.0


class Urgency(IntEnum):
    """Class of an encoding; of two the smaller one is the more urgent."""

    HIGH = 0
    NORMAL = 1
    LOW = 2
    WARMING = 3


PATIENCE_SECONDS: Mapping[Urgency, float] = MappingProxyType(
    {Urgency.HIGH: -1.0, Urgency.NORMAL: 0.0, Urgency.LOW: 5.0, Urgency.WARMING: 30.0}
)


@dataclass(slots=True, eq=False, kw_only=True)
class Entry:
    """One block as the queue sees it. The queue alone writes what is not given by the caller.

    Attributes:
        tokens: Its length; at least 1.
        urgency: Its class; `BatchQueue.raise_to` changes it.
        arrived: When it was added, by the queue's clock, in seconds.
        rank: (due, number of arrival) while queued, else None. Numbers make ranks unique and equal dues FIFO.
    """

    tokens: int
    urgency: Urgency
    arrived: float = 0.0
    rank: tuple[float, int] | None = None


EntryT = TypeVar("EntryT", bound=Entry)


class BatchQueue(Generic[EntryT]):
    """Bounded, ordered by due time, exact in its books. Used by one thread.

    Args:
        max_blocks: Most entries. Warming has at most half of them, but one at least.
        max_tokens: Most tokens, half of them for warming. A longer block is let in where nothing else is in its way,
            for it would never be let in otherwise.
        seconds: Time that so many tokens take to encode; None before it is known. Refusals give it as their delay.
        patience: Seconds by class, in place of `PATIENCE_SECONDS`.
        clock: Seconds, never falling.
    """

    def __init__(
        self,
        max_blocks: int,
        max_tokens: int,
        *,
        seconds: Callable[[int], float | None],
        patience: Mapping[Urgency, float] = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_blocks = max_blocks
        self._max_tokens = max_tokens
        self._seconds = seconds
        self._patience = {**PATIENCE_SECONDS, **patience}
        self._clock = clock
        self._numbers = count()
        # Invariant: sorted, and holds exactly the entries whose rank is not None. A list, and not a heap, because
        # entries leave from anywhere at once; moving some thousand pointers costs a microsecond.
        self._ranked: list[tuple[tuple[float, int], EntryT]] = []
        self._blocks = dict.fromkeys(Urgency, 0)
        self._tokens = dict.fromkeys(Urgency, 0)

    def __len__(self) -> int:
        return len(self._ranked)

    def __iter__(self) -> Iterator[EntryT]:
        """Entries, most urgent first."""
        return map(itemgetter(1), self._ranked)

    @property
    def tokens(self) -> int:
        """Tokens of all entries."""
        return sum(self._tokens.values())

    @property
    def head(self) -> EntryT | None:
        """The most urgent entry, which the next take begins with."""
        return self._ranked[0][1] if self._ranked else None

    def depths(self) -> dict[Urgency, int]:
        """Entries of each class."""
        return dict(self._blocks)

    def add(self, entry: EntryT) -> None:
        """Queues an entry that is not queued.

        Raises:
            DrystoneError: ENCODE_QUEUE_FULL; nothing has changed then.
        """
        self._check_room(entry)
        entry.arrived = self._clock()
        self._insert(entry, next(self._numbers))

    def raise_to(self, entry: EntryT, urgency: Urgency) -> None:
        """Makes an entry as urgent as `urgency`, where that is more; it keeps its arrival. Needs no room."""
        if urgency < entry.urgency:
            rank = entry.rank
            self.remove(entry)
            entry.urgency = urgency
            if rank is not None:
                self._insert(entry, rank[1])

    def remove(self, entry: EntryT) -> None:
        """Takes an entry out, wherever it lies; one that is not queued is left as it is."""
        if entry.rank is None:
            return
        del self._ranked[bisect_left(self._ranked, entry.rank, key=itemgetter(0))]
        entry.rank = None
        self._blocks[entry.urgency] -= 1
        self._tokens[entry.urgency] -= entry.tokens

    def take(self, budget_tokens: int) -> list[EntryT]:
        """Takes the most urgent entry, and further ones in order while they fit the budget.

        An entry that does not fit what is left is passed over. That costs it no place: each take removes the head,
        so that it comes nearer with each, and as the head it is taken whatever its length.

        Args:
            budget_tokens: Most tokens of all taken together; a longer head is taken alone.
        """
        taken = list(islice(self, 1))
        left = budget_tokens - sum(entry.tokens for entry in taken)
        for entry in islice(self, 1, None):
            if left <= 0:
                break
            if entry.tokens <= left:
                taken.append(entry)
                left -= entry.tokens
        for entry in taken:
            self.remove(entry)
        return taken

    def _insert(self, entry: EntryT, number: int) -> None:
        entry.rank = (entry.arrived + self._patience[entry.urgency], number)
        insort(self._ranked, (entry.rank, entry), key=itemgetter(0))
        self._blocks[entry.urgency] += 1
        self._tokens[entry.urgency] += entry.tokens

    def _check_room(self, entry: EntryT) -> None:
        self._check(entry, len(self), self.tokens, self._max_blocks, self._max_tokens, "encoded")
        if entry.urgency is Urgency.WARMING:
            blocks, tokens = self._blocks[Urgency.WARMING], self._tokens[Urgency.WARMING]
            self._check(entry, blocks, tokens, max(1, self._max_blocks // 2), self._max_tokens // 2, "warmed")

    def _check(self, entry: EntryT, blocks: int, tokens: int, max_blocks: int, max_tokens: int, what: str) -> None:
        if blocks >= max_blocks:
            raise self._full(f"{blocks} blocks wait to be {what}", max_blocks)
        if blocks and tokens + entry.tokens > max_tokens:
            raise self._full(f"{tokens} tokens wait to be {what}, {entry.tokens} more were asked for", max_tokens)

    def _full(self, what: str, limit: int) -> DrystoneError:
        seconds = self._seconds(self.tokens)
        seconds = _UNMEASURED_RETRY_SECONDS if seconds is None else seconds
        return DrystoneError(
            Reason.ENCODE_QUEUE_FULL,
            f"{what}; limit {limit}",
            metadata={"limit": str(limit)},
            retry_after_ms=round(min(max(seconds, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS) * 1e3),
        )
