"""SIGKILL and SIGSTOP of either end while a chunk is half on the wire, between real processes.

The wire is held at a byte in the middle of a block until the signal is out, so every one of them strikes mid-chunk. The
end that is left ends its transfer with a reason and in time, frees everything, and gets the next block across.
"""

from __future__ import annotations

import asyncio
import os
import random
import time

import pytest

from prefill_worker.transfer.errors import LinkBrokenError
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import Reservation
from tests.support.ends import ReceivingEnd, Remote, SendingEnd, digest_of, receive, remote, send
from tests.support.stacks import until
from tests.support.tcp_relay import TcpRelay
from tests.support.wire import CHUNKS, SHAPE, TOKENS

# In `make proof`: 100.
TIMES = int(os.environ.get("DRYSTONE_KILLS", "2"))
BLOCK_BYTES = SHAPE.extent_bytes(TOKENS)
# The sender's patience. Ends must come within it and the time of a busy machine.
TIMEOUT = 0.5
IN_TIME = TIMEOUT + 5.0

pytestmark = pytest.mark.timeout(300 + 10 * TIMES)


def midway(draw: random.Random) -> int:
    """A count of bytes at which some chunk is half through."""
    chunk, margin = BLOCK_BYTES // CHUNKS, 4096
    return draw.randrange(CHUNKS) * chunk + draw.randrange(margin, chunk - margin)


def told(reservation: str) -> Reservation:
    return Reservation.FromString(bytes.fromhex(reservation))


async def ended(shipping: asyncio.Task[object], began: float) -> DrystoneError | None:
    """How a transfer ended; it must have done so in time."""
    [outcome] = await asyncio.gather(asyncio.wait_for(shipping, IN_TIME), return_exceptions=True)
    assert time.monotonic() - began < IN_TIME
    if not isinstance(outcome, BaseException):
        return None
    if not isinstance(outcome, DrystoneError):
        raise outcome
    assert outcome.message
    return outcome


async def arrives(sender: SendingEnd, receiver: Remote, relay: TcpRelay, number: int) -> None:
    """A block gets across, byte for byte; then the receiver is empty."""
    reservation = await receiver.ask("expect", number=number)
    await sender.ship(number, told(reservation), relay.address)
    await settled(receiver, number)


async def settled(receiver: Remote, number: int) -> None:
    """A block that was said to be whole is resident, with its bytes, and everything can be freed."""
    while await receiver.ask("taken", number=number) != -1:  # noqa: ASYNC110 - asks another process
        await asyncio.sleep(0.002)
    assert await receiver.ask("digest", number=number) == digest_of(number)
    await receiver.ask("end", number=number)
    assert await receiver.ask("all_free")


async def test_kills_of_the_receiver() -> None:
    """Its successor is there at once, with the same promises by number, or only when the sender has given up."""
    draw = random.Random(11)
    sender = SendingEnd(TIMEOUT)
    async with TcpRelay("") as relay:
        for round_ in range(TIMES):
            first, number = 2 * round_ + 1, 10 * round_ + 1
            async with remote(receive, first, 0) as receiver:
                relay.target = address = await receiver.ready()
                await arrives(sender, receiver, relay, number)
                reservation = await receiver.ask("expect", number=number)
                held = relay.hold_after(midway(draw))
                began = time.monotonic()
                shipping = asyncio.create_task(sender.ship(number, told(reservation), relay.address))
                await held.wait()
                receiver.kill_now()
            relay.go_on()
            late = draw.random() < 0.5
            error = await ended(shipping, began) if late else None
            port = int(address.rpartition(":")[2])
            async with remote(receive, first + 1, port) as successor:
                await successor.ready()
                # The same numbers as the promise that was broken, but for the incarnation.
                await successor.ask("expect", number=number + 1)
                await successor.ask("end", number=number + 1)
                anew = told(await successor.ask("expect", number=number))
                assert (anew.reservation_id, anew.epoch) == (
                    told(reservation).reservation_id,
                    told(reservation).epoch,
                )
                error = error or await ended(shipping, began)
                assert error is not None, "a block was acknowledged that no living worker has"
                assert error.reason is Reason.TRANSFER_FAILED
                assert isinstance(error, LinkBrokenError) or "STALE_INCARNATION" in error.message
                # Nothing of the predecessor's bytes: neither taken nor visible.
                assert await successor.ask("taken", number=number) == 0
                assert await successor.ask("digest", number=number) == 0
                await sender.ship(number, anew, relay.address)
                await settled(successor, number)
                await arrives(sender, successor, relay, number + 2)
    assert all(link.idle for link in sender.shipper.links())
    await sender.close()


async def test_stops_of_the_receiver() -> None:
    """One that goes on in time has its block; one that goes on too late gets the next one."""
    draw = random.Random(12)
    sender = SendingEnd(TIMEOUT)
    outcomes = []
    async with remote(receive, 1, 0) as receiver, TcpRelay(await receiver.ready()) as relay:
        for round_ in range(TIMES):
            number = 10 * round_ + 1
            reservation = await receiver.ask("expect", number=number)
            held = relay.hold_after(midway(draw))
            began = time.monotonic()
            shipping = asyncio.create_task(sender.ship(number, told(reservation), relay.address))
            await held.wait()
            receiver.stop()
            relay.go_on()
            error = None
            if round_ % 2:
                error = await ended(shipping, began)
                assert isinstance(error, LinkBrokenError), "nobody was there to answer"
                assert all(link.idle for link in sender.shipper.links())
            receiver.go_on()
            error = error or await ended(shipping, began)
            outcomes.append(error is None)
            if error is None:
                await settled(receiver, number)
            else:
                # What was on its way may still land in the reservation, which is open; it is whole or it is not.
                await receiver.ask("end", number=number)
                assert await receiver.ask("all_free")
            await arrives(sender, receiver, relay, number + 1)
    assert any(outcomes), "no receiver went on in time"
    assert not all(outcomes), "every receiver went on in time"
    await sender.close()


async def test_kills_of_the_sender() -> None:
    """Nothing of a half block is visible; another sender brings it in a new epoch, or nobody wants it any more."""
    draw = random.Random(13)
    receiver = ReceivingEnd(1)
    async with TcpRelay(receiver.address) as relay:
        for round_ in range(TIMES):
            number = 10 * round_ + 1
            async with remote(send, TIMEOUT) as sender:
                await sender.ready()
                reservation = receiver.expect(number)
                offset = midway(draw)
                held = relay.hold_after(offset)
                shipping = asyncio.create_task(sender.ask("ship", **order(number, reservation, relay)))
                await held.wait()
                sender.kill_now()
                with pytest.raises(EOFError):
                    await shipping
            relay.go_on()
            assert 0 <= receiver.taken(number) < CHUNKS
            assert receiver.digest(number) == 0
            if draw.random() < 0.5:
                receiver.end(number)
                assert receiver.all_free()
                reservation = receiver.expect(number)
            else:
                reservation = receiver.drive_anew(number)
            async with remote(send, 10.0) as successor:
                await successor.ready()
                assert await successor.ask("ship", **order(number, reservation, relay)) == "committed"
            await whole(receiver, number)
    receiver.close()


async def test_stops_of_the_sender() -> None:
    """It goes on where it was; where its block was given up meanwhile, its late bytes touch nobody's memory."""
    draw = random.Random(14)
    receiver = ReceivingEnd(1)
    refused = 0
    async with remote(send, 10.0) as sender, TcpRelay(receiver.address) as relay:
        await sender.ready()
        for round_ in range(TIMES):
            number = 10 * round_ + 1
            reservation = receiver.expect(number)
            held = relay.hold_after(midway(draw))
            shipping = asyncio.create_task(sender.ask("ship", **order(number, reservation, relay)))
            await held.wait()
            sender.stop()
            relay.go_on()
            if round_ % 2:
                # Its memory is freed and promised anew while chunks for it are in the stopped sender's buffers.
                receiver.end(number)
                assert receiver.all_free()
                other = receiver.expect(number + 1)
                sender.go_on()
                outcome = str(await shipping)
                assert Reason.RESERVATION_ENDED in outcome
                refused += 1
                assert receiver.taken(number + 1) == 0
                number += 1
                reservation = other
                assert await sender.ask("ship", **order(number, reservation, relay)) == "committed"
            else:
                sender.go_on()
                assert await shipping == "committed"
            await whole(receiver, number)
    assert refused == TIMES // 2
    assert receiver.receiver.refused.keys() <= {"UNKNOWN_RESERVATION", "STALE_EPOCH"}
    receiver.close()


def order(number: int, reservation: Reservation, relay: TcpRelay) -> dict[str, object]:
    """Arguments of a sending end's `ship`."""
    raw = reservation.SerializeToString().hex()
    return {"number": number, "reservation": raw, "address": relay.address}


async def whole(receiver: ReceivingEnd, number: int) -> None:
    """As `settled`, of a receiver in this process."""
    await until(lambda: receiver.taken(number) == -1)
    assert receiver.digest(number) == digest_of(number)
    receiver.end(number)
    assert receiver.all_free()
