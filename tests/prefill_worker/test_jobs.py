"""Jobs of a tiny model over slow tiers: each block once, nothing deleted comes back, memory is bounded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from prefill_worker.batch_queue import Urgency
from prefill_worker.encoder import Encoder
from prefill_worker.forward import Outcome
from prefill_worker.holdings import Holdings
from prefill_worker.jobs import Errand, Jobs
from prefill_worker.newborn import Newborn
from prefill_worker.records.records import Records
from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.block_store import BlockStore
from prefill_worker.tiers.ledger import Ledger
from prefill_worker.tiers.ram import RamTier
from prefill_worker.transfer.errors import SourceLostError
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason
from shared.internal.v1 import prefill_pb2 as pb
from shared.internal.v1.common_pb2 import (
    SHIP_SOURCE_DISK,
    SHIP_SOURCE_ENCODED,
    SHIP_SOURCE_OBJECT_STORE,
    SHIP_SOURCE_RAM,
    BlockRef,
    KvEndpoint,
)
from shared.runtime import cancelled
from tests.support.stacks import until
from tests.support.tier_parts import FakeTier, cost

TOKENS = 4


class FakeShipper:
    """Ships to nobody; remembers what, and how much of it there was; ends when it is whole, or lost."""

    def __init__(self) -> None:
        self.shipped: list[bytes] = []
        self.births: list[tuple[bytes, bool]] = []

    async def ship(self, source: StoredBlock | Newborn, reservation: object, endpoint: object) -> pb.BlockDone:
        del reservation, endpoint
        self.births.append((source.birth_id, source.checksum(0) is not None))
        await until(lambda: source.failure is not None or source.checksum(0) is not None)
        if source.failure is not None:
            raise SourceLostError(source.failure)
        self.shipped.append(source.key)
        return pb.BlockDone(bytes=source.bytes)


class Parts:
    def __init__(self, model: ServedModel, *, ram: int = 9, unshipped: int = 99) -> None:
        size = model.geometry.shape.extent_bytes(TOKENS)
        self.disk, self.object = FakeTier(None), FakeTier(None, SHIP_SOURCE_OBJECT_STORE)
        self.keys = model.key_space()
        ledger = Ledger(ram * size, cost)
        self.store = BlockStore(RamTier(ledger), (self.disk, self.object), write_queue_bytes=99 * size)
        self.encoder = Encoder(
            model,
            self.store.put,
            max_queued_blocks=99,
            max_queued_tokens=999,
            max_unshipped_bytes=unshipped * size,
            batch_tokens=TOKENS,
        )
        self.records = Records(None, None, key_space=self.keys)
        self.holdings = Holdings(self.store, self.records, self.encoder, self.keys, model.geometry.shape)
        self.shipper = FakeShipper()
        self.jobs = Jobs(self.holdings, self.encoder, self.shipper, model.vocabulary_size)  # type: ignore[arg-type] # a part
        self.errand = Errand(self.keys, "", KvEndpoint(), Urgency.WARMING, keep_records=True)

    def key(self, number: int) -> bytes:
        return self.keys.key(_ids(number))

    def warm(self, number: int) -> asyncio.Task[pb.BlockDone]:
        ref = BlockRef(key=self.key(number), token_ids=_ids(number), store=True)
        return asyncio.create_task(self.jobs.run(pb.EncodeJob(block=ref), self.errand))

    def ship(self, number: int) -> asyncio.Task[pb.BlockDone]:
        job = pb.EncodeJob(block=BlockRef(key=self.key(number), token_ids=_ids(number), store=True))
        job.reservation.SetInParent()
        return asyncio.create_task(self.jobs.run(job, replace(self.errand, urgency=Urgency.NORMAL)))


def _ids(number: int) -> tuple[int, ...]:
    return (5 + number, 6, 7, 8)


@pytest.fixture
async def parts(served: ServedModel, request: pytest.FixtureRequest) -> AsyncIterator[Parts]:
    made = Parts(served, **getattr(request, "param", {}))
    await made.records.open()
    await made.store.start()
    running = asyncio.create_task(made.encoder.run())
    yield made
    made.disk.gate.set()
    made.object.gate.set()
    await cancelled(running)
    await made.store.close(5.0)
    await made.records.close()
    assert made.encoder.unshipped_bytes == 0
    assert len(made.store._deleting) == 0


async def test_a_warmed_block_is_in_every_tier(parts: Parts) -> None:
    done = await parts.warm(1)
    assert list(done.tiers) == [SHIP_SOURCE_RAM, SHIP_SOURCE_DISK, SHIP_SOURCE_OBJECT_STORE]
    assert done.source == SHIP_SOURCE_ENCODED
    assert (await parts.warm(1)).source == SHIP_SOURCE_RAM
    assert (await parts.ship(1)).source == SHIP_SOURCE_RAM
    assert parts.encoder.blocks_total == 1


@pytest.mark.parametrize("parts", [{"ram": 0}, {"ram": 9}], indirect=True)
async def test_a_block_deleted_while_it_is_encoded_is_nowhere(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun, encode = threading.Event(), threading.Event(), parts.encoder._forward.run

    def held(jobs: Any) -> Outcome:
        begun.set()
        assert go.wait(10.0)
        return encode(jobs)

    monkeypatch.setattr(parts.encoder._forward, "run", held)
    warming = parts.warm(1)
    await until(begun.is_set)
    await parts.holdings.delete([parts.key(1)])
    go.set()
    with pytest.raises(DrystoneError, match="deleted meanwhile") as raised:
        await warming
    assert raised.value.reason is Reason.BLOCK_UNAVAILABLE
    assert (parts.store.keys(), parts.disk.blocks, parts.object.blocks, len(parts.records)) == (set(), {}, {}, 0)


async def test_a_block_deleted_while_tiers_are_written_is_nowhere(parts: Parts) -> None:
    parts.disk.gate.clear()
    warming = parts.warm(1)
    await until(lambda: parts.disk.writes == 1)
    deleting = asyncio.create_task(parts.holdings.delete([parts.key(1)]))
    await until(lambda: parts.key(1) in parts.store._deleting)
    parts.disk.gate.set()
    await deleting
    with pytest.raises(DrystoneError, match="deleted meanwhile"):
        await warming
    assert (parts.store.keys(), parts.disk.blocks, parts.object.blocks, len(parts.records)) == (set(), {}, {}, 0)


@pytest.mark.parametrize("warming", [True, False])
async def test_a_block_made_while_a_slow_tier_was_asked_is_not_encoded_again(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, *, warming: bool
) -> None:
    go, asked = asyncio.Event(), 0

    async def slow(key: bytes) -> object:
        nonlocal asked
        asked += 1
        absent = key not in parts.object.blocks
        if asked == 1:
            await go.wait()
        return None if not warming else not absent

    monkeypatch.setattr(parts.object, "holds" if warming else "read", slow)
    late = (parts.warm if warming else parts.ship)(1)
    await until(lambda: asked == 1)
    ids = _ids(1)
    encoding, _ = parts.encoder.request(parts.key(1), ids, store=True, urgency=Urgency.NORMAL)
    await encoding.done
    parts.encoder.leave(encoding)
    go.set()
    assert (await late).source == SHIP_SOURCE_RAM
    assert parts.encoder.blocks_total == 1


async def test_a_block_made_while_records_were_asked_is_not_encoded_again(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    await parts.warm(1)
    await parts.holdings.delete([parts.key(1)], keep_records=True)
    real, go, asked = parts.records.get, asyncio.Event(), asyncio.Event()

    async def slow(keys: list[bytes]) -> object:
        asked.set()
        await go.wait()
        return await real(keys)

    monkeypatch.setattr(parts.records, "get", slow)
    job = pb.EncodeJob(block=BlockRef(key=parts.key(1)))
    late = asyncio.create_task(parts.jobs.run(job, replace(parts.errand, keep_records=False)))
    await asked.wait()
    await parts.warm(1)
    go.set()
    assert (await late).source == SHIP_SOURCE_RAM
    assert parts.encoder.blocks_total == 2


@pytest.mark.parametrize("parts", [{"ram": 0, "unshipped": 2}], indirect=True)
async def test_warming_fills_no_more_memory_than_unshipped_blocks_may(parts: Parts) -> None:
    parts.object.gate.clear()
    warming = [parts.warm(number) for number in range(6)]
    await until(lambda: parts.encoder.blocks_total == 2)
    for _ in range(50):
        await asyncio.sleep(0.001)
    assert parts.encoder.blocks_total == 2, "slow tiers hold the encoder up"
    parts.object.gate.set()
    for done in await asyncio.gather(*warming):
        assert list(done.tiers) == [SHIP_SOURCE_DISK, SHIP_SOURCE_OBJECT_STORE]
    assert parts.encoder.blocks_total == 6


async def test_a_block_leaves_while_it_is_made(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    go, whole = threading.Event(), ServedModel.forward_kv

    def held(*arguments: Any) -> None:
        assert go.wait(10.0)
        whole(*arguments)

    monkeypatch.setattr(ServedModel, "forward_kv", held)
    shipping = parts.ship(1)
    await until(lambda: parts.shipper.births != [])
    assert parts.encoder.unshipped_bytes > 0, "its extent counts from the beginning of the forward"
    go.set()
    done = await shipping
    assert parts.shipper.births == [(done.birth_id, False)]
    assert parts.shipper.shipped == [parts.key(1)]
    assert done.source == SHIP_SOURCE_ENCODED


async def test_a_forward_without_memory_is_lost_and_the_next_birth_is_shipped(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, go, tries = ServedModel.forward_kv, threading.Event(), [0]

    def short(*arguments: Any) -> None:
        tries[0] += 1
        if tries[0] == 1:
            assert go.wait(10.0)
            raise MemoryError("no more")
        whole(*arguments)

    monkeypatch.setattr(ServedModel, "forward_kv", short)
    shipping = parts.ship(1)
    await until(lambda: parts.shipper.births != [])
    go.set()
    done = await shipping
    [(lost, _), (birth, made)] = parts.shipper.births
    assert made
    assert (birth, lost != birth) == (done.birth_id, True)
    assert parts.shipper.shipped == [parts.key(1)]
    assert (tries[0], parts.encoder.retries_total) == (2, 1)


async def test_a_forward_that_fails_for_good_is_said_so(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(ServedModel, "forward_kv", broken)
    with pytest.raises(DrystoneError, match="a defect") as raised:
        await parts.ship(1)
    assert raised.value.reason is Reason.BLOCK_UNAVAILABLE
    assert parts.shipper.shipped == []
    assert parts.encoder.unshipped_bytes == 0
