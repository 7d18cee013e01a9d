"""Blocks over a TCP wire that is far, slow, stalls, and is cut in mid-chunk: right, and nothing left over."""

from __future__ import annotations

import os
import random

import pytest

from prefill_worker.transfer.errors import LinkBrokenError
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import KvEndpoint
from tests.support.decode_parts import assert_all_free_after_eviction
from tests.support.stacks import until
from tests.support.tcp_relay import TcpRelay, Weather
from tests.support.wire import SHAPE, TOKENS, Wire, make_block, wired

# In `make proof` there are more.
CUTS = int(os.environ.get("DRYSTONE_CUTS", "10"))
BLOCK_BYTES = SHAPE.extent_bytes(TOKENS)


async def deliver(wire: Wire, relay: TcpRelay, number: int) -> int:
    """Ships one block until it is there; attempts that failed."""
    block, failures = make_block(number), 0
    request = wire.expect(block)
    while request.fetches:
        try:
            await wire.shipper.ship(block, wire.reservation(request), KvEndpoint(zmq_address=relay.address))
        except DrystoneError as error:
            assert error.reason is Reason.TRANSFER_FAILED  # noqa: PT017 - it may end well too
            failures += 1
    assert wire.resident_bytes(block) == bytes(block.data)
    wire.end(request)
    return failures


async def test_a_far_slow_wire_that_stalls() -> None:
    weather = Weather(delay_seconds=0.05, rate=50e6, stall_share=0.1, stall_seconds=0.2)
    async with wired() as wire, TcpRelay(wire.direct, weather) as relay:
        for number in range(6):
            assert await deliver(wire, relay, number) == 0
        assert relay.stalls_total > 0
        assert relay.connections_total == 1
        [link] = wire.links()
        assert link.stats.resent_total == 0, "a slow wire is no lossy one"
        assert_all_free_after_eviction(wire.pool)


async def test_cuts_in_the_middle_of_chunks() -> None:
    draw = random.Random(3)
    async with wired() as wire, TcpRelay(wire.direct, Weather(delay_seconds=0.002)) as relay:
        for number in range(CUTS):
            cut = relay.cut_after(draw.randrange(1, BLOCK_BYTES))
            assert await deliver(wire, relay, number) == 0, "the connection was to be made anew, and the block to go on"
            assert cut.is_set()
        assert relay.cuts_total == CUTS
        [link] = wire.links()
        await until(lambda: link.idle)
        assert link.outstanding_bytes == 0
        assert link.greetings_total > CUTS // 2
        assert wire.shipper.resent.keys() <= {"RECONNECT", "LOST", "NO_OFFER"}
        assert len(wire.committed) == CUTS
        assert_all_free_after_eviction(wire.pool)


async def test_a_wire_that_stops_for_longer_than_the_sender_waits() -> None:
    async with wired(seconds=0.4) as wire, TcpRelay(wire.direct) as relay:
        held = relay.hold_after(BLOCK_BYTES // 2)
        block = make_block(1)
        request = wire.expect(block)
        with pytest.raises(LinkBrokenError, match=r"no progress of a transfer within 0\.4 s"):
            await wire.shipper.ship(block, wire.reservation(request), KvEndpoint(zmq_address=relay.address))
        assert held.is_set()
        assert wire.committed == []
        relay.go_on()
        wire.end(request)
        assert await deliver(wire, relay, 2) == 0
        assert_all_free_after_eviction(wire.pool)
