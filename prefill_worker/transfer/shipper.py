"""Links to decode workers, one for each life of each worker, on one thread.

event loop                          kv-send thread
ship() ── call ──▶ Link.begin ──▶ header + view of the extent (copy=False) ──▶ ZeroMQ
▲                                                                            │ answers
└────── future, call_soon_threadsafe ◀── Outgoing.end ◀── Link.heard ◀───────┘
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import zmq

from drystone.v1.operations_pb2 import PairDirection, PairStatus
from prefill_worker.transfer.errors import LinkBrokenError
from prefill_worker.transfer.group_way import GroupWay
from prefill_worker.transfer.link import IDLE_SECONDS, Link, State, closed
from prefill_worker.transfer.outgoing import Outgoing, Shipped
from prefill_worker.transfer.source import Source
from shared import logs
from shared.errors import DrystoneError
from shared.internal.v1.common_pb2 import Compatibility, KvEndpoint, Reservation, WorkerIdentity
from shared.internal.v1.transfer_pb2 import TransferHeader
from shared.kv.layout import KvShape
from shared.transfer.choice import ZEROMQ_ALONE, End, wanted
from shared.transfer.curve import ClientSecurity, not_let_in
from shared.transfer.endpoints import chosen_address, end_dead_connections, transport_name
from shared.transfer.envelope import MalformedFrameError, seal, unseal
from shared.transfer.handshakes import Handshake
from shared.transfer.pair_stats import PairStats
from shared.transfer.reactor import Reactor

# Handshakes that break off in a row, after which the key is at fault and not the wire: half a second.
_HANDSHAKES = 3
_CONNECT_MILLISECONDS = 3_000
# An address and the life of the worker behind it.
Name = tuple[str, int]


@dataclass(slots=True)
class _Pair:
    """A link and its socket; handshakes that broke off since the last one that did not."""

    link: Link
    socket: zmq.Socket[bytes]
    address: str
    broken_off: int = 0


class Shipper:
    """Owns every link of a prefill worker. `ship` is for one event loop; all else happens on the thread.

    Args:
        identity: This worker.
        compatibility: What its KV is.
        shape: Of one token's KV.
        timeout_seconds: Longest time without progress of a transfer.
        security: Puts keys on sockets; refuses endpoints that may not be sent to.
        on_end: Told on the event loop how each transfer ended, and what one that was committed did.
        end: What the way of each pair is chosen by.
        on_fallback: Told on the thread why a pair's process group failed.

    Attributes:
        shipped_bytes: Of chunks, since the start.
        resent: Chunks sent again, by reason.
        outcomes: Transfers, by how they ended.
        handshakes_failed: Links that failed before a word was said.
        fallbacks: Process groups that failed, by why.
    """

    def __init__(
        self,
        identity: WorkerIdentity,
        compatibility: Compatibility,
        shape: KvShape,
        timeout_seconds: float,
        security: ClientSecurity | None = None,
        on_end: Callable[[str, Shipped | None], None] = lambda _outcome, _shipped: None,
        end: End = ZEROMQ_ALONE,
        on_fallback: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._end = end
        self._on_fallback = on_fallback
        self.fallbacks: Counter[str] = Counter()
        self._identity = identity
        self._compatibility = compatibility
        self._shape = shape
        self._timeout = timeout_seconds
        self._security = security
        self._on_end = on_end
        self._pairs: dict[Name, _Pair] = {}
        self._numbers = itertools.count(1)
        self._reactor = Reactor("kv-send", self._tick)
        self._open = False
        self._log = logs.get("shipper")
        self.shipped_bytes = self.handshakes_failed = 0
        self.resent: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()

    @property
    def resent_total(self) -> int:
        """Chunks sent again since the start."""
        return self.resent.total()

    async def ship(self, source: Source, reservation: Reservation, endpoint: KvEndpoint) -> Shipped:
        """Sends an extent, as far as it is made and as it grows, and waits until the receiver has verified it.

        Raises:
            LinkBrokenError: The pair made no progress; the next transfer makes a new link.
            SourceLostError: The encoding failed; nothing of it is visible anywhere.
            DrystoneError: The receiver refused this block, or this worker.
        """
        if not self._open:
            self._open = True
            self._reactor.start()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Shipped] = loop.create_future()

        def ended(outcome: Shipped | DrystoneError) -> None:
            loop.call_soon_threadsafe(_settle, done, outcome)

        transfer = Outgoing(next(self._numbers), source, reservation, self._shape, ended)
        begun: list[_Pair] = []
        self._reactor.call(lambda: self._begin(transfer, endpoint, begun))
        forget = source.subscribe(lambda: self._reactor.call(lambda: self._pump(begun)))
        try:
            shipped = await done
        except DrystoneError as error:
            self._count(error.metadata.get("refusal", error.reason).lower(), None)
            raise
        finally:
            forget()
            if not done.done() or done.cancelled():
                self._count("cancelled", None)
                self._reactor.call(lambda: _cancel(begun, transfer))
        self.shipped_bytes += shipped.bytes
        self.resent.update(shipped.resent)
        self._count("committed", shipped)
        return shipped

    def _count(self, outcome: str, shipped: Shipped | None) -> None:
        self.outcomes[outcome] += 1
        self._on_end(outcome, shipped)

    def links(self) -> list[Link]:
        """Every link, for those who look on."""
        return [pair.link for pair in list(self._pairs.values())]

    def pairs(self) -> list[PairStatus]:
        """What status shows of each link."""
        return [link.look().snapshot() for link in self.links()]

    async def close(self) -> None:
        """Closes every link; what is under way ends with LinkBrokenError."""
        if self._open:
            self._reactor.call(self._break_all)
        await asyncio.to_thread(self._reactor.stop)

    # On the thread.

    def _begin(self, transfer: Outgoing, endpoint: KvEndpoint, begun: list[_Pair]) -> None:
        try:
            pair = self._pair(endpoint, transfer.reservation.worker)
        except DrystoneError as error:
            transfer.end(error)
        else:
            begun.append(pair)
            pair.link.begin(transfer, time.monotonic())

    def _pump(self, begun: list[_Pair]) -> None:
        for pair in begun:
            pair.link.pump(time.monotonic())

    def _pair(self, endpoint: KvEndpoint, receiver: WorkerIdentity) -> _Pair:
        address = chosen_address(endpoint)
        name = (address, receiver.incarnation)
        if self._security is not None:  # for a link that is open too: who was allowed then may not be so now
            self._security.check(address, endpoint.curve_public_key)
        pair = self._pairs.get(name)
        if pair is None or pair.link.state is State.BROKEN:
            self._let_go(name)
            # Links to earlier lives of a worker would reconnect to the new one for ever.
            for other in [one for one in self._pairs if one[0] == address]:
                self._let_go(other)
            pair = self._pairs[name] = self._connect(address, endpoint, receiver)
        return pair

    def _connect(self, address: str, endpoint: KvEndpoint, receiver: WorkerIdentity) -> _Pair:
        socket = self._reactor.context.socket(zmq.DEALER)
        try:
            socket.setsockopt(zmq.LINGER, 0)
            # What waits in the socket is bounded by credit, in bytes; a count of messages would bound nothing.
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2_000)
            socket.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MILLISECONDS)
            end_dead_connections(socket)
            if self._security is not None:
                self._security.apply(socket, address, endpoint.curve_public_key)
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.close(0)
            raise LinkBrokenError(f"cannot connect to {address[:200]!r}: {error}") from error
        except DrystoneError:
            socket.close(0)
            raise
        stats = PairStats(
            receiver.worker_id,
            address,
            PairDirection.PAIR_DIRECTION_SEND,
            transport_name(address),
            curve=bool(socket.getsockopt(zmq.MECHANISM) == zmq.CURVE),
        )
        way = None
        if wanted(self._end) is not None:
            way = GroupWay(self._end, self._reactor, partial(_send, socket, data=None), stats, self._fell_back)
        send = partial(_send, socket)
        link = Link(self._identity, receiver, self._compatibility, self._timeout, send, time.monotonic(), stats, way)
        pair = _Pair(link, socket, address)
        self._reactor.register(socket, partial(self._read, pair))
        self._reactor.watch(socket, partial(self._handshake, pair))
        return pair

    def _fell_back(self, reason: str) -> None:
        self.fallbacks[reason] += 1
        self._on_fallback(reason)

    def _handshake(self, pair: _Pair, ended: Handshake) -> None:
        if ended is Handshake.DONE:
            pair.broken_off = 0
            return
        if ended is Handshake.BROKEN_OFF:
            pair.broken_off += 1
            # In the clear there is no key that could be wrong: the wire is at fault, and has the link's own time.
            if not pair.link.stats.curve or pair.broken_off < _HANDSHAKES:
                return
        self.handshakes_failed += 1
        pair.link.break_off(not_let_in(pair.link.receiver.worker_id, ended))

    def _read(self, pair: _Pair) -> bool:
        try:
            frame = pair.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return False
        now = time.monotonic()
        try:
            header = unseal(frame)
        except MalformedFrameError as error:
            self._log.warning("malformed_reply", receiver=pair.link.receiver.worker_id, detail=str(error))
            pair.link.garbled(str(error), now)
            return True
        pair.link.heard(header, now)
        return True

    def _tick(self, now: float) -> float:
        wait = IDLE_SECONDS
        for name, pair in list(self._pairs.items()):
            wait = min(wait, pair.link.tick(now))
            if pair.link.state is State.BROKEN:
                self._log.warning("link_broken", receiver=pair.link.receiver.worker_id, detail=str(pair.link.failure))
                self._let_go(name)
            elif pair.link.idle_seconds(now) > IDLE_SECONDS:
                self._let_go(name)
        return wait

    def _let_go(self, name: Name) -> None:
        pair = self._pairs.pop(name, None)
        if pair is not None:
            pair.link.break_off(closed())
            self._reactor.forget(pair.socket)

    def _break_all(self) -> None:
        for name in list(self._pairs):
            self._let_go(name)


def _cancel(begun: list[_Pair], transfer: Outgoing) -> None:
    for pair in begun:
        pair.link.cancel(transfer, "cancelled")


def _send(socket: zmq.Socket[bytes], header: TransferHeader, data: memoryview | None) -> None:
    if data is None:
        socket.send(seal(header), zmq.NOBLOCK)
        return
    socket.send(seal(header), zmq.NOBLOCK | zmq.SNDMORE)
    socket.send(data, zmq.NOBLOCK, copy=False)


def _settle(done: asyncio.Future[Shipped], outcome: Shipped | DrystoneError) -> None:
    if done.done():
        return
    if isinstance(outcome, DrystoneError):
        done.set_exception(outcome)
    else:
        done.set_result(outcome)
