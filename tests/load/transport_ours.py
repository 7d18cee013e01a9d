"""Drystone's own two ends: a Shipper with blocks that are whole, and a Receiver with a pool and its fetches."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import zmq

from decode_worker.pool import Pool
from decode_worker.receiving import receiver as receiver_module
from decode_worker.receiving.heap import keep_frames_on_heap
from decode_worker.receiving.listener import Listener
from decode_worker.receiving.receiver import Receiver
from decode_worker.request import Fetch
from decode_worker.tail import SEGMENT_TOKENS
from prefill_worker.tiers.block import StoredBlock
from prefill_worker.transfer.shipper import Shipper
from shared.internal.v1.common_pb2 import BlockRef, KvEndpoint, Reservation, WorkerIdentity
from shared.kv.birth import make_birth
from shared.runtime import host_name
from tests.load.transport_sides import SHAPE, sources
from tests.support.decode_parts import make_pool, make_request
from tests.support.fake_workers import compatibility

_TIMEOUT_SECONDS = 120.0
_Result = TypeVar("_Result")
_COMPATIBILITY = compatibility(layers=SHAPE.layers, kv_heads=SHAPE.kv_heads, head_dim=SHAPE.head_dim, dtype=SHAPE.dtype)


class _Loop:
    """An event loop on a thread of its own, as the workers' main thread is."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_TIMEOUT_SECONDS)


class OurSender:
    """A prefill worker without a model."""

    def connect(self, told: Mapping[str, Any], tokens: int) -> None:
        """The link itself is made by the first block."""
        self._loop = _Loop()
        self._endpoint = KvEndpoint(**{"host": host_name(), **told["endpoint"]})
        self._tokens = tokens
        self._sources = [memoryview(each) for each in sources(tokens)]
        security = _CurveClient(told["curve_key"]) if "curve_key" in told else None
        identity = WorkerIdentity(worker_id="prefill-0", incarnation=5)
        self._shipper = Shipper(identity, _COMPATIBILITY, SHAPE, _TIMEOUT_SECONDS, security)  # type: ignore[arg-type] # arrays are buffers

    def prepare(self, tickets: Sequence[str]) -> None:
        """Checksums are made where a block is born, not when it is shipped."""
        self._work = list[tuple[StoredBlock, Reservation]]()
        for ticket, data in zip(tickets, itertools.cycle(self._sources), strict=False):
            told = json.loads(ticket)
            key, ids = bytes.fromhex(told["key"]), tuple(range(self._tokens))
            block = StoredBlock(key, ids, data, make_birth(key, SHAPE, self._tokens, data))
            self._work.append((block, Reservation.FromString(bytes.fromhex(told["reservation"]))))

    def send(self, tickets: Sequence[str], at_once: int) -> tuple[float, list[float]]:
        """`at_once` transfers under way, as a prefill worker has them."""
        del tickets
        return self._loop.run(self._send(at_once))

    async def _send(self, at_once: int) -> tuple[float, list[float]]:
        ended = list[float]()
        work = iter(self._work)

        async def some() -> None:
            for block, reservation in work:
                await self._shipper.ship(block, reservation, self._endpoint)
                ended.append(time.monotonic())

        began = time.monotonic()
        await asyncio.gather(*(some() for _ in range(at_once)))
        return began, ended


class OurReceiver:
    """A decode worker without a model.

    Args:
        summed: False: chunks are laid down and never summed, to learn what the sum costs.
        secured: True: with CURVE, any key.
    """

    def __init__(self, *, summed: bool = True, secured: bool = False) -> None:
        self._curve = _CurveServer() if secured else None
        self._keys = itertools.count(1)
        self._committed = 0
        if not summed:
            receiver_module.lay = _lay_unsummed

    def listen(self, address: str, tokens: int, count: int) -> Mapping[str, Any]:
        """With a pool of just that size, in a process set up as a decode worker's."""
        keep_frames_on_heap()
        self._loop, self._tokens = _Loop(), tokens
        self._pool: Pool = make_pool(count * tokens + 2 * SEGMENT_TOKENS, SHAPE)
        self._pool.arena.records.fill_(1)
        bound = self._loop.run(self._listen(address))
        kind = "ipc_address" if bound.startswith("ipc://") else "zmq_address"
        told: dict[str, Any] = {"endpoint": {kind: bound}}
        return told if self._curve is None else told | {"curve_key": self._curve.public.decode()}

    def expect(self, count: int) -> list[str]:
        """A request that waits for so many blocks: a reservation for each."""
        return self._loop.run(self._expect(count))

    def clear(self) -> int:
        """Blocks committed, verified all of them."""
        return self._loop.run(self._clear())

    async def _listen(self, address: str) -> str:
        arena = self._pool.arena
        self._receiver = Receiver(
            self._pool.fetches, _COMPATIBILITY, SHAPE, lambda landing: arena.bytes_of(landing.extent), self._commit
        )
        listener = Listener(self._receiver.context, SHAPE, address, self._curve)
        self._receiver.listen(listener)
        self._receiver.start()
        return listener.address

    async def _expect(self, count: int) -> list[str]:
        ids = list(range(self._tokens))
        refs = [BlockRef(key=next(self._keys).to_bytes(32, "big"), token_ids=ids, store=True) for _ in range(count)]
        self._request = make_request(refs)
        if self._pool.admit(self._request, may_move=True) is None:
            raise MemoryError(f"no room for {count} blocks")
        self._committed = 0
        reserved = {fetch.key: self._pool.fetches.reservation(fetch) for fetch in self._request.fetches}
        return [
            json.dumps({"key": key.hex(), "reservation": reservation.SerializeToString().hex()})
            for key, reservation in sorted(reserved.items())
        ]

    def _commit(self, fetch: Fetch, size: int) -> None:
        self._committed += size == SHAPE.extent_bytes(self._tokens)
        self._pool.commit(fetch)

    async def _clear(self) -> int:
        self._pool.leave(self._request)
        self._request.release()
        while self._pool.blocks.evict_one():
            pass
        return self._committed


class _Anything(int):
    """A checksum that is like every other."""

    __slots__ = ()

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def _lay_unsummed(extent: torch.Tensor, offset: int, data: memoryview, identity: bytes) -> int:
    del identity
    np.copyto(extent[offset : offset + len(data)].numpy(), np.frombuffer(data, dtype=np.uint8))
    return _Anything()


class _CurveServer:
    """A key pair of its own; whoever knows the public one may send."""

    def __init__(self) -> None:
        self.public, self._secret = zmq.curve_keypair()

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._secret)


class _CurveClient:
    """Knows the server's key."""

    def __init__(self, server: str) -> None:
        self._server = server.encode()
        self._public, self._secret = zmq.curve_keypair()

    def check(self, address: str, public_key: str) -> None:
        """Anybody may be sent to."""

    def apply(self, socket: zmq.Socket[bytes], address: str, public_key: str) -> None:
        del address, public_key
        socket.setsockopt(zmq.CURVE_SERVERKEY, self._server)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._secret)
