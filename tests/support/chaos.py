"""A wire that does everything wrong at random, for the relay between a pair's two ends (`wire.py`)."""

from __future__ import annotations

import random
from collections.abc import Callable

from shared.internal.v1.transfer_pb2 import Envelope, TransferHeader
from shared.transfer.envelope import seal
from tests.support.wire import CHUNKS, Frames, flipped


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
    header = TransferHeader.FromString(Envelope.FromString(frames[0]).header)
    header.chunk.chunk_index = draw.randrange(CHUNKS + 1)
    return [[seal(header), frames[1]]]


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
