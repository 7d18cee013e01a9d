"""Extents that are shipped while they are still being made: chunks leave as they come, and a failure shows nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from prefill_worker.tiers.block import StoredBlock
from prefill_worker.transfer.errors import SourceLostError
from tests.support.decode_parts import assert_all_free_after_eviction
from tests.support.stacks import until
from tests.support.wire import CHUNKS, Wire, make_block, wired


class Growing:
    """A block whose chunks are made when a test says so, on another thread."""

    def __init__(self, block: StoredBlock) -> None:
        self.block, self.made = block, 0
        self.key, self.tokens, self.birth_id, self.data = block.key, block.tokens, block.birth_id, block.data
        self.failure: str | None = None
        self.wakes: list[Callable[[], None]] = []

    def checksum(self, index: int) -> int | None:
        return self.block.checksum(index) if index < self.made else None

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        self.wakes.append(wake)
        return lambda: self.wakes.remove(wake)

    def grow(self, made: int, failure: str | None = None) -> None:
        self.made, self.failure = made, failure
        thread = threading.Thread(target=lambda: [wake() for wake in list(self.wakes)])
        thread.start()
        thread.join()


def begin(wire: Wire, source: Growing) -> tuple[asyncio.Task[object], set[int]]:
    request = wire.expect(source.block)
    [fetch] = request.fetches
    shipping = asyncio.create_task(wire.ship(source, wire.reservation(request)))  # type: ignore[arg-type] # a source
    shipping.add_done_callback(lambda _: wire.end(request))
    return shipping, fetch.landing.taken


async def test_chunks_leave_as_they_are_made() -> None:
    async with wired() as wire:
        source = Growing(make_block(1))
        shipping, taken = begin(wire, source)
        for made in range(1, CHUNKS):
            source.grow(made)
            await until(lambda made=made: taken == set(range(made)))  # type: ignore[misc] # bound now
            assert not shipping.done()
            assert wire.committed == []
        source.grow(CHUNKS)
        await shipping
        assert wire.resident_bytes(source.block) == bytes(source.block.data)
        assert source.wakes == []
    assert_all_free_after_eviction(wire.pool)


async def test_a_slow_source_is_no_dead_wire() -> None:
    async with wired(seconds=0.3) as wire:
        source = Growing(make_block(1))
        shipping, taken = begin(wire, source)
        source.grow(1)
        await until(lambda: len(taken) == 1)
        await asyncio.sleep(1.0)  # three times what a wire without progress is given
        source.grow(CHUNKS)
        await shipping
        [link] = wire.links()
        assert link.stats.resent_total == 0


@pytest.mark.parametrize("made", range(CHUNKS))
async def test_an_encoding_that_fails_is_told_and_shows_nothing(made: int) -> None:
    async with wired() as wire:
        source = Growing(make_block(1))
        shipping, taken = begin(wire, source)
        source.grow(made)
        await until(lambda: len(taken) == made)
        source.grow(made, failure="out of memory")
        with pytest.raises(SourceLostError, match="out of memory"):
            await shipping
        assert wire.committed == []
        # The link is sound, and another birth of the same block goes through it.
        again, _ = begin(wire, whole := Growing(make_block(1)))
        whole.grow(CHUNKS)
        await again
        assert wire.relay.pairs == 1
    assert_all_free_after_eviction(wire.pool)


async def test_a_failed_birth_is_followed_by_another_in_the_same_reservation() -> None:
    async with wired() as wire:
        source = Growing(make_block(1))
        request = wire.expect(source.block)
        reservation = wire.reservation(request)
        first = asyncio.create_task(wire.ship(source, reservation))  # type: ignore[arg-type] # a source
        [fetch] = request.fetches
        source.grow(2)
        await until(lambda: len(fetch.landing.taken) == 2)
        source.grow(2, failure="split")
        with pytest.raises(SourceLostError):
            await first
        reborn = make_block(1)
        await wire.ship(reborn, reservation)
        assert wire.resident_bytes(reborn) == bytes(reborn.data)
        wire.end(request)


async def test_a_finished_block_passes_one_that_is_still_being_made() -> None:
    async with wired() as wire:
        slow = Growing(make_block(1))
        shipping, taken = begin(wire, slow)
        slow.grow(1)
        await until(lambda: len(taken) == 1)
        for number in range(2, 5):
            whole = make_block(number)
            request = wire.expect(whole)
            await wire.ship(whole, wire.reservation(request))
            wire.end(request)
        assert not shipping.done()
        slow.grow(CHUNKS)
        await shipping
