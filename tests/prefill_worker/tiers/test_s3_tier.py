"""A bucket as a tier, over the real protocol: shared, cut off, silent, gone and back."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator

import obstore
import pytest

from prefill_worker.tiers import object_files
from prefill_worker.tiers.locations import Patience
from prefill_worker.tiers.object_names import ObjectNames
from prefill_worker.tiers.object_tier import ObjectTier
from shared.errors import DrystoneError, Reason
from tests.support.object_parts import FILE_BYTES, IDENTITY, QUICK, TOKENS, Clock, make_block, make_tier, same
from tests.support.s3_server import Line, S3Server, line_to, open_bucket, s3_server

NAMES = ObjectNames.of(IDENTITY)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(server: S3Server, request: pytest.FixtureRequest) -> str:
    name = f"b{zlib.crc32(request.node.name.encode()):08x}"
    server.make_bucket(name)
    return name


@pytest.fixture
async def line(server: S3Server) -> AsyncIterator[Line]:
    async with line_to(server.port) as line:
        yield line


async def opened(port: int, bucket: str, **options: object) -> ObjectTier:
    tier = make_tier(open_bucket(port, bucket), shared=True, patience=QUICK, **options)  # type: ignore[arg-type]
    await tier.open()
    return tier


async def test_a_block_goes_to_the_bucket_and_comes_back_for_any_worker(server: S3Server, bucket: str) -> None:
    one = await opened(server.port, bucket)
    other = await opened(server.port, bucket)
    block = make_block(1, tenant="acme")
    assert not await one.holds(block.key)
    assert await one.read(block.key) is None
    assert await one.write(block, pinned=False)
    assert await other.holds(block.key), "the store is asked"
    assert block.key in other.ledger, "and what it says is remembered"
    assert same(await other.read(block.key), block)
    later = await opened(server.port, bucket)
    assert [entry.tokens for entry in later.ledger.entries()] == [TOKENS]

    assert await one.delete(block.key) == FILE_BYTES
    assert await other.read(block.key) is None
    assert block.key not in other.ledger
    assert not await other.holds(block.key)
    assert (one.meter.failures, other.meter.failures) == (0, 0)


async def test_books_follow_what_others_do(server: S3Server, bucket: str) -> None:
    clock = Clock()
    mine = await opened(server.port, bucket, clock=clock, refresh_seconds=60.0)
    theirs = await opened(server.port, bucket)
    blocks = [make_block(number) for number in range(10, 14)]
    assert await mine.write(blocks[0], pinned=False)
    for block in blocks[1:]:
        assert await theirs.write(block, pinned=False)
    await theirs.delete(blocks[0].key)
    await mine.sweep()
    assert {entry.key for entry in mine.ledger.entries()} == {blocks[0].key}, "not yet time to look"
    clock.now += 60.0
    await mine.sweep()
    assert {entry.key for entry in mine.ledger.entries()} == {block.key for block in blocks[1:]}
    mine.ledger.check_integrity()


async def test_a_bucket_that_holds_more_than_the_budget_is_brought_down_to_it(server: S3Server, bucket: str) -> None:
    clock = Clock()
    mine = await opened(server.port, bucket, clock=clock, refresh_seconds=60.0, budget=3 * FILE_BYTES)
    theirs = await opened(server.port, bucket)
    valued = make_block(20)
    assert await mine.write(valued, pinned=False)
    for _ in range(3):
        assert await mine.read(valued.key) is not None
    for number in range(21, 25):
        assert await theirs.write(make_block(number), pinned=False)
    clock.now += 60.0
    await mine.sweep()
    assert mine.meter.evictions == 2
    assert await mine.holds(valued.key)
    mine.ledger.check_integrity()
    seen = await opened(server.port, bucket)
    assert {entry.key for entry in seen.ledger.entries()} == {entry.key for entry in mine.ledger.entries()}


async def test_cut_off_in_the_middle_of_a_read(bucket: str, line: Line) -> None:
    tier = await opened(line.port, bucket)
    block = make_block(30)
    assert await tier.write(block, pinned=False)
    for left in (10, FILE_BYTES // 2, FILE_BYTES):
        await line.down()
        await line.up()
        line.received, line.cut_down = 0, left
        assert await tier.read(block.key) is None
        assert line.received == left
    assert (tier.meter.failures, tier.meter.corruptions) == (3, 0)
    assert tier.resting
    line.cut_down = None
    again = await opened(line.port, bucket)
    assert same(await again.read(block.key), block), "what is in the bucket was never touched"


async def test_cut_off_in_the_middle_of_a_write(server: S3Server, bucket: str, line: Line) -> None:
    tier = await opened(line.port, bucket)
    block = make_block(31)
    for left in (100, FILE_BYTES // 2, FILE_BYTES):
        await line.down()
        await line.up()
        line.sent, line.cut_up = 0, left
        assert not await tier.write(block, pinned=False)
        assert line.sent == left
    assert (tier.meter.write_failures, tier.ledger.used_bytes) == (3, 0)
    line.cut_up = None
    other = await opened(server.port, bucket)
    assert len(other.ledger) == 0
    assert await other.read(block.key) is None
    assert other.meter.corruptions == 0
    assert await other.write(block, pinned=False)
    assert same(await other.read(block.key), block)


async def test_a_store_that_says_nothing_costs_no_more_than_the_time_limit(bucket: str, line: Line) -> None:
    tier = await opened(line.port, bucket)
    block, other = make_block(32), make_block(33)
    assert await tier.write(block, pinned=False)
    assert await tier.write(other, pinned=False)
    line.flows.clear()
    async with asyncio.timeout(10):
        assert await tier.read(block.key) is None
        assert not await tier.holds(make_block(34).key)
        with pytest.raises(DrystoneError) as raised:
            await tier.delete(block.key)
    assert raised.value.reason is Reason.BLOCK_UNAVAILABLE
    assert tier.meter.failures == 2
    assert await tier.holds(block.key), "nobody knows"
    line.flows.set()
    assert same(await tier.read(other.key), other)
    assert await tier.delete(block.key) == FILE_BYTES
    assert await tier.read(block.key) is None


async def test_a_store_that_is_down_rests_and_comes_back(bucket: str, line: Line) -> None:
    clock = Clock()
    tier = await opened(line.port, bucket, clock=clock)
    block = make_block(34)
    assert await tier.write(block, pinned=False)
    await line.down()
    for _ in range(3):
        assert not tier.resting
        assert await tier.read(block.key) is None
    assert tier.resting
    for _ in range(100):
        assert await tier.read(block.key) is None
        assert not await tier.holds(make_block(35).key)
    assert await tier.holds(block.key), "by the books"
    assert tier.meter.failures == 3, "nothing is asked while it rests"
    for rest in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
        clock.now += rest - 0.1
        failures = tier.meter.failures
        assert await tier.read(block.key) is None
        assert tier.meter.failures == failures, f"it rests for {rest} s"
        clock.now += 0.1
        assert await tier.read(block.key) is None
        assert tier.meter.failures == failures + 1
    await line.up()
    clock.now += 60.0
    assert same(await tier.read(block.key), block)
    assert not tier.resting


async def test_writes_rest_too_and_are_counted(bucket: str, line: Line) -> None:
    clock = Clock()
    tier = await opened(line.port, bucket, clock=clock)
    await line.down()
    for number in range(40, 50):
        assert not await tier.write(make_block(number), pinned=False)
    assert (tier.meter.write_failures, tier.meter.writes_dropped) == (3, 7)
    assert tier.ledger.used_bytes == 0
    await line.up()
    clock.now += 1.0
    assert await tier.write(make_block(40), pinned=False)
    assert await tier.write(make_block(41), pinned=False)


async def test_a_store_that_is_down_at_start_is_asked_again(server: S3Server, bucket: str, line: Line) -> None:
    clock = Clock()
    theirs = await opened(server.port, bucket)
    block = make_block(50)
    assert await theirs.write(block, pinned=False)
    await line.down()
    tier = await opened(line.port, bucket, clock=clock)
    assert (len(tier.ledger), tier.meter.failures) == (0, 1)
    await line.up()
    clock.now += 1.0
    await tier.sweep()
    assert block.key in tier.ledger


async def test_a_bad_object_is_put_aside_in_the_bucket(server: S3Server, bucket: str) -> None:
    tier = await opened(server.port, bucket)
    block = make_block(60)
    assert await tier.write(block, pinned=False)
    store = open_bucket(server.port, bucket)
    raw = bytearray(bytes(await (await obstore.get_async(store, NAMES.block(block.key))).bytes_async()))
    raw[-1] ^= 1
    await obstore.put_async(store, NAMES.block(block.key), bytes(raw))
    assert await tier.read(block.key) is None
    assert (tier.meter.corruptions, tier.meter.failures) == (1, 0)
    assert not await tier.holds(block.key)
    kept = await (await obstore.get_async(store, NAMES.quarantined(block.key))).bytes_async()
    assert bytes(kept) == raw
    assert await tier.write(block, pinned=False)
    assert same(await tier.read(block.key), block)


async def test_a_deleted_block_whose_failed_write_comes_to_be_is_never_found(
    server: S3Server, bucket: str, line: Line
) -> None:
    tier = await opened(line.port, bucket)
    block = make_block(61)
    line.cut_down = 0  # the bucket takes it, and its answer is lost
    assert not await tier.write(block, pinned=False)
    line.cut_down = None
    await line.down()
    await line.up()
    await tier.delete(block.key)
    late = await opened(server.port, bucket)
    assert await late.write(block, pinned=False)
    assert await tier.read(block.key) is None
    assert not await tier.holds(block.key)
    await tier.sweep()
    assert block.key not in tier.ledger
    assert await late.read(block.key) is None, "removed from the bucket"
    assert await tier.write(block, pinned=False)
    await tier.sweep()
    assert same(await tier.read(block.key), block), "written again, it is there"


async def test_a_large_block_goes_in_parts(server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_files, "_MULTIPART_BYTES", 1 << 20)
    monkeypatch.setattr(object_files, "_PART_BYTES", 5 << 20)
    store = open_bucket(server.port, bucket, Patience())
    tier = make_tier(store, shared=True)
    await tier.open()
    block = make_block(62, (12 << 20) // IDENTITY.shape.token_bytes)
    assert await tier.write(block, pinned=False)
    meta = await obstore.head_async(store, NAMES.block(block.key))
    assert str(meta["e_tag"]).strip('"').endswith("-3"), "three parts"
    assert same(await tier.read(block.key), block)
