"""Tiers as one store: what is found where, what is written behind, and that deleted blocks stay away."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from prefill_worker.tiers.block_store import BlockStore
from prefill_worker.tiers.ledger import Ledger
from prefill_worker.tiers.ram import RamTier
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import SHIP_SOURCE_DISK, SHIP_SOURCE_OBJECT_STORE, SHIP_SOURCE_RAM
from shared.runtime import cancelled
from tests.support.tier_parts import SIZE, TOKENS, FakeTier, cost, key_of, tiny_block

DISK, OBJECT, RAM = SHIP_SOURCE_DISK, SHIP_SOURCE_OBJECT_STORE, SHIP_SOURCE_RAM
WAIT = 5.0


class Parts:
    """A store over two fake tiers."""

    def __init__(self, *, ram: int = 2, queue: int = 20) -> None:
        self.disk, self.object = FakeTier(10 * SIZE), FakeTier(None, OBJECT)
        self.ram = RamTier(Ledger(ram * SIZE, cost))
        self.store = BlockStore(self.ram, (self.disk, self.object), write_queue_bytes=queue * SIZE, sweep_seconds=0)

    async def settle(self, *numbers: int) -> None:
        async with asyncio.timeout(WAIT):
            for number in numbers:
                await self.store.kept(key_of(number))

    async def found_in(self, number: int) -> int | None:
        found = await self.store.find(key_of(number), TOKENS)
        return None if found is None else found[1]

    def drop_from_ram(self, number: int) -> None:
        self.ram.delete_now(key_of(number))


Open = Callable[..., Awaitable[Parts]]


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    made: list[Parts] = []

    async def open_(**how: int) -> Parts:
        parts = Parts(**how)
        made.append(parts)
        await parts.store.start()
        return parts

    yield open_
    for parts in made:
        parts.disk.gate.set()
        parts.object.gate.set()
        await parts.store.close(WAIT)
        assert parts.store.pending_bytes == 0
        assert parts.disk.overlaps == parts.object.overlaps == 0
        assert parts.disk.closed == parts.object.closed == 1


async def turns() -> None:
    """Lets everything go on that can."""
    for _ in range(30):
        await asyncio.sleep(0)


@asynccontextmanager
async def shut(*tiers: FakeTier) -> AsyncIterator[None]:
    for tier in tiers:
        tier.gate.clear()
    yield
    for tier in tiers:
        tier.gate.set()


async def test_a_block_is_in_memory_now_and_below_behind(opened: Open) -> None:
    parts = await opened()
    block = tiny_block(1)
    async with shut(parts.disk, parts.object):
        parts.store.put(block)
        assert parts.store.in_memory(block.key) is block
        await turns()
        assert parts.store.pending_bytes == 2 * SIZE
        assert await parts.store.where(block.key) == (RAM,)
    assert await parts.store.kept(block.key) == (RAM, DISK, OBJECT)
    assert parts.disk.blocks[block.key] is parts.object.blocks[block.key] is block


async def test_the_nearest_tier_is_read_and_the_ones_above_get_it(opened: Open) -> None:
    parts = await opened()
    block = tiny_block(1)
    await parts.object.write(block, pinned=False)
    assert await parts.store.find(block.key, TOKENS) == (block, OBJECT)
    assert await parts.store.find(block.key, TOKENS) == (block, RAM)
    await parts.settle(1)
    assert block.key in parts.disk.blocks
    parts.drop_from_ram(1)
    assert await parts.found_in(1) == DISK
    assert (parts.disk.reads, parts.object.reads) == (2, 1)
    assert parts.ram.meter.misses == 2


async def test_one_read_serves_all_and_one_who_leaves_does_not_end_it(opened: Open) -> None:
    parts = await opened()
    block = tiny_block(1)
    await parts.disk.write(block, pinned=False)
    async with shut(parts.disk):
        asking = [asyncio.create_task(parts.store.find(block.key, TOKENS)) for _ in range(5)]
        await turns()
        asking[0].cancel()
        await turns()
        assert asking[0].cancelled()
    assert await asyncio.gather(*asking[1:]) == [(block, DISK)] * 4
    assert parts.disk.reads == 1


async def test_a_read_that_all_have_left_still_ends_in_memory(opened: Open) -> None:
    parts = await opened()
    await parts.disk.write(tiny_block(1), pinned=False)
    async with shut(parts.disk):
        asking = asyncio.create_task(parts.store.find(key_of(1), TOKENS))
        await turns()
        asking.cancel()
    await turns()
    assert parts.store.in_memory(key_of(1)) is not None


async def test_a_tier_that_does_not_pay_is_passed_over(opened: Open) -> None:
    parts = await opened()
    block = tiny_block(1)
    await parts.disk.write(block, pinned=False)
    await parts.object.write(block, pinned=False)
    parts.disk.paying = False
    assert await parts.found_in(1) == OBJECT
    parts.drop_from_ram(1)
    parts.object.paying = False
    assert await parts.found_in(1) is None
    assert await parts.store.find(block.key, None) is None, "the books know how long it is"
    assert parts.disk.reads == 0
    assert await parts.store.where(block.key) == (DISK, OBJECT)


async def test_a_read_that_fails_goes_on_to_the_next_tier(opened: Open) -> None:
    parts = await opened()
    block = tiny_block(1)
    await parts.disk.write(block, pinned=False)
    await parts.object.write(block, pinned=False)
    parts.disk.raises = True
    assert await parts.found_in(1) == OBJECT
    assert parts.disk.meter.failures == 1


async def test_what_the_queue_had_no_room_for_is_written_when_memory_lets_it_go(opened: Open) -> None:
    parts = await opened(ram=3, queue=4)
    async with shut(parts.disk, parts.object):
        for number in (1, 2, 3):
            parts.store.put(tiny_block(number))
        assert parts.store.pending_bytes == 4 * SIZE
        assert (parts.disk.meter.writes_dropped, parts.object.meter.writes_dropped) == (1, 1)
    await parts.settle(1, 2)
    assert key_of(3) not in parts.disk.blocks
    for number in (4, 5, 6):
        parts.store.put(tiny_block(number))
        await parts.settle(3, number)
    assert parts.ram.peek(key_of(3)) is None
    assert key_of(3) in parts.disk.blocks
    assert key_of(3) in parts.object.blocks
    assert parts.disk.writes == 6, "blocks that a tier holds are not written to it again"


async def test_a_block_larger_than_the_queue_waits_alone(opened: Open) -> None:
    parts = await opened(ram=9, queue=2)
    async with shut(parts.disk, parts.object):
        parts.store.put(tiny_block(1, tokens=4 * TOKENS))
        parts.store.put(tiny_block(2))
        assert parts.store.pending_bytes == 8 * SIZE
    await parts.settle(1)
    assert key_of(1) in parts.disk.blocks


async def test_a_block_that_memory_let_go_of_is_found_while_it_waits(opened: Open) -> None:
    parts = await opened(ram=1)
    first = tiny_block(1)
    async with shut(parts.disk, parts.object):
        parts.store.put(first)
        parts.store.put(tiny_block(2))
        await turns()
        assert parts.ram.peek(first.key) is None
        assert await parts.store.where(first.key) == (RAM,)
        assert await parts.store.find(first.key, TOKENS) == (first, RAM)
        assert parts.ram.peek(first.key) is first


async def test_memory_of_no_size_still_fills_the_tiers_below(opened: Open) -> None:
    parts = await opened(ram=0)
    block = tiny_block(1)
    async with shut(parts.disk):
        parts.store.put(block)
        assert parts.store.in_memory(block.key) is block
    await parts.settle(1)
    assert await parts.store.find(block.key, TOKENS) == (block, DISK)


async def test_another_worker_may_have_written_it(opened: Open) -> None:
    parts = await opened()
    theirs = tiny_block(1)
    parts.object.blocks[theirs.key] = theirs
    parts.store.put(tiny_block(1))
    await parts.settle(1)
    assert parts.object.blocks[theirs.key] is theirs
    assert parts.object.writes == 0


async def test_a_write_that_fails_leaves_the_writer_at_work(opened: Open) -> None:
    parts = await opened(ram=9)
    parts.disk.raises = True
    for number in range(5):
        parts.store.put(tiny_block(number))
        await parts.settle(number)
    assert parts.disk.meter.write_failures == 5
    parts.disk.raises = False
    parts.store.put(tiny_block(6))
    await parts.settle(6)
    assert key_of(6) in parts.disk.blocks


async def test_delete_removes_it_everywhere(opened: Open) -> None:
    parts = await opened()
    parts.store.put(tiny_block(1))
    await parts.settle(1)
    parts.store.put(tiny_block(1))
    assert parts.store.pending_bytes == 0, "every tier has it"
    assert await parts.store.delete(key_of(1)) == 3 * SIZE
    assert await parts.store.where(key_of(1)) == ()
    assert await parts.found_in(1) is None
    assert await parts.store.delete(key_of(1)) == 0


async def test_a_write_under_way_does_not_bring_a_deleted_block_back(opened: Open) -> None:
    parts = await opened()
    async with shut(parts.disk, parts.object):
        for number in range(5):
            parts.store.put(tiny_block(number))
        await turns()
        deletes = [asyncio.create_task(parts.store.delete(key_of(number))) for number in range(5)]
        await turns()
        assert not deletes[0].done(), "the first write has begun and must end before"
        assert all(parts.store.in_memory(key_of(number)) is None for number in range(5))
    await asyncio.gather(*deletes)
    assert not parts.disk.blocks
    assert not parts.object.blocks
    assert parts.disk.writes == 2, "only the writes that had begun"


async def test_a_read_under_way_does_not_bring_a_deleted_block_back(opened: Open) -> None:
    parts = await opened()
    await parts.object.write(tiny_block(1), pinned=False)
    async with shut(parts.object):
        asking = asyncio.create_task(parts.store.find(key_of(1), TOKENS))
        await turns()
        deleting = asyncio.create_task(parts.store.delete(key_of(1)))
        await turns()
        late = await parts.store.find(key_of(1), TOKENS)
    assert (await asking, late) == (None, None)
    assert await deleting == SIZE
    await parts.settle(1)
    assert await parts.store.where(key_of(1)) == ()


async def test_a_read_that_ended_just_before_a_delete_gives_nothing(opened: Open) -> None:
    parts = await opened()
    await parts.disk.write(tiny_block(1), pinned=False)
    asking = asyncio.create_task(parts.store.find(key_of(1), TOKENS))
    while parts.ram.peek(key_of(1)) is None:  # noqa: ASYNC110 - one turn of the loop at a time is the point
        await asyncio.sleep(0)
    assert not asking.done()
    assert await asyncio.gather(parts.store.delete(key_of(1)), asking) == [2 * SIZE, None]


async def test_a_write_waits_for_the_delete_before_it(opened: Open) -> None:
    parts = await opened()
    block = tiny_block(1)
    async with shut(parts.disk, parts.object):
        deleting = asyncio.create_task(parts.store.delete(block.key))
        await turns()
        parts.store.put(block)
        await turns()
        assert (parts.disk.writes, parts.object.writes) == (0, 0)
    await deleting
    assert await parts.store.kept(block.key) == (RAM, DISK, OBJECT)


async def test_a_block_put_while_it_is_deleted_is_a_new_one(opened: Open) -> None:
    parts = await opened()
    parts.store.put(tiny_block(1))
    await parts.settle(1)
    again = tiny_block(1)
    async with shut(parts.disk, parts.object):
        deleting = asyncio.create_task(parts.store.delete(key_of(1)))
        await turns()
        parts.store.put(again)
        assert await parts.store.find(key_of(1), TOKENS) == (again, RAM)
        await turns()
    await deleting
    assert await parts.store.kept(key_of(1)) == (RAM, DISK, OBJECT)
    assert parts.disk.blocks[key_of(1)] is parts.object.blocks[key_of(1)] is again


async def test_a_tier_that_cannot_delete_says_so_and_the_others_have_deleted(opened: Open) -> None:
    parts = await opened()
    parts.store.put(tiny_block(1))
    await parts.settle(1)
    parts.disk.broken = True
    with pytest.raises(DrystoneError) as raised:
        await parts.store.delete(key_of(1))
    assert raised.value.reason is Reason.BLOCK_UNAVAILABLE
    assert await parts.store.where(key_of(1)) == (DISK,)
    parts.disk.broken = False
    assert await parts.store.delete(key_of(1)) == SIZE
    assert not parts.store._deleting


async def test_pins_hold_in_every_tier_and_for_what_comes_later(opened: Open) -> None:
    parts = await opened(ram=2)
    assert parts.store.pin(key_of(1), pinned=True)
    assert not parts.store.pin(key_of(1), pinned=True)
    for number in range(1, 20):
        parts.store.put(tiny_block(number))
        await parts.settle(number)
    assert await parts.store.where(key_of(1)) == (RAM, DISK, OBJECT)
    assert all(entry.pinned for _, entry in parts.store.entries_of(key_of(1)))
    assert parts.store.pin(key_of(1), pinned=False)
    assert not any(entry.pinned for _, entry in parts.store.entries_of(key_of(1)))
    parts.store.pin(key_of(19), pinned=True)
    await parts.store.delete(key_of(19))
    assert not parts.store.pinned(key_of(19))


async def test_a_pinned_block_is_pinned_wherever_it_is_promoted_to(opened: Open) -> None:
    parts = await opened()
    await parts.object.write(tiny_block(1), pinned=False)
    parts.store.pin(key_of(1), pinned=True)
    assert await parts.found_in(1) == OBJECT
    await parts.settle(1)
    assert [entry.pinned for _, entry in parts.store.entries_of(key_of(1))] == [True] * 3


async def test_a_pin_that_comes_or_goes_during_the_write_counts(opened: Open) -> None:
    parts = await opened()
    parts.store.pin(key_of(2), pinned=True)
    async with shut(parts.disk, parts.object):
        parts.store.put(tiny_block(1))
        parts.store.put(tiny_block(2))
        await turns()
        parts.store.pin(key_of(1), pinned=True)
        parts.store.pin(key_of(2), pinned=False)
    await parts.settle(1, 2)
    assert [entry.pinned for _, entry in parts.store.entries_of(key_of(1))] == [True] * 3
    assert [entry.pinned for _, entry in parts.store.entries_of(key_of(2))] == [False] * 3


async def test_pins_of_an_earlier_life_hold_for_what_tiers_bring_along() -> None:
    parts = Parts()
    parts.store.restore_pins([key_of(1)])
    await parts.disk.write(tiny_block(1), pinned=False)
    await parts.store.start()
    entry = parts.disk.ledger.get(key_of(1))
    assert entry is not None
    assert entry.pinned
    await parts.store.close(WAIT)


async def test_books_of_all_tiers_are_told_by_key(opened: Open) -> None:
    parts = await opened()
    parts.store.put(tiny_block(1))
    await parts.settle(1)
    await parts.object.write(tiny_block(2), pinned=False)
    told = {key: [source for source, _ in parts.store.entries_of(key)] for key in sorted(parts.store.keys())}
    assert told == {key_of(1): [RAM, DISK, OBJECT], key_of(2): [OBJECT]}


async def test_what_one_queue_dropped_is_kept_from_where_it_still_waits(opened: Open) -> None:
    parts = await opened(ram=1, queue=4)
    async with shut(parts.disk, parts.object):
        for number in (1, 2):
            parts.store.put(tiny_block(number))
        parts.object.gate.set()
        await parts.store._behind[1].settled(key_of(2))
        parts.store.put(tiny_block(3))
        assert [behind.peek(key_of(3)) is None for behind in parts.store._behind] == [True, False]
        parts.object.gate.clear()
        parts.store.put(tiny_block(4))
        assert parts.ram.peek(key_of(3)) is None
        keeping = asyncio.create_task(parts.store.kept(key_of(3)))
        await turns()
    assert await keeping == (DISK, OBJECT)


async def test_what_only_the_object_store_has_is_kept_on_disk_too(opened: Open) -> None:
    parts = await opened(ram=0)
    await parts.object.write(tiny_block(1), pinned=False)
    parts.object.paying = False
    assert await parts.store.kept(key_of(1)) == (OBJECT,), "reading would be slower than encoding"
    parts.object.paying = True
    assert await parts.store.kept(key_of(1)) == (DISK, OBJECT)
    assert await parts.store.kept(key_of(1)) == (DISK, OBJECT)
    assert parts.object.reads == 1


async def test_a_block_deleted_while_it_waits_for_room_is_not_written(opened: Open) -> None:
    parts = await opened(ram=9, queue=2)
    block = tiny_block(2)
    async with shut(parts.disk, parts.object):
        parts.store.put(tiny_block(1))
        await turns()
        keeping = asyncio.create_task(parts.store.kept(block.key, block))
        await turns()
        deleting = asyncio.create_task(parts.store.delete(block.key))
        await turns()
    await deleting
    assert await keeping == ()
    assert block.key not in parts.disk.blocks
    assert block.key not in parts.object.blocks
    assert not parts.store._deleting


async def test_a_block_that_was_forgotten_is_let_go_of_at_once(opened: Open) -> None:
    parts = await opened(ram=9)
    async with shut(parts.disk, parts.object):
        for number in (1, 2):
            parts.store.put(tiny_block(number))
        await turns()
        block = tiny_block(3)
        forgotten = weakref.ref(block.data)
        parts.store.put(block)
        del block
        deleting = asyncio.create_task(parts.store.delete(key_of(3)))
        await turns()
        gc.collect()
        assert forgotten() is None
    await deleting


async def test_writers_hold_no_block_while_they_wait(opened: Open) -> None:
    parts = await opened(ram=1)
    block = tiny_block(1)
    gone = weakref.ref(block.data)
    parts.store.put(block)
    del block
    await parts.settle(1)
    await parts.store.delete(key_of(1))
    await turns()
    gc.collect()
    assert gone() is None


async def test_a_head_is_looked_for_below_a_tier_that_cannot_be_read(opened: Open) -> None:
    parts = await opened()
    await parts.object.write(tiny_block(1), pinned=False)
    parts.disk.broken = True
    head = await parts.store.head(key_of(1))
    assert head is not None
    with pytest.raises(DrystoneError):
        await parts.store.head(key_of(2))


async def test_pending_writes_end_within_the_grace() -> None:
    parts = Parts(ram=9)
    await parts.store.start()
    for number in range(5):
        parts.store.put(tiny_block(number))
    await parts.store.close(WAIT)
    assert len(parts.disk.blocks) == len(parts.object.blocks) == 5
    assert (parts.store.pending_bytes, parts.ram.ledger.used_bytes) == (0, 0)


async def test_what_the_grace_does_not_suffice_for_is_dropped_and_counted() -> None:
    parts = Parts(ram=9)
    await parts.store.start()
    parts.object.gate.clear()
    for number in range(5):
        parts.store.put(tiny_block(number))
    parts.object.blocks[key_of(7)] = tiny_block(7)
    asking = asyncio.create_task(parts.store.find(key_of(7), TOKENS))
    await turns()
    await parts.store.close(0.01)
    assert await asking is None
    assert len(parts.disk.blocks) == 5
    assert (len(parts.object.blocks), parts.object.meter.writes_dropped) == (1, 5)
    assert parts.store.pending_bytes == 0
    parts.store.put(tiny_block(8))
    assert (parts.store.pending_bytes, await parts.found_in(9)) == (0, None)


async def test_a_delete_waits_for_nothing_once_the_store_is_closed() -> None:
    parts = Parts()
    await parts.store.start()
    parts.object.gate.clear()
    parts.store.put(tiny_block(1))
    await turns()
    deleting = asyncio.create_task(parts.store.delete(key_of(1)))
    await turns()
    await parts.store.close(0.01)
    parts.object.gate.set()
    async with asyncio.timeout(WAIT):
        await deleting
    assert not parts.object.blocks


async def test_sweeps_go_on_after_one_fails_and_pins_reach_what_they_find(opened: Open) -> None:
    parts = await opened()
    parts.store.pin(key_of(1), pinned=True)
    parts.disk.raises = True
    running = asyncio.create_task(parts.store.run())
    await parts.object.write(tiny_block(1), pinned=False)
    while parts.disk.sweeps < 3 or parts.object.sweeps < 3:  # noqa: ASYNC110 - a fake has no event for it
        await asyncio.sleep(0)
    await cancelled(running)
    assert parts.disk.meter.failures >= 2
    entry = parts.object.ledger.get(key_of(1))
    assert entry is not None
    assert entry.pinned


async def test_a_writer_that_breaks_ends_the_run(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = await opened()
    running = asyncio.create_task(parts.store.run())
    monkeypatch.setattr(parts.disk.ledger, "pin", None)
    parts.store._behind[0].offer(tiny_block(1))
    with pytest.raises(ExceptionGroup):
        async with asyncio.timeout(WAIT):
            await running


async def test_tiers_that_were_opened_are_closed_when_the_next_cannot_be() -> None:
    parts = Parts()

    async def refuse() -> None:
        raise OSError("no such place")

    parts.object.open = refuse  # type: ignore[method-assign] # a tier that cannot be opened
    with pytest.raises(OSError, match="no such place"):
        await parts.store.start()
    assert (parts.disk.closed, parts.object.closed) == (1, 0)
