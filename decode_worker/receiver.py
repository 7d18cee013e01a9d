"""Takes extents over ZeroMQ: every chunk is fenced, measured and verified before its block can be seen.

One ROUTER socket on the event loop. The only copy of KV bytes on this side is from ZeroMQ's frame into
the reserved extent; the checksum is computed over the extent, after that copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import zmq
import zmq.asyncio

from decode_worker.fetch import FetchTable
from decode_worker.request import Fetch
from shared import logs
from shared.internal.v1.common_pb2 import Compatibility, Reservation
from shared.internal.v1.transfer_pb2 import (
    Chunk,
    ChunkResult,
    Committed,
    Hello,
    Offer,
    Pong,
    RefusalReason,
    Refused,
    TransferHeader,
    Welcome,
)
from shared.kv.birth import CHECKSUM_FUNCTION, CHUNK_BYTES, chunk_checksum, chunk_plan
from shared.kv.layout import KvShape
from shared.transfer.compatibility import difference
from shared.transfer.envelope import MAX_HEADER_BYTES, MalformedFrameError, seal, unseal
from shared.transfer.raw import raw_bytes

PAIR_CREDIT_BYTES = 16 << 20
_CHUNK_FRAMES = 2
_R = RefusalReason
_TAKEN = _R.REFUSAL_REASON_UNSPECIFIED


class Receiver:
    """The receiving end of every pair of this worker.

    Args:
        fetches: Open fetches; owned by the engine.
        view: Bytes of a fetch's extent, uint8.
        committed: Called when an extent is whole, with the bytes received.
    """

    def __init__(
        self,
        fetches: FetchTable,
        compatibility: Compatibility,
        shape: KvShape,
        view: Callable[[Fetch], torch.Tensor],
        committed: Callable[[Fetch, int], None],
    ) -> None:
        self._fetches = fetches
        self._compatibility = compatibility
        self._shape = shape
        self._view = view
        self._committed = committed
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._welcomed: set[bytes] = set()
        self._log = logs.get("receiver")
        self.received_bytes = self.refused_total = 0

    def bind(self, host: str, port: int) -> str:
        """Binds to one address; returns it as a ZeroMQ endpoint."""
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # Messages queued for one peer: twice its credit in whole chunks, with room for headers.
        self._socket.setsockopt(zmq.RCVHWM, 2 * PAIR_CREDIT_BYTES // CHUNK_BYTES + 64)
        # The largest frame that can be right; ZeroMQ drops a peer that sends more before allocating it.
        self._socket.setsockopt(zmq.MAXMSGSIZE, max(CHUNK_BYTES, self._shape.record_bytes) + MAX_HEADER_BYTES)
        try:
            self._socket.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as error:
            raise OSError(f"cannot receive KV on {host}:{port}: {error}") from error
        return str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))

    def close(self) -> None:
        """Closes the socket; what is under way is lost and will be fenced."""
        self._socket.close(0)
        self._context.term()

    async def run(self) -> None:
        """Takes messages until cancelled."""
        while True:
            identity, *frames = await self._socket.recv_multipart(copy=False)
            reply = self._handle(identity.bytes, frames)
            if reply is not None:
                await self._send(identity.bytes, reply)

    async def _send(self, peer: bytes, header: TransferHeader) -> None:
        try:
            await self._socket.send_multipart([peer, seal(header)])
        except zmq.ZMQError as error:
            # The peer is gone; its reservation ends by deadline or by a new epoch.
            self._welcomed.discard(peer)
            self._log.info("peer_gone", error=str(error))

    def _handle(self, peer: bytes, frames: list[zmq.Frame]) -> TransferHeader | None:
        try:
            header = unseal(frames[0].buffer)
        except (MalformedFrameError, IndexError) as error:
            return self._refuse(0, _R.REFUSAL_REASON_MALFORMED, str(error))
        match header.WhichOneof("message"):
            case "hello":
                reply = self._hello(peer, header.hello)
            case "ping":
                reply = TransferHeader(pong=Pong(nonce=header.ping.nonce))
            case "offer" | "chunk" if peer not in self._welcomed:
                reply = self._refuse(0, _R.REFUSAL_REASON_NO_HELLO, "say Hello first")
            case "offer":
                return self._offer(header.offer)
            case "chunk":
                reply = self._chunk(header.chunk, frames)
            case _:
                return None
        return reply

    def _hello(self, peer: bytes, hello: Hello) -> TransferHeader:
        if hello.receiver.incarnation != self._fetches.identity.incarnation:
            return self._refuse(0, _R.REFUSAL_REASON_STALE_INCARNATION, "meant for another life of this worker")
        differing = difference(self._compatibility, hello.compatibility)
        if differing is not None:
            field, message = differing
            self._log.warning("incompatible_sender", sender=hello.sender.worker_id, field=field, detail=message)
            return self._refuse(0, _R.REFUSAL_REASON_INCOMPATIBLE, message, field)
        self._welcomed.add(peer)
        identity = self._fetches.identity
        return TransferHeader(
            welcome=Welcome(receiver=identity, credit_bytes=PAIR_CREDIT_BYTES, max_chunk_bytes=CHUNK_BYTES)
        )

    def _offer(self, offer: Offer) -> TransferHeader | None:
        found = self._find(offer.reservation, offer.key)
        if not isinstance(found, Fetch):
            return self._refuse(offer.transfer_id, found, "no such reservation in this epoch")
        tokens = len(found.token_ids)
        wrong = (
            offer.birth.tokens != tokens
            or offer.birth.bytes != self._shape.extent_bytes(tokens)
            or offer.birth.chunk_count != len(chunk_plan(self._shape, tokens))
            or offer.birth.checksum_function != CHECKSUM_FUNCTION
        )
        if wrong:
            return self._refuse(offer.transfer_id, _R.REFUSAL_REASON_SHAPE, "offer does not fit the reservation")
        if found.birth_id != offer.birth.birth_id:
            # A change of source starts again at chunk 0.
            found.birth_id = bytes(offer.birth.birth_id)
            found.taken.clear()
            found.received_bytes = 0
        return None

    def _chunk(self, chunk: Chunk, frames: list[zmq.Frame]) -> TransferHeader:
        reason, message = self._take(chunk, frames)
        found = self._fetches.find(chunk.reservation)
        if reason == _TAKEN and isinstance(found, Fetch):
            found.taken.add(chunk.chunk_index)
            found.received_bytes += chunk.length
            found.moved_at = time.monotonic()
            if len(found.taken) == len(chunk_plan(self._shape, len(found.token_ids))):
                self.received_bytes += found.received_bytes
                self._committed(found, found.received_bytes)
                return TransferHeader(committed=Committed(transfer_id=chunk.transfer_id))
        else:
            self.refused_total += 1
            self._log.warning("chunk_refused", reason=_R.Name(reason), detail=message, chunk=chunk.chunk_index)
        return TransferHeader(
            chunk_result=ChunkResult(
                transfer_id=chunk.transfer_id,
                chunk_index=chunk.chunk_index,
                refusal=reason,
                credit_bytes=chunk.length,
                message=message,
            )
        )

    def _take(self, chunk: Chunk, frames: list[zmq.Frame]) -> tuple[RefusalReason.ValueType, str]:
        """Verifies a chunk and lays it down; the reason why not, else `_TAKEN`."""
        found = self._find(chunk.reservation, chunk.key)
        if not isinstance(found, Fetch):
            return found, "no such reservation in this epoch"
        refusal = self._misfit(found, chunk, frames)
        if refusal is not None:
            return refusal
        tokens = len(found.token_ids)
        expected = chunk_plan(self._shape, tokens)[chunk.chunk_index]
        landed = self._view(found)[expected.offset : expected.offset + expected.length]
        landed.copy_(torch.frombuffer(frames[1].buffer, dtype=torch.uint8))
        checksum = chunk_checksum(found.key, found.birth_id, self._shape, tokens, expected, raw_bytes(landed))
        if checksum != chunk.checksum:
            return _R.REFUSAL_REASON_CHECKSUM, "checksum does not match"
        return _TAKEN, ""

    def _misfit(
        self, found: Fetch, chunk: Chunk, frames: list[zmq.Frame]
    ) -> tuple[RefusalReason.ValueType, str] | None:
        """Why a chunk may not touch the extent of the fetch that it names; None when it may."""
        if not found.birth_id or chunk.birth_id != found.birth_id:
            return _R.REFUSAL_REASON_BIRTH, "another birth than the one offered"
        plan = chunk_plan(self._shape, len(found.token_ids))
        if chunk.chunk_index >= len(plan) or len(frames) != _CHUNK_FRAMES:
            return _R.REFUSAL_REASON_SHAPE, f"chunk {chunk.chunk_index} of {len(plan)} in {len(frames)} frames"
        expected, size = plan[chunk.chunk_index], len(frames[1].buffer)
        if (chunk.offset, chunk.length, size) != (expected.offset, expected.length, expected.length):
            return _R.REFUSAL_REASON_SHAPE, f"{size} bytes at {chunk.offset}; expected {expected.length}"
        if chunk.chunk_index in found.taken:
            return _R.REFUSAL_REASON_REPEATED, "already taken"
        return None

    def _find(self, reservation: Reservation, key: bytes) -> Fetch | RefusalReason.ValueType:
        found = self._fetches.find(reservation)
        if isinstance(found, Fetch) and found.key != key:
            return _R.REFUSAL_REASON_UNKNOWN_RESERVATION
        return found

    def _refuse(
        self, transfer_id: int, reason: RefusalReason.ValueType, message: str, field: str = ""
    ) -> TransferHeader:
        self.refused_total += 1
        return TransferHeader(refused=Refused(transfer_id=transfer_id, reason=reason, message=message, field=field))
