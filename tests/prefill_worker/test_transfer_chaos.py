"""Sixty blocks over a wire that does everything wrong at random: none wrong, nothing left over."""

from __future__ import annotations

import random

import pytest

from shared.errors import DrystoneError, Reason
from tests.support.chaos import Chaos
from tests.support.decode_parts import assert_all_free_after_eviction
from tests.support.wire import Wire, make_block, wired

BLOCKS = 60


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
