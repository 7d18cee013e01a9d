"""Admission: everything a request needs is taken at once, or nothing is (design §4).

The pool composes arena, resident blocks, sealed tails and open fetches, and holds the idle invariant of
design §6: no request running ⇒ no pins, no reservations, and free + resident = all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from decode_worker.arena import Arena, Extent
from decode_worker.blocks import BlockTable, Pin
from decode_worker.eviction import EvictionPolicy, LeastRecentlyUsed
from decode_worker.fetch import FetchTable
from decode_worker.request import Fetch, Request
from decode_worker.room import Room
from decode_worker.sample import Sample
from decode_worker.sealed import Match, SealedTails
from decode_worker.step import Placement
from decode_worker.tail import SEGMENT_TOKENS, Tail, segments_for
from drystone.v1.statistics_pb2 import BlockSource
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import BlockRef, WorkerIdentity
from shared.internal.v1.decode_pb2 import Arrival


class Pool:
    """KV memory of one decode worker. Used by the engine's event loop alone."""

    def __init__(self, arena: Arena, identity: WorkerIdentity, policy: EvictionPolicy | None = None) -> None:
        self.arena = arena
        self.blocks = BlockTable(arena, policy or LeastRecentlyUsed())
        self.sealed = SealedTails(self.blocks)
        self.fetches = FetchTable(arena, identity)
        # Prompt tokens that requests asked for, and those among them that were here already.
        self.queried_tokens = self.hit_tokens = 0
        self._undone = 0

    @property
    def version(self) -> int:
        """Rises when something is given back, arrives, or is asked for: before that, what did not fit does not fit."""
        return self.arena.frees + self.blocks.changes + self.fetches.opened - self._undone

    def refuse_if_never(self, request: Request) -> None:
        """Raises when the request would not fit into an empty pool, saying what it needs and what there is."""
        distinct = {bytes(block.key): len(block.token_ids) for block in request.blocks}
        tokens = sum(distinct.values()) + _segments(request, Match()) * SEGMENT_TOKENS
        needed = self.arena.shape.extent_bytes(tokens)
        if needed > self.arena.capacity_bytes:
            raise DrystoneError(
                Reason.REQUEST_TOO_LARGE_FOR_POOL,
                f"the request needs {needed} bytes of KV memory and the decode worker has {self.arena.capacity_bytes}; "
                "shorten it or raise --pool-bytes",
                metadata={"needed_bytes": str(needed), "capacity_bytes": str(self.arena.capacity_bytes)},
            )

    def admit(self, request: Request, *, may_move: bool) -> list[Fetch] | None:
        """Pins what is resident, joins what is on its way, reserves the rest and the tails.

        Args:
            request: Holds nothing yet.
            may_move: Nobody reads or writes KV now. What fits by bytes is then always admitted.

        Returns:
            The fetches that this request drives; None when there is no room now, and then it holds nothing.
        """
        blocks = {bytes(block.key): block for block in request.blocks}
        # One token at least must run: its logits are the answer's beginning.
        match = self.sealed.match(request.tail_root, request.question_ids[:-1]) if request.reuse_tail else Match()
        if not self._has_bytes_for(request, blocks, match):
            match = Match(match.full)  # what would be copied may have to go to make room
            if not self._has_bytes_for(request, blocks, match):
                return None
        version, evictions = self.version, self.blocks.evictions
        # What is there is held first: room for the rest is never made at its cost.
        missing = [ref for key, ref in blocks.items() if not self._hold(request, key, ref)]
        lead = [Pin(self.blocks, block) for block in match.full]
        copied = Pin(self.blocks, match.partial) if match.partial is not None else None
        driven = self._reserve(request, missing, match, lead, may_move=may_move)
        if copied is not None:
            copied.close()
        if driven is None:
            for pin in reversed(lead):
                pin.close()
            self._let_go(request)
            if evictions == self.blocks.evictions:
                self._undone += self.version - version  # all is as it was
            return None
        for pin in [*request.pins, *lead]:
            self.blocks.used(pin.block)
        for fetch in driven:
            self._wait(request, fetch)
        self._count(request, blocks, match)
        return driven

    def _has_bytes_for(self, request: Request, blocks: Mapping[bytes, BlockRef], match: Match) -> bool:
        """False when eviction could not make room: nothing is evicted in vain then."""
        missing = [ref for key, ref in blocks.items() if key not in self.blocks and self.fetches.get(key) is None]
        tokens = sum(len(ref.token_ids) for ref in missing) + _segments(request, match) * SEGMENT_TOKENS
        room = self.arena.free_records + self.blocks.evictable_records(beside=blocks.keys() | match.keys)
        return self.arena.shape.extent_records(tokens) <= room

    def _reserve(
        self, request: Request, missing: Sequence[BlockRef], match: Match, lead: list[Pin], *, may_move: bool
    ) -> list[Fetch] | None:
        """Takes extents for missing blocks, the longest first, and the tails; nothing when one cannot be had."""
        room = Room(self.arena, self.blocks, may_move=may_move, still=self.fetches.held_still)
        by_length = sorted(missing, key=lambda ref: len(ref.token_ids), reverse=True)
        extents = {bytes(ref.key): room.take(len(ref.token_ids)) for ref in by_length}
        chains: list[list[Extent]] = [
            [room.take(SEGMENT_TOKENS, high=True) for _ in range(count)]
            for _, count in _segments_by_sample(request, match)
        ]
        if room.short:
            room.give_back()
            return None
        for (sample, _), chain in zip(_segments_by_sample(request, match), chains, strict=True):
            sample.tail = Tail(self.arena, request.question_start, chain)
        reader = request.live[0].tail
        if reader is not None:
            reader.hold(lead)
            if match.partial is not None:
                reader.copy_in(match.partial.extent, match.tokens_of_partial)
        request.tail_tokens_reused = match.tokens
        return [
            self.fetches.open(
                bytes(ref.key), ref.token_ids, extents[bytes(ref.key)], store=ref.store, tenant=request.tenant
            )
            for ref in missing
        ]

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

    def _count(self, request: Request, blocks: Mapping[bytes, BlockRef], match: Match) -> None:
        driven = {fetch.key for fetch in request.fetches}
        here = sum(len(ref.token_ids) for key, ref in blocks.items() if key not in driven)
        self.queried_tokens += request.prompt_tokens
        self.hit_tokens += here + match.tokens

    def _let_go(self, request: Request) -> None:
        for fetch in request.fetches:
            fetch.waiters.remove(request)
        request.fetches.clear()
        request.arrivals.clear()
        request.release()

    def commit(self, fetch: Fetch) -> list[Request]:
        """Makes a fetched block resident and pins it for its waiters; returns those that now have everything."""
        block = self.blocks.add(fetch.key, self.fetches.close(fetch), store=fetch.store, tenant=fetch.tenant)
        complete = []
        elapsed_ms = (time.monotonic() - fetch.reserved_at) * 1e3
        for request in fetch.waiters:
            request.pins.append(Pin(self.blocks, block))
            self.blocks.used(block)
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

    def share_question(self, request: Request) -> None:
        """The question has been read by the first live sample: the others begin where it stands.

        Nobody may read or write KV meanwhile: the question's last, unfinished segment is copied.
        """
        lead, *others = request.live
        if not others or lead.tail is None:
            return
        read = request.question_ids[: lead.tail.filled]
        held = self.sealed.share(request.tail_root, read, lead.tail, keep=request.keep_tail)
        self._note_root(request)
        for sample in others:
            if sample.tail is not None:
                sample.tail.hold([pin.again() for pin in held])
                if len(read) % SEGMENT_TOKENS:
                    sample.tail.copy_in(lead.tail.own[0], len(read) % SEGMENT_TOKENS)

    def seal(self, request: Request, sample: Sample) -> list[bytes]:
        """Keeps a sample's tail for follow-ups and returns its keys; the sample holds nothing any more."""
        tail, sample.tail = sample.tail, None
        if tail is None:
            return []
        tokens = [*request.question_ids, *sample.generated][: tail.filled]
        keys = self.sealed.seal(request.tail_root, tokens, tail)
        self._note_root(request)
        return keys

    def _note_root(self, request: Request) -> None:
        self.sealed.stands_on(request.tail_root, (bytes(block.key) for block in request.blocks))

    def check_integrity(self, running: list[Request]) -> None:
        """Raises AssertionError unless every record is free or owned once, and pins belong to `running`."""
        tails = [sample.tail for request in running for sample in request.samples if sample.tail is not None]
        own = [extent for tail in tails for extent in tail.own]
        self.arena.check_integrity([*self.blocks.extents(), *self.fetches.extents(), *own])
        self.blocks.check_integrity()
        self.sealed.check_integrity()
        held = sum(len(request.pins) for request in running) + sum(len(tail.held) for tail in tails)
        if self.blocks.pins != held:
            raise AssertionError(f"{self.blocks.pins} pins, but running requests hold {held}")
        waiting = sum(len(fetch.waiters) for fetch in self.fetches.all())
        if waiting != sum(len(request.fetches) for request in running):
            raise AssertionError(f"{waiting} waiters of fetches that running requests do not know")


def _segments_by_sample(request: Request, match: Match) -> Iterator[tuple[Sample, int]]:
    """Segments that each live sample must own: the first reads the question, the others hold its full segments."""
    all_of_it = segments_for(request.tail_tokens)
    shared = len(request.question_ids) // SEGMENT_TOKENS
    for number, sample in enumerate(request.live):
        yield sample, all_of_it - (shared if number else len(match.full))


def _segments(request: Request, match: Match) -> int:
    return sum(count for _, count in _segments_by_sample(request, match))
