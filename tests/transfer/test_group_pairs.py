"""Blocks over real Gloo groups beside ZeroMQ: whatever happens to the group, they arrive without it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from decode_worker.receiving import groups
from prefill_worker.transfer import group_way
from prefill_worker.transfer.group_way import GroupWay
from prefill_worker.transfer.outgoing import Shipped
from shared.errors import DrystoneError
from shared.internal.v1.transfer_pb2 import TransferHeader
from tests.support.decode_parts import assert_all_free_after_eviction
from tests.support.wire import CHUNKS, Frames, Wire, make_block, wired
from tests.transfer.test_group_process import gone, mapped

_SECONDS = 60.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(_SECONDS):
        while not condition():  # noqa: ASYNC110 - what it waits for happens on other threads and in processes
            await asyncio.sleep(0.01)


def pipes() -> int:
    """Open ends of pipes of this process."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += str(entry.readlink()).startswith("pipe:")
    return count


def way(wire: Wire) -> GroupWay:
    [link] = wire.links()
    assert link.way is not None
    return link.way


def pids(wire: Wire) -> list[int]:
    mine = way(wire).process
    assert mine is not None
    return [mine, *wire.receiver.groups.processes]


async def shipped(wire: Wire, number: int) -> Shipped:
    """One block there and looked at, by a request that leaves."""
    block = make_block(number)
    request = wire.expect(block)
    done = await wire.ship(block, wire.reservation(request))
    await until(lambda: block.key in wire.committed)
    assert wire.resident_bytes(block) == bytes(block.data)
    wire.end(request)
    wire.committed.clear()
    return done


@contextlib.asynccontextmanager
async def grouped(seconds: float = 20.0) -> AsyncIterator[Wire]:
    """Both ends with a group between them; afterwards nothing of it is left."""
    before, maps = pipes(), mapped()
    async with wired(seconds, kv_transport="gloo") as wire:
        first = await shipped(wire, 1)
        assert first.transport == "zmq-tcp"  # nobody waited for the group
        await until(lambda: way(wire).ready)
        processes = pids(wire)
        yield wire
        assert_all_free_after_eviction(wire.pool)
    await until(lambda: all(gone(pid) for pid in processes))
    assert mapped() == maps
    assert pipes() == before


async def test_blocks_arrive_by_the_group() -> None:
    async with grouped() as wire:
        for number in range(2, 7):
            done = await shipped(wire, number)
            assert (done.transport, done.chunks_resent) == ("gloo", 0)
        assert wire.receiver.groups.received_runs == 5 * CHUNKS
        blocks = [make_block(number) for number in (11, 12, 13)]
        requests = [wire.expect(block) for block in blocks]
        await asyncio.gather(*(wire.ship(b, wire.reservation(r)) for b, r in zip(blocks, requests, strict=True)))
        await until(lambda: len(wire.committed) == 3)
        for block, request in zip(blocks, requests, strict=True):
            assert wire.resident_bytes(block) == bytes(block.data)
            wire.end(request)
        assert not wire.shipper.fallbacks
        assert wire.receiver.refused_total == 0


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
async def test_its_process_dies_or_stops(victim: int, blow: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_way, "REST_SECONDS", 1.0)
    async with grouped() as wire:
        old = pids(wire)
        os.kill(old[victim], blow)
        done = await shipped(wire, 2)
        assert done.transport == "zmq-tcp"
        await until(lambda: wire.shipper.fallbacks.total() == 1 and all(gone(pid) for pid in old))
        assert wire.shipper.pairs()[0].fallbacks_total == 1
        # A new one is made after a rest.
        async with asyncio.timeout(_SECONDS):
            numbers = itertools.count(10)
            while not way(wire).ready:
                await shipped(wire, next(numbers))
                await asyncio.sleep(0.2)
        assert (await shipped(wire, 4)).transport == "gloo"
        for pid in pids(wire):
            os.kill(pid, signal.SIGKILL)
        await until(lambda: not wire.receiver.groups.processes)


async def test_a_header_that_is_lost_ends_the_group_and_not_the_transfer() -> None:
    async with grouped() as wire:
        dropped: list[int] = []

        def drop(header: TransferHeader | None, frames: Frames) -> list[Frames]:
            if header is not None and header.chunk.group and header.chunk.chunk_index == 1 and not dropped:
                dropped.append(1)
                return []
            return [frames]

        wire.relay.there = drop
        done = await shipped(wire, 2)
        assert dropped
        assert {"NO_GROUP", "LOST"} & set(done.resent)
        assert wire.shipper.fallbacks["peer"] == 1
        assert not way(wire).ready


async def test_a_header_that_comes_twice_ends_the_group_and_not_the_transfer() -> None:
    async with grouped() as wire:
        wire.relay.there = lambda header, frames: (
            [frames, frames] if header is not None and header.chunk.group else [frames]
        )
        await shipped(wire, 2)
        assert wire.shipper.fallbacks["peer"] == 1


async def test_bytes_that_do_not_verify_are_refused_and_the_pair_stays_in_step() -> None:
    async with grouped() as wire:
        block, other = make_block(2), make_block(3)
        request = wire.expect(block)
        wrong = type(block)(block.key, block.token_ids, other.data, block.birth)
        with pytest.raises(DrystoneError, match="CHECKSUM"):
            await wire.ship(wrong, wire.reservation(request))
        assert block.key not in wire.committed
        assert wire.receiver.refused["CHECKSUM"] > 0
        wire.end(request)
        assert (await shipped(wire, 4)).transport == "gloo"
        assert not wire.shipper.fallbacks


async def test_a_cancelled_transfer_leaves_the_pair_in_step() -> None:
    async with grouped() as wire:
        for number in range(2, 8):
            block = make_block(number)
            request = wire.expect(block)
            task = asyncio.create_task(wire.ship(block, wire.reservation(request)))
            await asyncio.sleep(0.002 * (number - 2))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            wire.end(request)
        wire.committed.clear()
        assert (await shipped(wire, 20)).transport == "gloo"
        assert not wire.shipper.fallbacks


async def test_one_that_idles_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with grouped() as wire:
        old = pids(wire)
        monkeypatch.setattr(group_way, "GROUP_IDLE_SECONDS", 0.2)
        await until(lambda: all(gone(pid) for pid in old))
        assert not wire.receiver.groups.processes
        assert not wire.shipper.fallbacks
        monkeypatch.setattr(group_way, "GROUP_IDLE_SECONDS", 60.0)
        assert (await shipped(wire, 2)).transport == "zmq-tcp"
        await until(lambda: way(wire).ready)
        assert (await shipped(wire, 3)).transport == "gloo"


async def test_a_connection_that_is_made_anew_makes_its_group_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    async with grouped() as wire:
        old = pids(wire)
        await wire.relay.reconnect()
        await shipped(wire, 2)
        await until(lambda: gone(old[0]))
        assert old[1] in wire.receiver.groups.processes  # of a connection that may come to life again
        await until(lambda: way(wire).ready)
        assert (await shipped(wire, 3)).transport == "gloo"
        monkeypatch.setattr(groups, "GROUP_IDLE_SECONDS", 0.2)
        await until(lambda: not wire.receiver.groups.processes)
        await until(lambda: way(wire).process is None)
        assert not wire.shipper.fallbacks


async def test_a_receiver_that_does_not_want_groups_makes_none() -> None:
    async with wired(kv_transport="gloo") as wire:
        wire.receiver.groups._end = wire.receiver.groups._end.__class__("auto", "", "cpu")
        for number in range(1, 4):
            assert (await shipped(wire, number)).transport == "zmq-tcp"
        assert way(wire).process is None
        assert not wire.receiver.groups.processes
        assert not wire.shipper.fallbacks


async def test_more_groups_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decode_worker.receiving.groups.MAX_GROUPS", 0)
    async with wired(kv_transport="gloo") as wire:
        for number in range(1, 4):
            assert (await shipped(wire, number)).transport == "zmq-tcp"
        await until(lambda: wire.shipper.fallbacks["peer"] == 1)
        assert "there are 0 groups" in wire.shipper.pairs()[0].last_error
