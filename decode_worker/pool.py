"""Admission: everything a request needs is taken at once, or nothing is (design §4).

The pool composes arena, resident blocks and open fetches, and holds the idle invariant of design §6:
no request running ⇒ no pins, no reservations, and free + resident = all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from decode_worker.arena import Arena, Extent
from decode_worker.blocks import BlockTable, Pin
from decode_worker.fetch import FetchTable
from decode_worker.request import Fetch, Request
from decode_worker.step import Placement
from decode_worker.tail import SEGMENT_TOKENS, Tail, segments_for
from drystone.v1.statistics_pb2 import BlockSource
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import BlockRef, WorkerIdentity
from shared.internal.v1.decode_pb2 import Arrival


class Pool:
    """KV memory of one decode worker. Used by the engine's event loop alone."""

    def __init__(self, arena: Arena, identity: WorkerIdentity) -> None:
        self.arena = arena
        self.blocks = BlockTable(arena)
        self.fetches = FetchTable(arena, identity)

    @property
    def version(self) -> int:
        """Rises whenever something is given back or arrives: before that, what did not fit does not fit."""
        return self.arena.frees + self.blocks.changes

    def refuse_if_never(self, request: Request) -> None:
        """Raises when the request would not fit into an empty pool, saying what it needs and what there is."""
        shape = self.arena.shape
        distinct = {bytes(block.key): len(block.token_ids) for block in request.blocks}
        tail = segments_for(request.tail_tokens) * SEGMENT_TOKENS
        needed = shape.extent_bytes(sum(distinct.values()) + tail)
        if needed > self.arena.capacity_bytes:
            raise DrystoneError(
                Reason.REQUEST_TOO_LARGE_FOR_POOL,
                f"the request needs {needed} bytes of KV memory and the decode worker has {self.arena.capacity_bytes}; "
                "shorten it or raise --pool-bytes",
                metadata={"needed_bytes": str(needed), "capacity_bytes": str(self.arena.capacity_bytes)},
            )

    def admit(self, request: Request) -> list[Fetch] | None:
        """Pins what is resident, joins what is on its way, reserves the rest and the tail.

        Returns:
            The fetches that this request drives; None when there is no room now, and then it holds nothing.
        """
        blocks = {bytes(block.key): block for block in request.blocks}
        if not self._has_bytes_for(request, blocks):
            return None
        driven = self._take(request, blocks)
        if driven is None and self.blocks.evictable_records():
            # Bytes suffice but no run does: its own blocks, which alone are left, lie in the way.
            while self.blocks.evict_one():
                pass
            driven = self._take(request, blocks)
        return driven

    def _take(self, request: Request, blocks: Mapping[bytes, BlockRef]) -> list[Fetch] | None:
        # What is there is held first: room for the rest is never made at its cost.
        missing = [ref for key, ref in blocks.items() if not self._hold(request, key, ref)]
        # The second try begins with everything evicted that the first one had to evict on its way.
        driven = self._reserve(request, missing)
        if driven is None:
            driven = self._reserve(request, missing)
        if driven is None:
            self._let_go(request)
            return None
        for fetch in driven:
            self._wait(request, fetch)
        return driven

    def _has_bytes_for(self, request: Request, blocks: Mapping[bytes, BlockRef]) -> bool:
        """False when eviction could not make room: nothing is evicted in vain then."""
        missing = [ref for key, ref in blocks.items() if key not in self.blocks and self.fetches.get(key) is None]
        tokens = sum(len(ref.token_ids) for ref in missing) + segments_for(request.tail_tokens) * SEGMENT_TOKENS
        room = self.arena.free_records + self.blocks.evictable_records(beside=blocks)
        return self.arena.shape.extent_records(tokens) <= room

    def _reserve(self, request: Request, missing: Sequence[BlockRef]) -> list[Fetch] | None:
        """Takes extents for missing blocks, the longest first, and the tail; nothing when one cannot be had."""
        extents: dict[bytes, Extent] = {}
        for ref in sorted(missing, key=lambda ref: len(ref.token_ids), reverse=True):
            extent = self._allocate(len(ref.token_ids))
            if extent is None:
                break
            extents[bytes(ref.key)] = extent
        else:
            tail = Tail.reserve(self.arena, request.question_start, request.tail_tokens)
            while tail is None and self.blocks.evict_one():
                tail = Tail.reserve(self.arena, request.question_start, request.tail_tokens)
            if tail is not None:
                request.tail = tail
                return [
                    self.fetches.open(bytes(ref.key), ref.token_ids, extents[bytes(ref.key)], store=ref.store)
                    for ref in missing
                ]
        for extent in extents.values():
            self.arena.free(extent)
        return None

    def _hold(self, request: Request, key: bytes, ref: BlockRef) -> bool:
        """Pins a resident block or joins its fetch; False when it is neither here nor on its way."""
        pin = self.blocks.pin(key)
        if pin is not None:
            pin.block.transient &= not ref.store
            request.pins.append(pin)
            request.arrivals[key] = Arrival(key=key, source=BlockSource.BLOCK_SOURCE_RESIDENT)
            return True
        fetch = self.fetches.get(key)
        if fetch is None:
            return False
        fetch.store |= ref.store
        self._wait(request, fetch)
        return True

    def _wait(self, request: Request, fetch: Fetch) -> None:
        fetch.waiters.append(request)
        request.fetches.add(fetch)
        request.arrivals[fetch.key] = Arrival(key=fetch.key, source=BlockSource.BLOCK_SOURCE_SHARED_FETCH)

    def _allocate(self, tokens: int) -> Extent | None:
        extent = self.arena.allocate(tokens)
        while extent is None and self.blocks.evict_one():
            extent = self.arena.allocate(tokens)
        return extent

    def _let_go(self, request: Request) -> None:
        for fetch in request.fetches:
            fetch.waiters.remove(request)
        request.fetches.clear()
        request.arrivals.clear()
        request.release()

    def commit(self, fetch: Fetch) -> list[Request]:
        """Makes a fetched block resident and pins it for its waiters; returns those that now have everything."""
        block = self.blocks.add(fetch.key, self.fetches.close(fetch), store=fetch.store)
        complete = []
        elapsed_ms = (time.monotonic() - fetch.reserved_at) * 1e3
        for request in fetch.waiters:
            request.pins.append(Pin(self.blocks, block))
            request.fetches.discard(fetch)
            request.arrivals[fetch.key].fetch_ms = elapsed_ms
            if not request.fetches:
                complete.append(request)
        return complete

    def leave(self, request: Request) -> list[Fetch]:
        """Takes a request out of the fetches it waits for; returns those that lost their driver but not all waiters."""
        orphaned = []
        for fetch in list(request.fetches):
            was_driver = fetch.waiters[0] is request
            fetch.waiters.remove(request)
            if not fetch.waiters and not fetch.encoding:
                self.arena.free(self.fetches.close(fetch))
            elif fetch.waiters and was_driver and not fetch.encoding:
                orphaned.append(fetch)
        request.fetches.clear()
        return orphaned

    def give_up(self, fetch: Fetch) -> list[Request]:
        """Ends a fetch without a block, frees its extent, and returns those who waited for it."""
        waiters, fetch.waiters = fetch.waiters, []
        for request in waiters:
            request.fetches.discard(fetch)
        self.arena.free(self.fetches.close(fetch))
        return waiters

    def place(self, request: Request) -> None:
        """Lays the request's blocks into its prompt, in order."""
        offset = 0
        pinned = {pin.block.key: pin.block for pin in request.pins}
        for block in request.blocks:
            key = bytes(block.key)
            request.placements.append(Placement(key, pinned[key].extent, offset))
            offset += len(block.token_ids)

    def check_integrity(self, running: list[Request]) -> None:
        """Raises AssertionError unless every record is free or owned once, and pins belong to `running`."""
        tails = [extent for request in running if request.tail is not None for extent in request.tail.extents]
        self.arena.check_integrity([*self.blocks.extents(), *self.fetches.extents(), *tails])
        held = sum(len(request.pins) for request in running)
        if self.blocks.pins != held:
            raise AssertionError(f"{self.blocks.pins} pins, but running requests hold {held}")
        waiting = sum(len(fetch.waiters) for fetch in self.fetches.all())
        if waiting != sum(len(request.fetches) for request in running):
            raise AssertionError(f"{waiting} waiters of fetches that running requests do not know")
