"""A link and a receiver without sockets, threads or clock: messages lie in two queues until a test moves them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from decode_worker.receiving.receiver import Receiver
from decode_worker.request import Fetch, Request
from drystone.v1.operations_pb2 import PairDirection
from prefill_worker.tiers.block import StoredBlock
from prefill_worker.transfer.link import Link
from prefill_worker.transfer.outgoing import Outgoing, Shipped
from shared.errors import DrystoneError
from shared.internal.v1.common_pb2 import BlockRef
from shared.internal.v1.transfer_pb2 import TransferHeader
from shared.transfer.envelope import MalformedFrameError, seal, unseal
from shared.transfer.pair_stats import PairStats
from tests.support.decode_parts import IDENTITY, make_pool, make_request
from tests.support.fake_workers import compatibility
from tests.support.wire import SENDER, SHAPE, TOKENS, Frames, make_block

KIND = compatibility(layers=SHAPE.layers, kv_heads=SHAPE.kv_heads, head_dim=SHAPE.head_dim)
SECONDS = 30.0
PEER = b"peer"


@cache
def block(number: int) -> StoredBlock:
    """Always the same birth of a block."""
    return make_block(number)


@dataclass(slots=True)
class _Frame:
    buffer: memoryview


class _Loop:
    """An event loop of which it is always the turn."""

    def call_soon_threadsafe(self, function: Any, *arguments: Any) -> None:
        function(*arguments)


class _Door:
    """What a receiver asks of a listener, which is its own socket too; what is sent lies in `back`."""

    transport, address, curve = "zmq-tcp", "tcp://127.0.0.1:1", False

    def __init__(self, back: deque[bytes]) -> None:
        self.socket = self
        self._back = back

    def send_multipart(self, frames: Frames, flags: int) -> None:
        del flags
        self._back.append(frames[-1])

    def name(self, peer: bytes) -> bytes:
        return b"door" + peer


class HandWire:
    """Both ends; `now` is what the link takes for the time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.there: deque[Frames] = deque()
        self.back: deque[bytes] = deque()
        self._door = _Door(self.back)
        self.committed: list[bytes] = []
        self.outcomes: dict[int, Shipped | DrystoneError] = {}
        self.requests: dict[int, Request] = {}
        self.begun: dict[int, Outgoing] = {}
        self.pool = make_pool(4 * TOKENS, SHAPE)
        self.receiver = Receiver(
            self.pool.fetches,
            KIND,
            SHAPE,
            view=lambda landing: self.pool.arena.bytes_of(landing.extent),
            committed=self._commit,
        )
        self.receiver._loop = cast("Any", _Loop())
        stats = PairStats("decode-0", "", PairDirection.PAIR_DIRECTION_SEND, "zmq-tcp")
        self.link = Link(SENDER, IDENTITY, KIND, SECONDS, self._send, self.now, stats)

    def _send(self, header: TransferHeader, data: memoryview | None) -> None:
        self.there.append([seal(header)] if data is None else [seal(header), bytes(data)])

    def _commit(self, fetch: Fetch, size: int) -> None:
        assert size == SHAPE.extent_bytes(len(fetch.token_ids))
        self.committed.append(fetch.key)
        self.pool.commit(fetch)

    def expect(self, number: int) -> Request | None:
        """A request that waits for a block, where there is room."""
        wanted = BlockRef(key=block(number).key, token_ids=block(number).token_ids, store=True)
        request = make_request([wanted])
        if self.pool.admit(request, may_move=True) is None:
            return None
        self.requests[number] = request
        return request

    def ship(self, number: int, transfer: int) -> bool:
        """Begins a transfer to whoever waits; False where nobody does."""
        request = self.requests.get(number)
        if request is None or not request.fetches:
            return False
        reservation = self.pool.fetches.reservation(next(iter(request.fetches)))
        outgoing = Outgoing(
            transfer, block(number), reservation, SHAPE, lambda outcome: self.outcomes.__setitem__(transfer, outcome)
        )
        self.begun[transfer] = outgoing
        self.link.begin(outgoing, self.now)
        return True

    def end(self, number: int) -> None:
        """The request leaves, whatever it has got by then."""
        request = self.requests.pop(number)
        for fetch in self.pool.leave(request):
            fetch.restart()
        request.release()

    def receive(self, frames: Frames) -> TransferHeader | None:
        """The receiver takes a message; its answer lies in `back`."""
        given = cast("Any", [_Frame(memoryview(frame)) for frame in frames])
        answer = self.receiver._handle(cast("Any", self._door), PEER, given)
        if answer is not None:
            self.back.append(seal(answer))
        self.receiver._tell_whole()
        return answer

    def hear(self, frame: bytes) -> str:
        """The link takes a message; what it was."""
        try:
            header = unseal(frame)
        except MalformedFrameError as error:
            self.link.garbled(str(error), self.now)
            return str(error)
        self.link.heard(header, self.now)
        return str(header.WhichOneof("message"))

    def settle(self, rounds: int = 400) -> None:
        """From here on nothing is lost: moves everything, and time, until no transfer is left."""
        for _ in range(rounds):
            while self.there or self.back:
                if self.there:
                    self.receive(self.there.popleft())
                if self.back:
                    self.hear(self.back.popleft())
            if self.link.idle:
                return
            self.now += 0.3
            self.link.tick(self.now)
        raise AssertionError("transfers do not end")

    def check(self) -> None:
        """Whatever is resident is right, and nobody has sent more than was granted."""
        window = 16 << 20
        assert self.link.outstanding_bytes <= window
        for found in self.pool.blocks.all():
            number = int.from_bytes(found.key, "big")
            assert self.pool.arena.bytes_of(found.extent).numpy().tobytes() == bytes(block(number).data)

    def close(self) -> None:
        """Ends what is still there."""
        for number in list(self.requests):
            self.end(number)
        self.receiver.close()
