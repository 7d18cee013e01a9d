"""Takes extents over ZeroMQ: every chunk is fenced, measured and verified before its block can be seen.

    senders ══ TCP, Unix-domain ══▶ ROUTER sockets ─▶ kv-receive thread ─▶ landing (lock) ─▶ extent in the arena
                                                             │
                     event loop ◀── call_soon_threadsafe ────┘ the last chunk: the fetch commits

The only copy of KV bytes on this side is from ZeroMQ's frame into the reserved extent (`laying.py`).
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from functools import partial

import torch
import zmq

from decode_worker.fetch import FetchTable
from decode_worker.landing import Landing
from decode_worker.receiving.groups import Groups, PairPort
from decode_worker.receiving.laying import lay
from decode_worker.receiving.listener import Listener
from decode_worker.receiving.pairs import PAIR_WINDOW_BYTES, Pair, Pairs
from decode_worker.request import Fetch
from shared import logs
from shared.enums import enum_name
from shared.internal.v1.common_pb2 import Compatibility, Reservation
from shared.internal.v1.transfer_pb2 import (
    Chunk,
    ChunkResult,
    Committed,
    Hello,
    Offer,
    Ping,
    Pong,
    RefusalReason,
    Refused,
    TransferHeader,
    Welcome,
)
from shared.kv.birth import CHUNK_BYTES, chunk_identity
from shared.kv.layout import KvShape
from shared.transfer.choice import ZEROMQ_ALONE, End
from shared.transfer.compatibility import difference
from shared.transfer.curve import ServerSecurity
from shared.transfer.envelope import MalformedFrameError, seal, unseal
from shared.transfer.reactor import Reactor

# Extents whose last chunk came lately: a sender that did not hear of it is told again.
_REMEMBERED = 4096
_SILENT_SECONDS = 600.0
_CHUNK_FRAMES = 2
_R = RefusalReason
_TAKEN = _R.REFUSAL_REASON_UNSPECIFIED
Refusal = tuple[RefusalReason.ValueType, str]


class Receiver:
    """The receiving end of every pair of this worker.

    Args:
        fetches: Open fetches; owned by the engine's event loop.
        compatibility: What this worker's KV is.
        shape: Of one token's KV.
        view: Bytes of an extent, uint8; called with the landing's lock held.
        committed: Told on the event loop of each fetch whose extent is whole, with the bytes received.
        budget_bytes: What all senders together may have sent that is not in its place yet.
        on_refused: Told on the thread why each message was refused.
        security: Says who may connect to listeners that have it too.
        end: What the way of each pair is chosen by.

    Attributes:
        received_bytes: Of committed extents.
        refused: Messages refused, by reason.
    """

    def __init__(
        self,
        fetches: FetchTable,
        compatibility: Compatibility,
        shape: KvShape,
        view: Callable[[Landing], torch.Tensor],
        committed: Callable[[Fetch, int], None],
        budget_bytes: int = 16 * PAIR_WINDOW_BYTES,
        on_refused: Callable[[str], None] = lambda _reason: None,
        security: ServerSecurity | None = None,
        end: End = ZEROMQ_ALONE,
    ) -> None:
        self._fetches = fetches
        self._compatibility = compatibility
        self._shape = shape
        self._view = view
        self._committed = committed
        self._on_refused = on_refused
        self.pairs = Pairs(budget_bytes)
        self._done: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._reactor = Reactor("kv-receive", self._tick)
        self.groups = Groups(end, self._reactor)
        self._listeners: list[Listener] = []
        self._security = security
        if security is not None:
            security.attach(self._reactor)
        self._loop: asyncio.AbstractEventLoop | None = None
        # Fetches whose extents are whole, and the bytes received, until the loop is told.
        self._untold: deque[tuple[Fetch, int]] = deque()
        self._log = logs.get("receiver")
        self.received_bytes = 0
        self.refused: Counter[str] = Counter()

    @property
    def refused_total(self) -> int:
        """Messages refused since the start."""
        return self.refused.total()

    @property
    def denied_total(self) -> int:
        """Connections that were not let in since the start."""
        return 0 if self._security is None else self._security.denied_total

    def listen(self, listener: Listener) -> None:
        """Takes messages of a bound socket, once started."""
        self._listeners.append(listener)

    @property
    def context(self) -> zmq.Context[zmq.Socket[bytes]]:
        """The context that listeners' sockets are made in."""
        return self._reactor.context

    def start(self) -> None:
        """Begins to take messages; commits are told to the loop that runs now."""
        self._loop = asyncio.get_running_loop()
        for listener in self._listeners:
            self._reactor.register(listener.socket, partial(self._read, listener))
            if self._security is not None and listener.curve:
                told = partial(self._security.handshake, address=listener.address)
                self._reactor.watch(listener.socket, told)
        self._reactor.start()

    def close(self) -> None:
        """Ends the thread and closes the sockets; what is under way is lost and will be fenced."""
        self._reactor.stop()
        self.groups.close()
        for listener in self._listeners:
            listener.close()

    # On the thread.

    def _tick(self, now: float) -> float:
        self.pairs.forget_silent(_SILENT_SECONDS)
        return min(_SILENT_SECONDS / 10, self.groups.tick(now, self.pairs))

    def _read(self, listener: Listener) -> bool:
        try:
            peer, *frames = listener.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        reply = self._handle(listener, peer.bytes, frames)
        if reply is not None:
            self._send(listener, peer.bytes, reply)
        self._tell_whole()
        return True

    def _send(self, listener: Listener, peer: bytes, header: TransferHeader) -> None:
        try:
            listener.socket.send_multipart([peer, seal(header)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # The peer is gone, or does not read its answers; its reservation ends by deadline or by a new epoch.
            self.pairs.forget(listener.name(peer))
            self._log.info("peer_gone", error=str(error))

    def _handle(self, listener: Listener, peer: bytes, frames: list[zmq.Frame]) -> TransferHeader | None:
        try:
            header = unseal(frames[0].buffer)
        except (MalformedFrameError, IndexError) as error:
            return self._refuse(_R.REFUSAL_REASON_MALFORMED, str(error))
        kind = header.WhichOneof("message")
        if kind == "hello":
            return self._hello(listener, peer, header.hello)
        pair = self.pairs.heard(listener.name(peer))
        if pair is None:
            return self._refuse(_R.REFUSAL_REASON_NO_HELLO, "say Hello first")
        if kind in ("group_ask", "group_end") or header.chunk.group:
            return self._of_group(listener, peer, pair, header)
        reply: TransferHeader | None = None
        match kind:
            case "chunk":
                reply = self._chunk(pair, header.chunk, frames[1].buffer if len(frames) == _CHUNK_FRAMES else None)
            case "offer":
                reply = self._offer(pair, header.offer)
            case "ping":
                reply = None if self.groups.hold(pair.peer, header.ping) else self._ping(pair, header.ping)
            case "abort":
                self._log.info("transfer_aborted", sender=pair.stats.peer, reason=header.abort.reason[:200])
        return reply

    def _hello(self, listener: Listener, peer: bytes, hello: Hello) -> TransferHeader:
        if hello.receiver.incarnation != self._fetches.identity.incarnation:
            return self._refuse(_R.REFUSAL_REASON_STALE_INCARNATION, "meant for another life of this worker")
        differing = difference(self._compatibility, hello.compatibility)
        if differing is not None:
            field, message = differing
            self._log.warning("incompatible_sender", sender=hello.sender.worker_id[:200], field=field, detail=message)
            return self._refuse(_R.REFUSAL_REASON_INCOMPATIBLE, message, field)
        name = listener.name(peer)
        before = self.pairs.heard(name)
        pair = self.pairs.welcome(name, hello.session, hello.sender, listener.transport, curve=listener.curve)
        if pair is not before:
            self.groups.forget(name)
            pair.backend = self.groups.choice(hello.end)
        return TransferHeader(
            welcome=Welcome(
                receiver=self._fetches.identity,
                credit_limit=pair.credit_limit,
                max_chunk_bytes=CHUNK_BYTES,
                session=hello.session,
                group_backend=pair.backend or "",
            )
        )

    def _ping(self, pair: Pair, ping: Ping) -> TransferHeader:
        pair.saw(ping.sent_bytes)
        return TransferHeader(pong=Pong(nonce=ping.nonce, credit_limit=self.pairs.granted(pair)))

    def _offer(self, pair: Pair, offer: Offer) -> TransferHeader | None:
        landing = self._landing(offer.reservation)
        if not isinstance(landing, Landing):
            refusal: Refusal | None = (landing, "no such reservation in this epoch")
        else:
            with landing.lock:
                stale = landing.stale(offer.reservation, offer.key)
                if stale is None and landing.whole and landing.birth_id == offer.birth.birth_id:
                    return self._whole(pair, offer.transfer_id, already=True)
                refusal = (stale, "no such reservation in this epoch") if stale else landing.offer(offer.birth)
        if refusal is None:
            return None
        if self._remembered(offer.reservation, offer.birth.birth_id):
            return self._whole(pair, offer.transfer_id, already=True)
        reason, message = refusal
        self._count(pair, reason, message)
        refused = Refused(
            transfer_id=offer.transfer_id, reason=reason, message=message, credit_limit=self.pairs.granted(pair)
        )
        return TransferHeader(refused=refused)

    def _of_group(self, listener: Listener, peer: bytes, pair: Pair, header: TransferHeader) -> TransferHeader | None:
        if header.HasField("chunk"):
            return None if self.groups.expect(pair.peer, header.chunk) else self._lost(pair, header.chunk)
        if header.HasField("group_ask"):
            self.groups.ask(pair.peer, pair.backend, self._port(listener, peer, pair))
        else:
            self.groups.ended(pair.peer, header.group_end.group)
        return None

    def _port(self, listener: Listener, peer: bytes, pair: Pair) -> PairPort:
        """What a process group needs of a pair."""

        def take(chunk: Chunk, data: memoryview) -> None:
            self._send(listener, peer, self._chunk(pair, chunk, data))
            self._tell_whole()

        def failed(reason: str) -> None:
            pair.stats.fallbacks_total += 1
            pair.stats.last_error = f"group: {reason}"
            self._log.warning("group_failed", sender=pair.stats.peer, reason=reason)

        return PairPort(
            take=take,
            lost=lambda chunk: self._send(listener, peer, self._lost(pair, chunk)),
            pong=lambda ping: self._send(listener, peer, self._ping(pair, ping)),
            send=partial(self._send, listener, peer),
            failed=failed,
        )

    def _lost(self, pair: Pair, chunk: Chunk) -> TransferHeader:
        """The group that was to bring a chunk is no more."""
        pair.saw(chunk.sent_bytes)
        return TransferHeader(
            chunk_result=ChunkResult(
                transfer_id=chunk.transfer_id,
                chunk_index=chunk.chunk_index,
                refusal=_R.REFUSAL_REASON_NO_GROUP,
                credit_limit=self.pairs.granted(pair),
            )
        )

    def _chunk(self, pair: Pair, chunk: Chunk, data: memoryview | None) -> TransferHeader:
        if not pair.saw(chunk.sent_bytes):
            reason, message = _R.REFUSAL_REASON_CREDIT, f"{chunk.sent_bytes} bytes sent; limit {pair.credit_limit}"
        else:
            reason, message, whole = self._take(chunk, data)
            if reason == _TAKEN:
                pair.stats.bytes_total += chunk.length
                pair.stats.chunks_total += 1
            if whole or (reason != _TAKEN and self._remembered(chunk.reservation, chunk.birth_id)):
                return self._whole(pair, chunk.transfer_id, already=reason != _TAKEN)
        if reason != _TAKEN:
            self._count(pair, reason, message, chunk.chunk_index)
        return TransferHeader(
            chunk_result=ChunkResult(
                transfer_id=chunk.transfer_id,
                chunk_index=chunk.chunk_index,
                refusal=reason,
                credit_limit=self.pairs.granted(pair),
                message=message,
            )
        )

    def _take(self, chunk: Chunk, data: memoryview | None) -> tuple[RefusalReason.ValueType, str, bool]:
        """Verifies a chunk and lays it down; why not, else `_TAKEN`, and whether the extent is whole with it."""
        landing = self._landing(chunk.reservation)
        if not isinstance(landing, Landing):
            return landing, "no such reservation in this epoch", False
        with landing.lock:
            stale = landing.stale(chunk.reservation, chunk.key)
            if stale is not None:
                return stale, "no such reservation in this epoch", False
            refusal = landing.offer(chunk.birth) if chunk.HasField("birth") else None
            refusal = refusal or landing.misfit(chunk, None if data is None else len(data))
            if refusal is not None or data is None:
                return *(refusal or (_R.REFUSAL_REASON_SHAPE, "no data")), False
            planned = landing.plan()[chunk.chunk_index]
            identity = chunk_identity(landing.key, landing.birth_id, self._shape, landing.tokens, planned)
            if lay(self._view(landing), planned.offset, data, identity) != chunk.checksum:
                return _R.REFUSAL_REASON_CHECKSUM, "checksum does not match", False
            landing.took(planned)
            whole, size = landing.whole, landing.received_bytes
        if whole:
            self._complete(chunk.reservation, chunk.birth_id, size)
        return _TAKEN, "", whole

    def _complete(self, reservation: Reservation, birth_id: bytes, size: int) -> None:
        self.received_bytes += size
        self._done[(reservation.reservation_id, reservation.epoch)] = bytes(birth_id)
        while len(self._done) > _REMEMBERED:
            self._done.popitem(last=False)
        fetch = self._fetches.named(reservation.reservation_id)
        if fetch is not None:
            self._untold.append((fetch, size))

    def _tell_whole(self) -> None:
        """After the answer has left: the loop, once awake, takes turns with this thread."""
        while self._untold and self._loop is not None:
            self._loop.call_soon_threadsafe(self._commit, *self._untold[0])
            self._untold.popleft()

    def _commit(self, fetch: Fetch, size: int) -> None:
        """On the event loop. Whoever waited may have left, and the extent with them."""
        if not fetch.landing.closed:
            self._committed(fetch, size)

    def _remembered(self, reservation: Reservation, birth_id: bytes) -> bool:
        if reservation.worker.incarnation != self._fetches.identity.incarnation:
            return False
        return self._done.get((reservation.reservation_id, reservation.epoch)) == birth_id

    def _whole(self, pair: Pair, transfer_id: int, *, already: bool) -> TransferHeader:
        limit = self.pairs.granted(pair)
        return TransferHeader(committed=Committed(transfer_id=transfer_id, already=already, credit_limit=limit))

    def _landing(self, reservation: Reservation) -> Landing | RefusalReason.ValueType:
        if reservation.worker.incarnation != self._fetches.identity.incarnation:
            return _R.REFUSAL_REASON_STALE_INCARNATION
        fetch = self._fetches.named(reservation.reservation_id)
        return _R.REFUSAL_REASON_UNKNOWN_RESERVATION if fetch is None else fetch.landing

    def _count(self, pair: Pair, reason: RefusalReason.ValueType, message: str, chunk: int | None = None) -> None:
        name = _name(reason)
        pair.stats.refused_total += 1
        pair.stats.last_error = f"{name}: {message}"
        self.refused[name] += 1
        self._on_refused(name.lower())
        self._log.warning("refused", reason=name, detail=message, chunk=chunk, sender=pair.stats.peer)

    def _refuse(self, reason: RefusalReason.ValueType, message: str, field: str = "") -> TransferHeader:
        """Refuses a whole pair, or a message that cannot be read."""
        self.refused[_name(reason)] += 1
        self._on_refused(_name(reason).lower())
        return TransferHeader(refused=Refused(reason=reason, message=message, field=field))


def _name(reason: RefusalReason.ValueType) -> str:
    return enum_name(RefusalReason, reason).removeprefix("REFUSAL_REASON_")
