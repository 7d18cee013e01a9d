"""Sixty blocks over a wire that does everything wrong at random: none wrong, nothing left over."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from shared.errors import DrystoneError, Reason
from shared.internal.v1.transfer_pb2 import TransferHeader
from shared.transfer.envelope import seal
from tests.support.decode_parts import assert_all_free_after_eviction
from tests.support.wire import CHUNKS, Frames, Wire, flipped, make_block, wired

BLOCKS = 60


def dropped(_: random.Random, frames: Frames) -> list[Frames]:
    del frames
    return []


def repeated(_: random.Random, frames: Frames) -> list[Frames]:
    return [frames, frames]


def header_flipped(draw: random.Random, frames: Frames) -> list[Frames]:
    return [[flipped(frames[0], draw.randrange(8 * len(frames[0]))), *frames[1:]]]


def data_flipped(draw: random.Random, frames: Frames) -> list[Frames]:
    return [[frames[0], *(flipped(frame, draw.randrange(8 * len(frame))) for frame in frames[1:])]]


def data_cut(draw: random.Random, frames: Frames) -> list[Frames]:
    return [[frames[0], *(frame[: draw.randrange(len(frame))] for frame in frames[1:])]]


def index_changed(draw: random.Random, frames: Frames) -> list[Frames]:
    """What no network does: a well-formed header of another chunk."""
    if len(frames) == 1:
        return [frames]
    header = TransferHeader.FromString(_unsealed(frames[0]))
    header.chunk.chunk_index = draw.randrange(CHUNKS + 1)
    return [[seal(header), frames[1]]]


def _unsealed(frame: bytes) -> bytes:
    from shared.internal.v1.transfer_pb2 import Envelope

    return Envelope.FromString(frame).header


FAULTS: dict[Callable[[random.Random, Frames], list[Frames]], float] = {
    dropped: 0.01,
    repeated: 0.06,
    header_flipped: 0.01,
    data_flipped: 0.10,
    data_cut: 0.05,
    index_changed: 0.02,
}


class Chaos:
    """Strikes messages at random, and lets chunks overtake one another."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.held: list[Frames] = []

    def there(self, header: TransferHeader | None, frames: Frames) -> list[Frames]:
        held, self.held = self.held, []
        if header is not None and header.HasField("chunk") and not held and self.draw.random() < 0.1:
            self.held = [frames]
            return []
        for fault, probability in FAULTS.items():
            if self.draw.random() < probability:
                return [*fault(self.draw, frames), *held]
        return [frames, *held]

    def back(self, header: TransferHeader | None, frames: Frames) -> list[Frames]:
        del header
        return dropped(self.draw, frames) if self.draw.random() < 0.005 else [frames]


async def deliver(wire: Wire, number: int, draw: random.Random) -> int:
    """Ships one block as a gateway would, until it is there; attempts that failed."""
    block, failures = make_block(number), 0
    request = wire.expect(block)
    while request.fetches:
        try:
            await wire.ship(block, wire.reservation(request))
        except DrystoneError as error:
            failures += 1
            assert error.reason in (Reason.TRANSFER_FAILED, Reason.RESERVATION_ENDED)  # noqa: PT017 - any of many ways
            # Another worker's birth, or the same once more; in a new epoch, or the same.
            block = make_block(number) if draw.random() < 0.5 else block
            for fetch in request.fetches if draw.random() < 0.5 else ():
                fetch.restart()
    # Encodings of one number have equal bytes, whichever birth arrived.
    assert wire.resident_bytes(block) == bytes(block.data)
    wire.end(request)
    return failures


@pytest.mark.parametrize("seed", [7, 8])
async def test_random_faults_never_lay_down_a_wrong_byte(seed: int) -> None:
    chaos = Chaos(seed)
    async with wired(seconds=0.15) as wire:
        wire.relay.there, wire.relay.back = chaos.there, chaos.back
        failures = [await deliver(wire, number, chaos.draw) for number in range(BLOCKS // 2)]
        assert sum(failures), "no fault ended a transfer"
        assert wire.receiver.refused_total > 10
        assert len(wire.committed) == BLOCKS // 2
        assert_all_free_after_eviction(wire.pool)
