"""One block over a wire that corrupts, cuts, drops, repeats and reorders: right, or refused with a reason."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from prefill_worker.transfer.errors import LinkBrokenError
from shared.errors import DrystoneError, Reason
from shared.internal.v1.transfer_pb2 import TransferHeader
from tests.support.decode_parts import assert_all_free_after_eviction
from tests.support.stacks import until
from tests.support.wire import CHUNKS, SHAPE, TOKENS, Fault, Frames, Wire, flipped, make_block, untouched, wired


def once(change: Callable[[Frames], list[Frames]], *, kind: str = "chunk", skip: int = 1) -> Fault:
    """A fault that strikes one message of a kind, after `skip` of them."""
    left = [skip]

    def fault(header: TransferHeader | None, frames: Frames) -> list[Frames]:
        if header is None or header.WhichOneof("message") != kind:
            return [frames]
        left[0] -= 1
        return change(frames) if left[0] == -1 else [frames]

    return fault


async def assert_ships(wire: Wire, number: int = 1) -> int:
    """Ships a block, compares every byte, and finds nothing left over; chunks sent again."""
    block = make_block(number)
    request = wire.expect(block)
    shipped = await wire.ship(block, wire.reservation(request))
    assert wire.resident_bytes(block) == bytes(block.data)
    wire.end(request)
    [link] = wire.links()
    await until(lambda: link.idle)
    assert link.outstanding_bytes == 0
    assert_all_free_after_eviction(wire.pool)
    return shipped.chunks_resent


async def test_a_sound_wire() -> None:
    async with wired() as wire:
        assert await assert_ships(wire) == 0
        assert await assert_ships(wire, 2) == 0
        assert wire.relay.pairs == 1
        assert wire.receiver.refused_total == 0
        assert wire.receiver.received_bytes == 2 * SHAPE.extent_bytes(TOKENS)


@pytest.mark.parametrize(
    "change",
    [
        lambda frames: [[frames[0], flipped(frames[1])]],
        lambda frames: [[frames[0], flipped(frames[1], 0)]],
        lambda frames: [[frames[0], frames[1][:-1]]],
        lambda frames: [[frames[0], b""]],
        lambda frames: [[frames[0]]],
        lambda frames: [[*frames, b"more"]],
        lambda frames: [[frames[0], frames[1] + b"x"]],
    ],
    ids=["one bit", "first bit", "one byte less", "empty", "no data frame", "a frame more", "one byte more"],
)
@pytest.mark.parametrize("skip", [0, CHUNKS - 1], ids=["first chunk", "last chunk"])
async def test_a_damaged_chunk_is_refused_and_sent_again(change: Callable[[Frames], list[Frames]], skip: int) -> None:
    async with wired() as wire:
        wire.relay.there = once(change, skip=skip)
        assert await assert_ships(wire) == 1
        assert wire.receiver.refused_total == 1


@pytest.mark.parametrize("skip", range(CHUNKS))
async def test_a_repeated_chunk_changes_nothing(skip: int) -> None:
    async with wired(seconds=2.0) as wire:
        wire.relay.there = once(lambda frames: [frames, frames], skip=skip)
        assert await assert_ships(wire) == 0


async def test_every_message_twice() -> None:
    async with wired(seconds=2.0) as wire:
        wire.relay.there = lambda _, frames: [frames, frames]
        wire.relay.back = lambda _, frames: [frames, frames]
        for number in range(3):
            await assert_ships(wire, number)


@pytest.mark.parametrize(("order", "resent"), [((0, 3, 1, 2), 0), ((3, 2, 1, 0), CHUNKS - 1), ((1, 0, 2, 3), 1)])
async def test_chunks_in_any_order(order: tuple[int, ...], resent: int) -> None:
    """The first is the offer too: what overtakes it is refused and sent again."""
    async with wired() as wire:
        held: list[Frames] = []

        def reordered(header: TransferHeader | None, frames: Frames) -> list[Frames]:
            if header is None or not header.HasField("chunk") or len(held) == CHUNKS:
                return [frames]
            held.append(frames)
            return [held[index] for index in order] if len(held) == CHUNKS else []

        wire.relay.there = reordered
        assert await assert_ships(wire) == resent


async def test_a_chunk_that_never_arrives_whole_is_given_up() -> None:
    async with wired() as wire:
        wire.relay.there = lambda header, frames: (
            [[frames[0], flipped(frames[1])]] if header is not None and header.chunk.chunk_index == 2 else [frames]
        )
        block = make_block(1)
        request = wire.expect(block)
        with pytest.raises(DrystoneError, match="CHECKSUM") as caught:
            await wire.ship(block, wire.reservation(request))
        assert caught.value.reason is Reason.TRANSFER_FAILED
        assert not isinstance(caught.value, LinkBrokenError)
        assert wire.committed == []
        wire.end(request)
        wire.relay.there = untouched
        await assert_ships(wire)
        assert wire.relay.pairs == 1, "the link was sound"


@pytest.mark.parametrize(
    ("kind", "skip", "resent"),
    [
        ("hello", 0, 0),
        ("welcome", 0, 0),
        ("chunk", 0, CHUNKS),  # it is the offer too: every chunk that follows it is refused
        ("chunk", 1, 1),
        ("chunk_result", 0, 0),  # the extent is whole before it is missed
        ("committed", 0, 1),
        ("ping", 0, 1),
        ("pong", 0, 1),
    ],
)
async def test_a_lost_message_is_noticed_and_sent_again(kind: str, skip: int, resent: int) -> None:
    async with wired() as wire:
        wire.relay.there = wire.relay.back = once(lambda _: [], kind=kind, skip=skip)
        if kind in ("ping", "pong"):  # asked only where something else is missing
            lost = wire.relay.there
            missing = once(lambda _: [], kind="chunk", skip=1)
            wire.relay.there = lambda header, frames: [
                one for kept in missing(header, frames) for one in lost(header, kept)
            ]
        assert await assert_ships(wire) == resent
        assert len(wire.committed) == 1
        assert wire.relay.pairs == 1


@pytest.mark.parametrize(("kind", "skip", "resent"), [("hello", 0, 0), ("chunk", 0, CHUNKS), ("chunk", 1, 1)])
async def test_a_header_that_cannot_be_read_is_sent_again(kind: str, skip: int, resent: int) -> None:
    async with wired() as wire:
        wire.relay.there = once(lambda frames: [[flipped(frames[0], 77), *frames[1:]]], kind=kind, skip=skip)
        assert await assert_ships(wire) == resent
        assert wire.receiver.refused["MALFORMED"] == 1


async def test_a_dead_wire_ends_the_transfer_in_time_and_the_next_one_gets_a_new_link() -> None:
    async with wired(seconds=0.5) as wire:
        await assert_ships(wire)
        wire.relay.there = lambda _, __: []
        block = make_block(2)
        request = wire.expect(block)
        began = time.monotonic()
        with pytest.raises(LinkBrokenError, match=r"no progress of a transfer within 0\.5 s"):
            await wire.ship(block, wire.reservation(request))
        assert time.monotonic() - began < 3.0
        wire.end(request)
        wire.relay.there = untouched
        await assert_ships(wire, 3)
        assert wire.relay.pairs == 2


async def test_an_answer_that_cannot_be_read_is_passed_over() -> None:
    async with wired(seconds=0.5) as wire:
        wire.relay.back = once(lambda frames: [[flipped(frames[0], 77)]], kind="chunk_result", skip=0)
        assert await assert_ships(wire) == 0


async def test_a_greeting_that_is_answered_with_noise_is_said_again() -> None:
    async with wired() as wire:
        wire.relay.back = once(lambda _: [[b"noise"]], kind="welcome", skip=0)
        assert await assert_ships(wire) == 0


async def test_a_greeting_that_is_always_answered_with_noise_is_given_up_and_says_so() -> None:
    async with wired(seconds=0.5) as wire:
        wire.relay.back = lambda _, __: [[b"noise"]]
        block = make_block(1)
        request = wire.expect(block)
        with pytest.raises(LinkBrokenError, match="what came could not be read"):
            await wire.ship(block, wire.reservation(request))
        wire.end(request)
        wire.relay.back = untouched
        await assert_ships(wire)


async def test_a_connection_made_anew_greets_again_and_goes_on() -> None:
    async with wired() as wire:
        await assert_ships(wire)
        await wire.relay.reconnect()
        assert await assert_ships(wire, 2) == CHUNKS
        [link] = wire.links()
        assert link.greetings_total == 2
        assert await assert_ships(wire, 3) == 0


async def test_a_connection_made_anew_midway_keeps_what_was_verified() -> None:
    async with wired() as wire:
        await assert_ships(wire)
        passed = []

        def half(header: TransferHeader | None, frames: Frames) -> list[Frames]:
            if header is not None and header.HasField("chunk"):
                passed.append(header.chunk.chunk_index)
                return [frames] if len(passed) <= CHUNKS // 2 else []
            return [frames]

        wire.relay.there = half
        block = make_block(2)
        request = wire.expect(block)
        shipping = asyncio.create_task(wire.ship(block, wire.reservation(request)))
        [fetch] = request.fetches
        await until(lambda: len(passed) >= CHUNKS and len(fetch.landing.taken) == CHUNKS // 2)
        await wire.relay.reconnect()
        wire.relay.there = untouched
        await shipping
        assert wire.resident_bytes(block) == bytes(block.data)
        wire.end(request)
        await assert_ships(wire, 3)


async def test_a_ship_cancelled_midway_gives_its_credit_back() -> None:
    async with wired() as wire:
        await assert_ships(wire)
        held: list[Frames] = []
        wire.relay.there = lambda header, frames: (
            [frames] if header is None or not header.HasField("chunk") else (held.append(frames), [])[1]  # type: ignore[func-returns-value] # held, not sent
        )
        block = make_block(2)
        request = wire.expect(block)
        shipping = asyncio.create_task(wire.ship(block, wire.reservation(request)))
        await until(lambda: len(held) == CHUNKS)
        [link] = wire.links()
        assert link.outstanding_bytes == SHAPE.extent_bytes(TOKENS)
        shipping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await shipping
        wire.end(request)
        wire.relay.there = untouched
        await assert_ships(wire, 3)
        assert len(wire.links()) == 1


async def test_all_transfers_of_a_link_that_breaks_end_with_a_reason() -> None:
    async with wired(seconds=0.4) as wire:
        await assert_ships(wire)
        wire.relay.there = lambda header, frames: [] if header is not None and header.HasField("chunk") else [frames]
        blocks = [make_block(number) for number in range(5, 9)]
        requests = [wire.expect(block) for block in blocks]
        ships = [wire.ship(block, wire.reservation(one)) for block, one in zip(blocks, requests, strict=True)]
        began = time.monotonic()
        ended = await asyncio.gather(*ships, return_exceptions=True)
        assert time.monotonic() - began < 2.0
        assert [type(error) for error in ended] == [LinkBrokenError] * 4
        for request in requests:
            wire.end(request)
        wire.relay.there = untouched
        await assert_ships(wire, 10)


async def test_more_than_the_credit_waits_its_turn() -> None:
    async with wired() as wire:
        blocks = [make_block(number) for number in range(7)]
        assert 7 * SHAPE.extent_bytes(TOKENS) > 16 << 20
        requests = [wire.expect(block) for block in blocks]
        await asyncio.gather(
            *(wire.ship(block, wire.reservation(one)) for block, one in zip(blocks, requests, strict=True))
        )
        for block in blocks:
            assert wire.resident_bytes(block) == bytes(block.data)
        for request in requests:
            wire.end(request)
        await assert_ships(wire, 20)
