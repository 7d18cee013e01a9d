"""Fetches: blocks on their way into reserved extents. A fetch belongs to the pool and has waiters.

The first waiter drives: its gateway was told to have the block shipped. When the driver cancels,
dies or is too slow, the next waiter's gateway gets the reservation anew with a higher epoch; chunks
that name an older epoch, or another life of this worker, are refused and never touch the extent.
The table belongs to the event loop; what chunks change is in `landing.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from decode_worker.arena import Arena, Extent
from decode_worker.landing import Landing
from decode_worker.request import Fetch
from shared.internal.v1.common_pb2 import Reservation, WorkerIdentity
from shared.internal.v1.transfer_pb2 import RefusalReason


class FetchTable:
    """Every open fetch, by key and by reservation; owns their extents until commit or drop."""

    def __init__(self, arena: Arena, identity: WorkerIdentity) -> None:
        self._arena = arena
        self.identity = identity
        self._by_key: dict[bytes, Fetch] = {}
        self._by_id: dict[int, Fetch] = {}
        self._next_id = 1

    @property
    def opened(self) -> int:
        """Fetches begun since the start."""
        return self._next_id - 1

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, key: bytes) -> Fetch | None:
        """The open fetch of a key."""
        return self._by_key.get(key)

    def all(self) -> list[Fetch]:
        """Every open fetch."""
        return list(self._by_id.values())

    def open(self, key: bytes, token_ids: Sequence[int], extent: Extent, *, store: bool, tenant: str = "") -> Fetch:
        """Begins a fetch into `extent`, which the table owns from here."""
        landing = Landing(key, len(token_ids), extent, self._arena.shape)
        fetch = Fetch(landing, token_ids, self._next_id, store, tenant)
        self._next_id += 1
        self._by_key[key] = self._by_id[fetch.reservation_id] = fetch
        return fetch

    def reservation(self, fetch: Fetch) -> Reservation:
        """The promise that a sender must name."""
        size = fetch.extent.records * self._arena.shape.record_bytes
        return Reservation(worker=self.identity, reservation_id=fetch.reservation_id, epoch=fetch.epoch, bytes=size)

    def find(self, reservation: Reservation) -> Fetch | RefusalReason.ValueType:
        """The fetch that a reservation names, or why it names none."""
        if reservation.worker.incarnation != self.identity.incarnation:
            return RefusalReason.REFUSAL_REASON_STALE_INCARNATION
        fetch = self._by_id.get(reservation.reservation_id)
        if fetch is None:
            return RefusalReason.REFUSAL_REASON_UNKNOWN_RESERVATION
        if reservation.epoch != fetch.epoch or fetch.encoding:
            return RefusalReason.REFUSAL_REASON_STALE_EPOCH
        return fetch

    def named(self, reservation_id: int) -> Fetch | None:
        """The open fetch with this id, also for the receiving thread: one lookup, which threads may do."""
        return self._by_id.get(reservation_id)

    def close(self, fetch: Fetch) -> Extent:
        """Ends a fetch and hands its extent to the caller, who must keep or free it. No chunk touches it any more."""
        del self._by_key[fetch.key], self._by_id[fetch.reservation_id]
        fetch.landing.close()
        return fetch.extent

    @contextlib.contextmanager
    def held_still(self) -> Iterator[None]:
        """No chunk lands meanwhile: extents may be moved."""
        with contextlib.ExitStack() as stack:
            for fetch in self._by_id.values():
                stack.enter_context(fetch.landing.lock)
            yield

    def extents(self) -> list[Extent]:
        """Every extent that the table owns."""
        return [fetch.extent for fetch in self._by_id.values()]
