"""A pair's two ends over real sockets, with a relay between them that does what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import torch
import zmq
import zmq.asyncio

from decode_worker.pool import Pool
from decode_worker.receiving.listener import Listener
from decode_worker.receiving.receiver import Receiver
from decode_worker.request import Fetch, Request
from prefill_worker.tiers.block import StoredBlock
from prefill_worker.transfer.link import Link
from prefill_worker.transfer.outgoing import Shipped
from prefill_worker.transfer.shipper import Shipper
from prefill_worker.transfer.source import Source
from shared.internal.v1.common_pb2 import BlockRef, Compatibility, KvEndpoint, Reservation, WorkerIdentity
from shared.internal.v1.transfer_pb2 import TransferHeader
from shared.kv.birth import make_birth
from shared.kv.layout import KvShape
from shared.runtime import cancelled
from shared.transfer.choice import Setting, own_end
from shared.transfer.envelope import MalformedFrameError, unseal
from shared.transfer.raw import raw_bytes
from tests.support.decode_parts import make_pool, make_request
from tests.support.fake_workers import compatibility

# A layer of 1,200 tokens is 1.2 MiB: an extent is four chunks.
SHAPE = KvShape(layers=4, kv_heads=4, head_dim=32, dtype="float32")
TOKENS = 1200
CHUNKS = 4
SENDER = WorkerIdentity(worker_id="prefill-0", incarnation=5)

Frames = list[bytes]
# What becomes of one message: the messages that go on instead of it.
Fault = Callable[[TransferHeader | None, Frames], list[Frames]]


def untouched(header: TransferHeader | None, frames: Frames) -> list[Frames]:
    del header
    return [frames]


def flipped(frame: bytes, bit: int = 12345) -> bytes:
    """A frame with one bit wrong."""
    raw = bytearray(frame)
    raw[bit // 8 % len(raw)] ^= 1 << bit % 8
    return bytes(raw)


class Relay:
    """Stands between senders and one receiver; every sender gets a connection of its own to the receiver."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._context = zmq.asyncio.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.setsockopt(zmq.LINGER, 0)
        self._front.bind("tcp://127.0.0.1:0")
        self.address = self._front.getsockopt_string(zmq.LAST_ENDPOINT)
        self._backs: dict[bytes, zmq.asyncio.Socket] = {}
        self._tasks = [asyncio.create_task(self._forward())]
        # Seconds that the next message waits, and all behind it.
        self.pause = 0.0
        self.there: Fault = untouched
        self.back: Fault = untouched

    @property
    def pairs(self) -> int:
        """Senders that have connected so far."""
        return len(self._backs)

    async def _forward(self) -> None:
        while True:
            identity, *frames = await self._front.recv_multipart()
            if identity not in self._backs:
                self._connect(identity)
            pause, self.pause = self.pause, 0.0
            await asyncio.sleep(pause)
            for message in self.there(_header(frames), frames):
                await self._backs[identity].send_multipart(message)

    def _connect(self, identity: bytes) -> None:
        back = self._backs[identity] = self._context.socket(zmq.DEALER)
        back.setsockopt(zmq.LINGER, 0)
        back.connect(self._target)
        self._tasks.append(asyncio.create_task(self._return(identity, back)))

    async def _return(self, identity: bytes, back: zmq.asyncio.Socket) -> None:
        while True:
            frames = await back.recv_multipart()
            for message in self.back(_header(frames), frames):
                await self._front.send_multipart([identity, *message])

    async def reconnect(self) -> None:
        """Breaks every connection to the receiver and makes it anew, as a network that failed for a moment."""
        while len(self._tasks) > 1:
            await cancelled(self._tasks.pop())
        for identity, back in list(self._backs.items()):
            back.close(0)
            self._connect(identity)

    async def close(self) -> None:
        for task in self._tasks:
            await cancelled(task)
        for socket in (self._front, *self._backs.values()):
            socket.close(0)
        self._context.term()


def _header(frames: Frames) -> TransferHeader | None:
    try:
        return unseal(frames[0])
    except MalformedFrameError:
        return None


async def told(receiver: Receiver) -> None:
    """Waits until the receiver's loop knows of every commit that was answered."""
    async with asyncio.timeout(10.0):
        while receiver._untold:  # noqa: ASYNC110 - the receiving thread tells nobody else
            await asyncio.sleep(0.001)
    await asyncio.sleep(0)


class PatientShipper(Shipper):
    """Ends a transfer when the other end's loop knows of it too, so that tests may look at once."""

    receiver: Receiver

    async def ship(self, source: Source, reservation: Reservation, endpoint: KvEndpoint) -> Shipped:
        shipped = await super().ship(source, reservation, endpoint)
        await told(self.receiver)
        return shipped


class Wire:
    """A pool with a receiver, a shipper, and the relay between them."""

    def __init__(
        self, receiver_is: Compatibility, sender_is: Compatibility, timeout: float, kv_transport: Setting = "zmq"
    ) -> None:
        end = own_end(kv_transport, "cpu")
        self.pool: Pool = make_pool(8 * TOKENS, SHAPE)
        self.committed: list[bytes] = []
        self.receiver = Receiver(
            self.pool.fetches,
            receiver_is,
            SHAPE,
            view=lambda landing: self.pool.arena.bytes_of(landing.extent),
            committed=self._commit,
            end=end,
        )
        listener = Listener(self.receiver.context, SHAPE, "tcp://127.0.0.1:0")
        self.receiver.listen(listener)
        self.direct = listener.address
        self.relay = Relay(self.direct)
        self.shipper = PatientShipper(SENDER, sender_is, SHAPE, timeout, end=end)
        self.shipper.receiver = self.receiver
        self.receiver.start()

    def _commit(self, fetch: Fetch, size: int) -> None:
        assert size == SHAPE.extent_bytes(len(fetch.token_ids))
        self.committed.append(fetch.key)
        self.pool.commit(fetch)

    def expect(self, block: StoredBlock) -> Request:
        """A request that waits for this block."""
        request = make_request([BlockRef(key=block.key, token_ids=block.token_ids, store=True)])
        assert self.pool.admit(request, may_move=True) is not None
        return request

    def reservation(self, request: Request) -> Reservation:
        [fetch] = request.fetches
        return self.pool.fetches.reservation(fetch)

    async def ship(self, block: StoredBlock, reservation: Reservation) -> Shipped:
        return await self.shipper.ship(block, reservation, KvEndpoint(zmq_address=self.relay.address))

    def end(self, request: Request) -> None:
        """The request ends, whatever it has got by then."""
        for fetch in self.pool.leave(request):
            fetch.restart()
        request.release()

    def resident_bytes(self, block: StoredBlock) -> bytes:
        [found] = [one for one in self.pool.blocks.all() if one.key == block.key]
        return self.pool.arena.bytes_of(found.extent).numpy().tobytes()

    def links(self) -> list[Link]:
        return self.shipper.links()

    async def close(self) -> None:
        await self.shipper.close()
        await self.relay.close()
        assert self.receiver._reactor.defects_total == self.shipper._reactor.defects_total == 0
        self.receiver.close()


@contextlib.asynccontextmanager
async def wired(seconds: float = 10.0, kv_transport: Setting = "zmq", **differing: object) -> AsyncIterator[Wire]:
    """Both ends, the sender patient for so long; `differing` are fields in which the sender's KV is of another kind."""
    shape = {"layers": SHAPE.layers, "kv_heads": SHAPE.kv_heads, "head_dim": SHAPE.head_dim}
    wire = Wire(compatibility(**shape), compatibility(**{**shape, **differing}), seconds, kv_transport)
    try:
        yield wire
    finally:
        await wire.close()


def make_block(number: int, tokens: int = TOKENS) -> StoredBlock:
    """A block of random bytes, born now: another call with the same number is another birth."""
    generator = torch.Generator().manual_seed(number)
    extent = torch.randn(SHAPE.layers, tokens, 2, SHAPE.kv_heads, SHAPE.head_dim, generator=generator)
    key = number.to_bytes(32, "big")
    birth = make_birth(key, SHAPE, tokens, raw_bytes(extent))
    return StoredBlock(key, tuple(range(tokens)), raw_bytes(extent), birth)
