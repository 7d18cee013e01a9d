"""Holdings over slow and failing tiers: what is deleted, ended, pinned and told of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from prefill_worker.holdings import Holdings
from prefill_worker.listing import Listing
from prefill_worker.records.record import BlockRecord
from prefill_worker.records.records import Records
from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.block_store import BlockStore
from prefill_worker.tiers.ledger import UNKNOWN_TENANT, Ledger
from prefill_worker.tiers.ram import RamTier
from shared.errors import DrystoneError, Reason
from shared.internal.v1 import prefill_pb2 as pb
from shared.internal.v1.common_pb2 import SHIP_SOURCE_OBJECT_STORE
from shared.kv.birth import make_birth
from tests.support.records import SPACE, Clock, record
from tests.support.tier_parts import SHAPE, SIZE, FakeTier, cost, key_of, tiny_block

TOKENS = 3


class NoEncoder:
    """Encodes nothing; remembers what it was told to forget."""

    def __init__(self) -> None:
        self.forgotten: list[bytes] = []

    def forget(self, key: bytes) -> None:
        self.forgotten.append(key)


@dataclass
class Parts:
    clock: Clock = field(default_factory=Clock)
    disk: FakeTier = field(default_factory=lambda: FakeTier(None))
    object: FakeTier = field(default_factory=lambda: FakeTier(None, SHIP_SOURCE_OBJECT_STORE))
    encoder: NoEncoder = field(default_factory=NoEncoder)

    def __post_init__(self) -> None:
        ram = RamTier(Ledger(10 * SIZE, cost))
        self.store = BlockStore(ram, (self.disk, self.object), write_queue_bytes=99 * SIZE)
        self.records = Records(None, None, key_space=SPACE, clock=self.clock)
        self.holdings = Holdings(self.store, self.records, self.encoder, SPACE, SHAPE)  # type: ignore[arg-type] # a part

    async def warmed(self, *records: BlockRecord) -> list[bytes]:
        await self.records.keep(records)
        for one in records:
            self.store.put(block_of(one))
            await self.store.kept(one.key)
        return [one.key for one in records]


def block_of(one: BlockRecord) -> StoredBlock:
    data = memoryview(bytes(SHAPE.extent_bytes(TOKENS)))
    return StoredBlock(one.key, one.token_ids, data, make_birth(one.key, SHAPE, TOKENS, data), one.tenant)


@pytest.fixture
async def parts() -> AsyncIterator[Parts]:
    made = Parts()
    await made.records.open()
    await made.store.start()
    yield made
    made.disk.gate.set()
    made.object.gate.set()
    await made.store.close(5.0)
    await made.records.close()


async def test_a_deletion_that_failed_is_repeated_by_tag(parts: Parts) -> None:
    keys = await parts.warmed(*(record(number, tags=("x",)) for number in range(3)))
    parts.object.broken = True
    with pytest.raises(DrystoneError) as raised:
        await parts.holdings.delete(keys)
    assert raised.value.reason is Reason.BLOCK_UNAVAILABLE
    assert not parts.disk.blocks, "the others have deleted"
    again = [one.key for one in await parts.records.select(tags=["x"])]
    assert again == sorted(keys)
    parts.object.broken = False
    deleted, freed = await parts.holdings.delete(again)
    assert (sorted(deleted), freed) == (sorted(keys), 3 * SHAPE.extent_bytes(TOKENS))
    assert (len(parts.object.blocks), len(parts.records)) == (0, 0)
    assert set(parts.encoder.forgotten) == set(keys)


async def test_records_can_be_left_to_a_second_call(parts: Parts) -> None:
    keys = await parts.warmed(record(1))
    assert (await parts.holdings.delete(keys, keep_records=True))[0] == keys
    assert (parts.store.keys(), len(parts.records)) == (set(), 1)
    assert await parts.holdings.delete(keys) == (keys, 0)
    assert len(parts.records) == 0


async def test_one_block_that_cannot_be_expired_stays_and_the_rest_goes(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = await parts.warmed(*(record(number, expires_at=parts.clock.now + number + 1) for number in range(5)))
    real = parts.object.delete

    async def stuck(key: bytes) -> int:
        if key == keys[0]:
            raise DrystoneError(Reason.BLOCK_UNAVAILABLE, "stuck")
        return await real(key)

    monkeypatch.setattr(parts.object, "delete", stuck)
    parts.clock.now += 10
    await parts.holdings.expire()
    assert set(parts.object.blocks) == {keys[0]}
    assert (len(parts.records), parts.records.figures.not_expired) == (1, 1)
    monkeypatch.undo()
    await parts.holdings.expire()
    assert (len(parts.object.blocks), len(parts.records)) == (0, 0)


async def test_pins_of_records_are_pins_of_tiers(parts: Parts) -> None:
    keys = await parts.warmed(record(1, pinned=True), record(2))
    assert [parts.store.pinned(key) for key in keys] == [True, False]
    copy = record(3)
    told = pb.BlockRecord(key=copy.key, token_ids=copy.token_ids, pinned=True)
    assert await parts.holdings.keep_copies([told]) == 1
    assert parts.store.pinned(copy.key)
    # A pin that the tiers lost is put right, and said to be a change.
    parts.store.pin(keys[0], pinned=False)
    assert await parts.holdings.pin([*keys, b"?" * 32], pinned=True) == keys
    assert await parts.holdings.pin(keys, pinned=True) == []
    assert not parts.store.pinned(b"?" * 32)
    assert await parts.holdings.pin([*keys, copy.key], pinned=False) == [*keys, copy.key]
    assert not any(parts.store.pinned(key) for key in (*keys, copy.key))


def foreign(tier: FakeTier, *numbers: int) -> list[bytes]:
    """Blocks that a listing of a tier told of."""
    for number in numbers:
        block = tiny_block(number, tenant="t")
        tier.blocks[block.key] = block
        tier.ledger.admit(block.key, tokens=2, bytes_=block.bytes, tenant=UNKNOWN_TENANT, pinned=False)
    return [key_of(number) for number in numbers]


async def test_heads_are_read_many_at_once(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = foreign(parts.object, *range(1, 201))
    real, running, most = parts.object.head, 0, 0

    async def counted(key: bytes) -> object:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return await real(key)

    monkeypatch.setattr(parts.object, "head", counted)
    listing = Listing(parts.store, parts.records, SHAPE)
    found, looked_at = await listing.describe(pb.DescribeStoredRequest(tenant="t", with_token_ids=True))
    assert ([block.key for block in found], looked_at, most) == (keys, b"", 64)
    assert all(list(block.token_ids) == [0, 1] for block in found)
    assert await listing.describe(pb.DescribeStoredRequest(tenant="other")) == ([], b"")
    page, _ = await listing.describe(pb.DescribeStoredRequest(page_size=7, after_key=keys[10]))
    assert [block.key for block in page] == keys[11:18]


async def test_what_there_was_no_time_for_is_left_to_the_next_call(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = foreign(parts.object, *range(1, 100))
    real, never = parts.object.head, asyncio.Event()

    async def slow(key: bytes) -> object:
        if key == keys[70]:
            await never.wait()
        return await real(key)

    monkeypatch.setattr(parts.object, "head", slow)
    listing = Listing(parts.store, parts.records, SHAPE, seconds=0.2)
    found, looked_at = await listing.describe(pb.DescribeStoredRequest())
    assert ([block.key for block in found], looked_at) == (keys[:70], keys[69])
    with pytest.raises(DrystoneError) as raised:
        await listing.describe(pb.DescribeStoredRequest(after_key=looked_at))
    assert raised.value.reason is Reason.DEADLINE_EXCEEDED
    never.set()
    found, looked_at = await listing.describe(pb.DescribeStoredRequest(after_key=looked_at))
    assert ([block.key for block in found], looked_at) == (keys[70:], b"")


async def test_a_tier_that_cannot_be_read_is_not_mistaken_for_an_empty_one(parts: Parts) -> None:
    keys = foreign(parts.object, 1)
    listing = Listing(parts.store, parts.records, SHAPE)
    parts.object.broken = True
    for request in (pb.DescribeStoredRequest(keys=keys), pb.DescribeStoredRequest()):
        with pytest.raises(DrystoneError) as raised:
            await listing.describe(request)
        assert raised.value.reason is Reason.BLOCK_UNAVAILABLE
    parts.object.broken = False
    assert [block.key for block in (await listing.describe(pb.DescribeStoredRequest(keys=keys)))[0]] == keys
