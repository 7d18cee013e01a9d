"""One pair: a DEALER socket to one decode worker, its handshake, its credit, its transfers.

Bytes on the wire at once never exceed the credit that the receiver gave: a slow decode worker holds
the sender up, it does not make the sender's memory grow. Frames are views of the stored extent
(`copy=False`): ZeroMQ holds the buffer until it has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import zmq
import zmq.asyncio

from prefill_worker.tiers.block import StoredBlock
from shared import logs
from shared.enums import enum_name
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import Compatibility, Reservation, WorkerIdentity
from shared.internal.v1.transfer_pb2 import (
    Birth,
    Chunk,
    ChunkResult,
    Committed,
    Hello,
    Offer,
    RefusalReason,
    Refused,
    TransferHeader,
)
from shared.kv.birth import CHECKSUM_FUNCTION, ChunkRange, chunk_plan
from shared.kv.layout import KvShape
from shared.runtime import cancelled
from shared.transfer.envelope import MalformedFrameError, seal, unseal

HELLO_SECONDS = 5.0
_MAX_RESENDS = 8
_ENDED = frozenset(
    {
        RefusalReason.REFUSAL_REASON_UNKNOWN_RESERVATION,
        RefusalReason.REFUSAL_REASON_STALE_EPOCH,
    }
)
_TAKEN = frozenset({RefusalReason.REFUSAL_REASON_UNSPECIFIED, RefusalReason.REFUSAL_REASON_REPEATED})
_RESENDABLE = frozenset({RefusalReason.REFUSAL_REASON_CHECKSUM, RefusalReason.REFUSAL_REASON_SHAPE})


class LinkBrokenError(DrystoneError):
    """The pair makes no progress: whatever runs on its link must be begun anew on another."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.TRANSFER_FAILED, message)


@dataclass(slots=True, eq=False)
class _Transfer:
    """One extent on its way; `replies` holds what the receiver said about it."""

    number: int
    replies: asyncio.Queue[ChunkResult | Committed | Refused] = field(default_factory=asyncio.Queue)


@dataclass(frozen=True, slots=True)
class Shipped:
    """What a transfer did."""

    bytes: int
    chunks_resent: int


class Link:
    """The sending end of one pair. Opened by its first transfer, closed by its owner."""

    def __init__(self, context: zmq.asyncio.Context, address: str, shape: KvShape, timeout_seconds: float) -> None:
        if not address.startswith("tcp://"):
            raise LinkBrokenError(f"{address[:200]!r} is no tcp:// address")
        self._shape = shape
        self._timeout = timeout_seconds
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise LinkBrokenError(f"cannot connect to {address[:200]!r}: {error}") from error
        self._numbers = itertools.count(1)
        self._transfers: dict[int, _Transfer] = {}
        self._credit = 0
        self._credit_changed = asyncio.Condition()
        self._reader: asyncio.Task[None] | None = None
        self._log = logs.get("link")

    async def hello(self, sender: WorkerIdentity, receiver: WorkerIdentity, compatibility: Compatibility) -> None:
        """Shakes hands; raises DrystoneError when the receiver refuses or does not answer."""
        hello = Hello(sender=sender, receiver=receiver, compatibility=compatibility)
        await self._socket.send(seal(TransferHeader(hello=hello)))
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                header = unseal(await self._socket.recv())
        except MalformedFrameError as error:
            raise LinkBrokenError(f"decode worker {receiver.worker_id} speaks another protocol: {error}") from error
        except TimeoutError as error:
            raise LinkBrokenError(
                f"decode worker {receiver.worker_id} did not answer within {HELLO_SECONDS} s"
            ) from error
        if header.HasField("refused"):
            incompatible = header.refused.reason == RefusalReason.REFUSAL_REASON_INCOMPATIBLE
            reason = Reason.INCOMPATIBLE_WORKERS if incompatible else Reason.TRANSFER_FAILED
            raise DrystoneError(
                reason,
                f"decode worker {receiver.worker_id} refused the link: {header.refused.message}",
                metadata={"field": header.refused.field},
            )
        self._credit = header.welcome.credit_bytes
        self._reader = asyncio.create_task(self._read())

    async def close(self) -> None:
        """Ends the link; open transfers fail at once."""
        if self._reader is not None:
            await cancelled(self._reader)
        self._socket.close(0)
        for transfer in self._transfers.values():
            transfer.replies.put_nowait(Refused(message="closed on this side"))

    async def ship(self, block: StoredBlock, reservation: Reservation) -> Shipped:
        """Sends an extent and waits for its commit.

        Raises:
            LinkBrokenError: No progress within the timeout; the link must be closed.
            DrystoneError: The receiver refused this block; the link is sound.
        """
        chunks = chunk_plan(self._shape, len(block.token_ids))
        todo = [chunk.index for chunk in chunks]
        outstanding: dict[int, int] = {}
        sent = resent = 0
        with self._transfer() as transfer:
            try:
                await self._offer(transfer, block, reservation)
                while True:
                    while todo and await self._take_credit(chunks[todo[0]].length, wait=not outstanding):
                        chunk = chunks[todo.pop(0)]
                        outstanding[chunk.index] = chunk.length
                        sent += chunk.length
                        await self._send_chunk(transfer, block, reservation, chunk)
                    reply = await self._reply(transfer)
                    if isinstance(reply, Committed):
                        return Shipped(sent, resent)
                    if isinstance(reply, Refused):
                        raise _refused(reply.reason, reply.message) if reply.transfer_id else _broken(reply)
                    if reply.chunk_index not in outstanding:
                        continue  # said before
                    await self._give_credit(outstanding.pop(reply.chunk_index))
                    if reply.refusal in _TAKEN:
                        continue
                    resent += 1
                    if reply.refusal not in _RESENDABLE or resent > _MAX_RESENDS:
                        raise _refused(reply.refusal, reply.message)
                    todo.insert(0, reply.chunk_index)
            except zmq.ZMQError as error:
                raise LinkBrokenError(f"the link was closed: {error}") from error
            finally:
                # However it ended, answers to what is still out there will find no transfer.
                await self._give_credit(sum(outstanding.values()))

    async def _reply(self, transfer: _Transfer) -> ChunkResult | Committed | Refused:
        try:
            async with asyncio.timeout(self._timeout):
                return await transfer.replies.get()
        except TimeoutError as error:
            raise LinkBrokenError(f"no progress of a transfer within {self._timeout} s") from error

    @contextlib.contextmanager
    def _transfer(self) -> Iterator[_Transfer]:
        transfer = _Transfer(next(self._numbers))
        self._transfers[transfer.number] = transfer
        try:
            yield transfer
        finally:
            del self._transfers[transfer.number]

    async def _offer(self, transfer: _Transfer, block: StoredBlock, reservation: Reservation) -> None:
        birth = Birth(
            birth_id=block.birth.birth_id,
            tokens=block.birth.tokens,
            bytes=block.bytes,
            chunk_count=len(block.birth.checksums),
            checksum_function=CHECKSUM_FUNCTION,
        )
        offer = Offer(transfer_id=transfer.number, reservation=reservation, key=block.key, birth=birth)
        await self._socket.send(seal(TransferHeader(offer=offer)))

    async def _send_chunk(
        self, transfer: _Transfer, block: StoredBlock, reservation: Reservation, chunk: ChunkRange
    ) -> None:
        header = Chunk(
            transfer_id=transfer.number,
            reservation=reservation,
            key=block.key,
            birth_id=block.birth.birth_id,
            chunk_index=chunk.index,
            first_layer=chunk.first_layer,
            layer_count=chunk.layer_count,
            offset=chunk.offset,
            length=chunk.length,
            checksum=block.birth.checksums[chunk.index],
        )
        data = block.data[chunk.offset : chunk.offset + chunk.length]
        await self._socket.send_multipart([seal(TransferHeader(chunk=header)), data], copy=False)

    async def _take_credit(self, wanted: int, *, wait: bool) -> bool:
        async with self._credit_changed:
            if wait:
                try:
                    async with asyncio.timeout(self._timeout):
                        await self._credit_changed.wait_for(lambda: self._credit >= wanted)
                except TimeoutError as error:
                    raise LinkBrokenError(f"no credit from the decode worker within {self._timeout} s") from error
            if self._credit < wanted:
                return False
            self._credit -= wanted
            return True

    async def _give_credit(self, freed: int) -> None:
        async with self._credit_changed:
            self._credit += freed
            self._credit_changed.notify_all()

    async def _read(self) -> None:
        async for header in self._headers():
            kind = header.WhichOneof("message")
            reply = getattr(header, kind or "pong")
            if not isinstance(reply, ChunkResult | Committed | Refused):
                continue
            for number, transfer in self._transfers.items():
                # A refusal of transfer 0 is one of the whole pair.
                if reply.transfer_id in (number, 0):
                    transfer.replies.put_nowait(reply)

    async def _headers(self) -> AsyncIterator[TransferHeader]:
        while True:
            try:
                yield unseal(await self._socket.recv())
            except MalformedFrameError as error:
                self._log.warning("malformed_reply", detail=str(error))


def _broken(refused: Refused) -> LinkBrokenError:
    name = enum_name(RefusalReason, refused.reason).removeprefix("REFUSAL_REASON_")
    return LinkBrokenError(f"the decode worker refused the link: {name}: {refused.message}")


def _refused(reason: RefusalReason.ValueType, message: str) -> DrystoneError:
    name = enum_name(RefusalReason, reason).removeprefix("REFUSAL_REASON_")
    kind = Reason.RESERVATION_ENDED if reason in _ENDED else Reason.TRANSFER_FAILED
    return DrystoneError(kind, f"the decode worker refused a block: {name}: {message}", metadata={"refusal": name})
