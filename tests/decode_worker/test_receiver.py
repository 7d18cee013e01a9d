"""Fences of the receiver, one by one, against a sender that says whatever a test wants."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import zmq
import zmq.asyncio

from decode_worker.receiving.pairs import PAIR_WINDOW_BYTES
from decode_worker.request import Request
from prefill_worker.tiers.block import StoredBlock
from shared.internal.v1 import transfer_pb2 as pb
from shared.internal.v1.common_pb2 import Reservation, WorkerIdentity
from shared.kv.birth import CHECKSUM_FUNCTION, CHUNK_BYTES, chunk_plan, make_birth
from shared.transfer.envelope import MAX_HEADER_BYTES, seal, unseal
from tests.support.decode_parts import IDENTITY, assert_all_free_after_eviction
from tests.support.fake_workers import compatibility
from tests.support.wire import SENDER, SHAPE, TOKENS, Wire, make_block, told, wired

OURS = {"layers": SHAPE.layers, "kv_heads": SHAPE.kv_heads, "head_dim": SHAPE.head_dim}


class Peer:
    """A DEALER socket that speaks the protocol by hand."""

    def __init__(self, context: zmq.asyncio.Context, wire: Wire) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(wire.direct)

    async def send(self, *frames: bytes) -> None:
        await self._socket.send_multipart(list(frames))

    async def receive(self) -> pb.TransferHeader:
        async with asyncio.timeout(5.0):
            return unseal(await self._socket.recv())

    async def ask(self, data: bytes | None = None, **message: Any) -> pb.TransferHeader:
        await self.send(seal(pb.TransferHeader(**message)), *([] if data is None else [data]))
        return await self.receive()

    async def greet(self) -> None:
        hello = pb.Hello(sender=SENDER, receiver=IDENTITY, compatibility=compatibility(**OURS))
        assert (await self.ask(hello=hello)).HasField("welcome")

    async def is_heard(self) -> None:
        """The receiver lives and says so; whatever was sent before has been dealt with."""
        assert (await self.ask(ping=pb.Ping(nonce=5))).pong.nonce == 5

    def close(self) -> None:
        self._socket.close(0)


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    async with wired() as both:
        yield both


@pytest.fixture
async def peer(wire: Wire) -> AsyncIterator[Peer]:
    context = zmq.asyncio.Context()
    peer = Peer(context, wire)
    yield peer
    peer.close()
    context.term()


def offer(block: StoredBlock, reservation: Reservation, **birth: Any) -> pb.Offer:
    values = {
        "birth_id": block.birth.birth_id,
        "tokens": TOKENS,
        "bytes": block.bytes,
        "chunk_count": len(block.birth.checksums),
        "checksum_function": CHECKSUM_FUNCTION,
    }
    return pb.Offer(transfer_id=1, reservation=reservation, key=block.key, birth=pb.Birth(**{**values, **birth}))


def chunk(block: StoredBlock, reservation: Reservation, index: int = 0, **changed: Any) -> tuple[bytes, pb.Chunk]:
    planned = chunk_plan(SHAPE, TOKENS)[index]
    values = {
        "transfer_id": 1,
        "reservation": reservation,
        "key": block.key,
        "birth_id": block.birth.birth_id,
        "chunk_index": index,
        "first_layer": planned.first_layer,
        "layer_count": planned.layer_count,
        "offset": planned.offset,
        "length": planned.length,
        "checksum": block.birth.checksums[index],
    }
    data = bytes(block.data[planned.offset : planned.offset + planned.length])
    return data, pb.Chunk(**{**values, **changed})


async def refusal(peer: Peer, block: StoredBlock, reservation: Reservation, **changed: Any) -> str:
    data, message = chunk(block, reservation, **changed)
    answer = await peer.ask(data, chunk=message)
    assert answer.HasField("chunk_result")
    assert answer.chunk_result.credit_limit == PAIR_WINDOW_BYTES
    return pb.RefusalReason.Name(answer.chunk_result.refusal).removeprefix("REFUSAL_REASON_")


@pytest.fixture
def block() -> StoredBlock:
    return make_block(1)


@pytest.fixture
async def offered(wire: Wire, peer: Peer, block: StoredBlock) -> AsyncIterator[Request]:
    """A request that waits for the block, which a welcome peer has offered."""
    request = wire.expect(block)
    await peer.greet()
    await peer.send(seal(pb.TransferHeader(offer=offer(block, wire.reservation(request)))))
    await peer.is_heard()
    yield request
    wire.end(request)
    assert_all_free_after_eviction(wire.pool)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protocol_version", 99),
        ("model_fingerprint", b"x" * 32),
        ("dtype", "bfloat16"),
        ("layout_version", 9),
        ("rope_regime", b"y" * 32),
        ("layers", 5),
        ("kv_heads", 1),
        ("head_dim", 64),
    ],
)
async def test_another_kind_of_kv_is_refused_by_name(peer: Peer, field: str, value: object) -> None:
    theirs = compatibility(**{**OURS, field: value})
    answer = await peer.ask(hello=pb.Hello(sender=SENDER, receiver=IDENTITY, compatibility=theirs))
    assert answer.refused.reason == pb.RefusalReason.REFUSAL_REASON_INCOMPATIBLE
    assert answer.refused.field == field
    assert answer.refused.message.startswith(f"{field} differs: receiver has ")


async def test_another_life_is_refused(peer: Peer) -> None:
    old = WorkerIdentity(worker_id="decode-0", incarnation=IDENTITY.incarnation - 1)
    answer = await peer.ask(hello=pb.Hello(sender=SENDER, receiver=old, compatibility=compatibility(**OURS)))
    assert answer.refused.reason == pb.RefusalReason.REFUSAL_REASON_STALE_INCARNATION


async def test_nothing_before_hello(wire: Wire, peer: Peer, block: StoredBlock) -> None:
    request = wire.expect(block)
    data, message = chunk(block, wire.reservation(request))
    for answer in (
        await peer.ask(data, chunk=message),
        await peer.ask(offer=offer(block, wire.reservation(request))),
    ):
        assert answer.refused.reason == pb.RefusalReason.REFUSAL_REASON_NO_HELLO
    wire.end(request)


async def test_a_whole_block_by_hand(wire: Wire, peer: Peer, block: StoredBlock, offered: Request) -> None:
    reservation = wire.reservation(offered)
    for index in (2, 0, 3):
        assert await refusal(peer, block, reservation, index=index) == "UNSPECIFIED"
    assert await refusal(peer, block, reservation, index=2) == "REPEATED"
    data, message = chunk(block, reservation, index=1)
    assert (await peer.ask(data, chunk=message)).committed.transfer_id == 1
    await told(wire.receiver)
    assert wire.resident_bytes(block) == bytes(block.data)
    assert (await peer.ask(data, chunk=message)).committed.already
    assert (await peer.ask(offer=offer(block, reservation))).committed.already
    assert await refusal(peer, block, reservation, index=1, birth_id=b"b" * 16) == "UNKNOWN_RESERVATION"


async def test_what_is_not_for_this_reservation(wire: Wire, peer: Peer, block: StoredBlock, offered: Request) -> None:
    good = wire.reservation(offered)

    def changed(**fields: Any) -> Reservation:
        return Reservation(
            **{"worker": good.worker, "reservation_id": good.reservation_id, "epoch": good.epoch, **fields}
        )

    stale = WorkerIdentity(worker_id="decode-0", incarnation=3)
    assert await refusal(peer, block, changed(worker=stale)) == "STALE_INCARNATION"
    assert await refusal(peer, block, changed(epoch=good.epoch - 1)) == "STALE_EPOCH"
    assert await refusal(peer, block, changed(epoch=good.epoch + 1)) == "STALE_EPOCH"
    assert await refusal(peer, block, changed(reservation_id=99)) == "UNKNOWN_RESERVATION"
    assert await refusal(peer, block, good, key=b"z" * 32) == "UNKNOWN_RESERVATION"
    assert await refusal(peer, block, good, birth_id=b"b" * 16) == "BIRTH"
    assert await refusal(peer, block, good) == "UNSPECIFIED"


async def test_what_does_not_fit_the_shape(wire: Wire, peer: Peer, block: StoredBlock, offered: Request) -> None:
    good = wire.reservation(offered)
    for changed in ({"chunk_index": 4}, {"chunk_index": 2**32 - 1}, {"offset": 1}, {"length": 7}, {"chunk_index": 1}):
        assert await refusal(peer, block, good, **changed) == "SHAPE"
    assert await refusal(peer, block, good, checksum=1) == "CHECKSUM"
    other = make_block(2)
    assert await refusal(peer, other, good, key=block.key, birth_id=block.birth.birth_id) == "CHECKSUM"
    assert await refusal(peer, block, good) == "UNSPECIFIED"


@pytest.mark.parametrize(
    "birth", [{"tokens": 599}, {"bytes": 1}, {"chunk_count": 3}, {"checksum_function": "crc32"}], ids=str
)
async def test_an_offer_that_does_not_fit(
    wire: Wire, peer: Peer, block: StoredBlock, offered: Request, birth: dict[str, Any]
) -> None:
    answer = await peer.ask(offer=offer(block, wire.reservation(offered), **birth))
    assert answer.refused.reason == pb.RefusalReason.REFUSAL_REASON_SHAPE
    assert answer.refused.transfer_id == 1


async def test_a_new_birth_starts_again(wire: Wire, peer: Peer, block: StoredBlock, offered: Request) -> None:
    reservation = wire.reservation(offered)
    for index in range(3):
        assert await refusal(peer, block, reservation, index=index) == "UNSPECIFIED"
    reborn = make_block(1)
    assert reborn.birth.birth_id != block.birth.birth_id
    await peer.send(seal(pb.TransferHeader(offer=offer(reborn, reservation))))
    assert await refusal(peer, block, reservation, index=3) == "BIRTH"
    assert wire.committed == []
    for index in range(3):
        assert await refusal(peer, reborn, reservation, index=index) == "UNSPECIFIED"
    data, message = chunk(reborn, reservation, index=3)
    assert (await peer.ask(data, chunk=message)).HasField("committed")
    await told(wire.receiver)


async def test_a_late_offer_of_an_earlier_birth_changes_nothing(
    wire: Wire, peer: Peer, block: StoredBlock, offered: Request
) -> None:
    reservation, reborn = wire.reservation(offered), make_block(1)
    await peer.send(seal(pb.TransferHeader(offer=offer(reborn, reservation))))
    assert await refusal(peer, reborn, reservation, index=0) == "UNSPECIFIED"
    answer = await peer.ask(offer=offer(block, reservation))
    assert answer.refused.reason == pb.RefusalReason.REFUSAL_REASON_BIRTH
    assert await refusal(peer, reborn, reservation, index=0) == "REPEATED"


async def test_a_chunk_that_nobody_offered(wire: Wire, peer: Peer, block: StoredBlock) -> None:
    request = wire.expect(block)
    await peer.greet()
    assert await refusal(peer, block, wire.reservation(request)) == "NO_OFFER"
    wire.end(request)


async def test_more_than_the_credit_is_refused_until_it_is_accounted_for(
    wire: Wire, peer: Peer, block: StoredBlock, offered: Request
) -> None:
    reservation = wire.reservation(offered)
    data, message = chunk(block, reservation, sent_bytes=PAIR_WINDOW_BYTES + 1)
    answer = (await peer.ask(data, chunk=message)).chunk_result
    assert answer.refusal == pb.RefusalReason.REFUSAL_REASON_CREDIT
    assert answer.credit_limit == PAIR_WINDOW_BYTES
    message.sent_bytes = PAIR_WINDOW_BYTES
    answer = (await peer.ask(data, chunk=message)).chunk_result
    assert (answer.refusal, answer.credit_limit) == (0, 2 * PAIR_WINDOW_BYTES)
    assert (
        await peer.ask(ping=pb.Ping(nonce=1, sent_bytes=PAIR_WINDOW_BYTES))
    ).pong.credit_limit == answer.credit_limit


async def test_chunks_while_the_engine_writes_the_extent_are_kept_out(
    wire: Wire, peer: Peer, block: StoredBlock, offered: Request
) -> None:
    reservation = wire.reservation(offered)
    [fetch] = offered.fetches
    assert fetch.landing.seize()
    assert await refusal(peer, block, reservation) == "STALE_EPOCH"
    fetch.landing.release()
    assert await refusal(peer, block, reservation) == "UNSPECIFIED"


async def test_noise_never_stops_the_receiver(peer: Peer) -> None:
    draw = random.Random(3)
    sound = seal(pb.TransferHeader(ping=pb.Ping(nonce=5)))
    for _ in range(200):
        frames = [draw.randbytes(draw.randrange(60)) for _ in range(draw.randrange(1, 4))]
        await peer.send(*frames)
        answer = await peer.receive()
        assert answer.refused.reason == pb.RefusalReason.REFUSAL_REASON_MALFORMED
        damaged = bytearray(sound)
        damaged[draw.randrange(len(sound))] ^= 1 << draw.randrange(8)
        await peer.send(bytes(damaged))
        await peer.receive()
    await peer.greet()
    await peer.send(seal(pb.TransferHeader(abort=pb.Abort(transfer_id=3))))
    await peer.send(seal(pb.TransferHeader(welcome=pb.Welcome())))
    await peer.is_heard()


async def test_a_frame_beyond_the_limit_drops_the_sender_alone(wire: Wire, peer: Peer) -> None:
    await peer.greet()
    context = zmq.asyncio.Context()
    flooding = Peer(context, wire)
    await flooding.send(b"x" * (CHUNK_BYTES + MAX_HEADER_BYTES + 1))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await flooding.receive()
    await peer.is_heard()
    flooding.close()
    context.term()


def test_births_differ_each_time(block: StoredBlock) -> None:
    births = {make_birth(block.key, SHAPE, TOKENS, block.data).birth_id for _ in range(10)}
    assert len(births) == 10
