"""The books of a tier: what it holds, what may go and in which order. No I/O.

Eviction is GreedyDual-Size-Frequency (Cherkasova, "Improving WWW proxies performance with
Greedy-Dual-Size-Frequency caching policy", 1998):

    rank = L + uses · cost of encoding again / bytes

The lowest rank goes first, and L is the rank of the last that went: what was worth much long ago sinks
below what is used now.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass

# Entries of ended rests that may lie in the heap before it is made anew.
_STALE_ENTRIES = 64


# No tenant has this name: it is not printable.
UNKNOWN_TENANT = "\0"


@dataclass(slots=True, eq=False)
class Entry:
    """One block on the books. Only its ledger writes to it.

    Attributes:
        key: 32 bytes.
        tokens: Its tokens.
        bytes: What it takes of the budget.
        tenant: Whose it is; UNKNOWN_TENANT where only a listing told of the block.
        hits: Uses since it was admitted.
        last_used: By the ledger's clock.
        pinned: Kept from eviction and expiry.
        rank: Of two unpinned entries the one with the smaller rank goes first.
        turn: Names its latest place in the heap; older ones are passed over.
    """

    key: bytes
    tokens: int
    bytes: int
    tenant: str
    hits: int
    last_used: float
    pinned: bool
    rank: float = 0.0
    turn: int = 0


class Ledger:
    """Entries by key within a budget. Used by one event loop.

    Args:
        budget_bytes: Most bytes at a time; 0 keeps nothing, None has no bound.
        cost: Cost of encoding so many tokens again, in any unit.
        ttl_seconds: An unpinned entry that nobody uses for so long expires; None keeps it.
        clock: Seconds; wall clock, so that times from files compare with it.
    """

    def __init__(
        self,
        budget_bytes: int | None,
        cost: Callable[[int], float],
        *,
        ttl_seconds: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = self.pinned_bytes = 0
        self._cost = cost
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._entries: dict[bytes, Entry] = {}
        # (rank, turn, entry) of every unpinned entry, and stale ones.
        self._resting: list[tuple[float, int, Entry]] = []
        self._turns = 0
        self._age = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def get(self, key: bytes) -> Entry | None:
        """An entry; nothing is counted."""
        return self._entries.get(key)

    def keys(self) -> list[bytes]:
        """Every key on the books."""
        return list(self._entries)

    def entries(self) -> list[Entry]:
        """Every entry."""
        return list(self._entries.values())

    def used(self, key: bytes) -> None:
        """A request has used the block; a key that is not on the books is passed over."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.hits += 1
            entry.last_used = self._clock()
            self._rest(entry)

    def admit(
        self,
        key: bytes,
        *,
        tokens: int,
        bytes_: int,
        tenant: str,
        pinned: bool = False,
        last_used: float | None = None,
        hits: int = 0,
    ) -> list[Entry] | None:
        """Enters a block, or updates it: its uses and its pin are kept then.

        Returns:
            The entries that had to make room, already off the books: the caller removes their data. None when the
            block does not fit beside what is pinned; nothing has changed then.
        """
        known = self._entries.get(key)
        pinned = pinned or (known is not None and known.pinned)
        if not self._could_hold(bytes_, known):
            return None
        used_at = self._clock() if last_used is None else last_used
        if known is not None:
            hits, used_at = max(hits, known.hits), max(used_at, known.last_used)
            self.remove(key)
        victims = self._make_room(bytes_)
        entry = Entry(key, tokens, bytes_, tenant, hits, used_at, pinned)
        self._entries[key] = entry
        self.used_bytes += bytes_
        self.pinned_bytes += bytes_ if pinned else 0
        self._rest(entry)
        return victims

    def belongs(self, key: bytes, tenant: str) -> None:
        """Notes whose a block is, once that is known."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.tenant = tenant

    def remove(self, key: bytes) -> Entry | None:
        """Takes an entry off the books."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.used_bytes -= entry.bytes
            self.pinned_bytes -= entry.bytes if entry.pinned else 0
        return entry

    def pin(self, key: bytes, *, pinned: bool) -> bool:
        """Keeps an entry from going, or lets it go again; True when that changed anything."""
        entry = self._entries.get(key)
        if entry is None or entry.pinned == pinned:
            return False
        entry.pinned = pinned
        self.pinned_bytes += entry.bytes if pinned else -entry.bytes
        self._rest(entry)
        return True

    def expired(self) -> list[Entry]:
        """Takes off the books, and returns, what nobody has used for the time to live."""
        if self._ttl_seconds is None:
            return []
        limit = self._clock() - self._ttl_seconds
        old = [entry for entry in self._entries.values() if not entry.pinned and entry.last_used <= limit]
        for entry in old:
            self.remove(entry.key)
        return old

    def check_integrity(self) -> None:
        """Raises AssertionError when the books do not add up."""
        if self.used_bytes != sum(entry.bytes for entry in self._entries.values()):
            raise AssertionError("bytes do not add up")
        if self.pinned_bytes != sum(entry.bytes for entry in self._entries.values() if entry.pinned):
            raise AssertionError("pinned bytes do not add up")
        if self.budget_bytes is not None and self.used_bytes > self.budget_bytes:
            raise AssertionError(f"{self.used_bytes} bytes in a budget of {self.budget_bytes}")
        unpinned = [entry.key for entry in self._entries.values() if not entry.pinned]
        if sorted(entry.key for _, turn, entry in self._resting if self._rests(entry, turn)) != sorted(unpinned):
            raise AssertionError("what could go is not what is unpinned")

    def _could_hold(self, bytes_: int, known: Entry | None) -> bool:
        if self.budget_bytes is None:
            return True
        beside = self.pinned_bytes - (known.bytes if known is not None and known.pinned else 0)
        return self.budget_bytes > 0 and beside + bytes_ <= self.budget_bytes

    def _make_room(self, bytes_: int) -> list[Entry]:
        victims: list[Entry] = []
        while self.budget_bytes is not None and self.used_bytes + bytes_ > self.budget_bytes:
            rank, turn, entry = heapq.heappop(self._resting)
            if self._rests(entry, turn):
                self._age = max(self._age, rank)
                self.remove(entry.key)
                victims.append(entry)
        return victims

    def _rest(self, entry: Entry) -> None:
        """Ranks an entry from now on. Its making is the first use, or new blocks could never stay."""
        entry.rank = self._age + (1 + entry.hits) * self._cost(entry.tokens) / max(entry.bytes, 1)
        self._turns += 1
        entry.turn = self._turns
        if entry.pinned:
            return  # its earlier places are stale now, and it gets no other
        if len(self._resting) > 2 * len(self._entries) + _STALE_ENTRIES:
            self._resting = [place for place in self._resting if self._rests(place[2], place[1])]
            heapq.heapify(self._resting)
        heapq.heappush(self._resting, (entry.rank, entry.turn, entry))

    def _rests(self, entry: Entry, turn: int) -> bool:
        return entry.turn == turn and self._entries.get(entry.key) is entry
