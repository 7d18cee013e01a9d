"""Either end of a pair, here or in a process of its own that can be killed and stopped.

    test ── JSON lines over a pipe ──▶ process: ReceivingEnd or SendingEnd ── TCP ──▶ the other end

Processes are forked from one that has imported everything, so that a hundred of them cost seconds and not minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import xxhash

from decode_worker.pool import Pool
from decode_worker.receiving.listener import Listener
from decode_worker.receiving.receiver import Receiver
from decode_worker.request import Fetch, Request
from prefill_worker.transfer.outgoing import Shipped
from prefill_worker.transfer.shipper import Shipper
from shared import logs
from shared.errors import DrystoneError
from shared.internal.v1.common_pb2 import BlockRef, KvEndpoint, Reservation, WorkerIdentity
from tests.support.decode_parts import assert_all_free_after_eviction, make_arena, make_request
from tests.support.fake_workers import compatibility
from tests.support.wire import SENDER, SHAPE, TOKENS, make_block

KIND = compatibility(layers=SHAPE.layers, kv_heads=SHAPE.kv_heads, head_dim=SHAPE.head_dim)
REPLY_SECONDS = 60.0


class ReceivingEnd:
    """A pool and a receiver, with an engine's part in them played by whoever calls.

    Args:
        incarnation: Of this life of the worker.
        port: Where it listens; 0 takes a free one.
    """

    def __init__(self, incarnation: int, port: int = 0) -> None:
        self.identity = WorkerIdentity(worker_id="decode-0", incarnation=incarnation)
        self.pool = Pool(make_arena(4 * TOKENS, SHAPE), self.identity)
        self.receiver = Receiver(
            self.pool.fetches,
            KIND,
            SHAPE,
            view=lambda landing: self.pool.arena.bytes_of(landing.extent),
            committed=self._commit,
        )
        listener = Listener(self.receiver.context, SHAPE, f"tcp://127.0.0.1:{port}")
        self.receiver.listen(listener)
        self.address = listener.address
        self._requests: dict[int, Request] = {}
        self._committed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self.receiver.start()

    def _commit(self, fetch: Fetch, size: int) -> None:
        del size
        self.pool.commit(fetch)

    def expect(self, number: int) -> Reservation:
        """A request that waits for a block; its promise."""
        key = number.to_bytes(32, "big")
        request = make_request([BlockRef(key=key, token_ids=range(TOKENS), store=True)])
        assert self.pool.admit(request, may_move=True) is not None
        self._requests[number] = request
        return self.reservation(number)

    def reservation(self, number: int) -> Reservation:
        """The promise as it is now."""
        [fetch] = self._requests[number].fetches
        return self.pool.fetches.reservation(fetch)

    def drive_anew(self, number: int) -> Reservation:
        """What an engine does about a fetch without progress: another epoch."""
        [fetch] = self._requests[number].fetches
        assert fetch.restart()
        return self.pool.fetches.reservation(fetch)

    def taken(self, number: int) -> int:
        """Chunks of a block that have landed; -1 for a block that is whole."""
        return next((len(fetch.landing.taken) for fetch in self._requests[number].fetches), -1)

    def digest(self, number: int) -> int:
        """Of a resident block's bytes; 0 while it is not there."""
        key = number.to_bytes(32, "big")
        found = [one for one in self.pool.blocks.all() if one.key == key]
        return xxhash.xxh3_64_intdigest(self.pool.arena.bytes_of(found[0].extent).numpy()) if found else 0

    def end(self, number: int) -> None:
        """The request leaves, whatever it has got by then."""
        request = self._requests.pop(number)
        for fetch in self.pool.leave(request):
            fetch.restart()
        request.release()

    def all_free(self) -> bool:
        """Nobody holds anything, and every byte can be had again; raises where not."""
        assert not self._requests
        assert_all_free_after_eviction(self.pool)
        return True

    def close(self) -> None:
        assert self.receiver._reactor.defects_total == 0
        self.receiver.close()


class SendingEnd:
    """A shipper and the blocks that it can make."""

    def __init__(self, timeout_seconds: float) -> None:
        self.shipper = Shipper(SENDER, KIND, SHAPE, timeout_seconds)

    async def ship(self, number: int, reservation: Reservation, address: str) -> Shipped:
        return await self.shipper.ship(make_block(number), reservation, KvEndpoint(zmq_address=address))

    async def close(self) -> None:
        await self.shipper.close()
        assert self.shipper._reactor.defects_total == 0


def digest_of(number: int) -> int:
    """Of the bytes that a block must have wherever it is."""
    return xxhash.xxh3_64_intdigest(make_block(number).data)


class Remote:
    """An end in a process of its own. Not for several tasks at once.

    Args:
        main: What runs there, `receive` or `send`.
        arguments: After the pipe.
    """

    def __init__(self, main: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    async def ask(self, do: str, **arguments: object) -> Any:
        """Has the end do something; raises EOFError when it dies meanwhile, TimeoutError when it does not answer."""
        self._pipe.send_bytes(json.dumps({"do": do, **arguments}).encode())
        return await asyncio.to_thread(self._reply)

    def _reply(self) -> Any:
        if not self._pipe.poll(REPLY_SECONDS):
            raise TimeoutError(f"no answer within {REPLY_SECONDS} s")
        try:
            return json.loads(self._pipe.recv_bytes())
        except ConnectionResetError as error:
            raise EOFError from error

    async def ready(self) -> str:
        """What it says first: a receiver's address, or nothing."""
        return str(await asyncio.to_thread(self._reply))

    def stop(self) -> None:
        """Stops it where it stands."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Goes on from there."""
        os.kill(self.pid, signal.SIGCONT)

    def kill_now(self) -> None:
        """Ends it without a word; what it owned is the system's again."""
        self._process.kill()
        self._process.join(10.0)

    def close(self) -> None:
        """Ends it, and lets go of the pipe; nobody may be waiting for an answer."""
        self.kill_now()
        self._pipe.close()


@contextlib.asynccontextmanager
async def remote(main: Callable[..., None], *arguments: Any) -> AsyncIterator[Remote]:
    """An end in a process, which is killed at the end."""
    end = Remote(main, *arguments)
    try:
        yield end
    finally:
        end.close()


def receive(pipe: Connection, incarnation: int, port: int) -> None:
    """A receiving end, until its pipe closes."""
    asyncio.run(_serve_receiving(pipe, incarnation, port))


def send(pipe: Connection, timeout_seconds: float) -> None:
    """A sending end, until its pipe closes."""
    asyncio.run(_serve_sending(pipe, timeout_seconds))


async def _serve_receiving(pipe: Connection, incarnation: int, port: int) -> None:
    _quiet()
    end = ReceivingEnd(incarnation, port)
    pipe.send_bytes(json.dumps(end.address).encode())
    verbs: dict[str, Callable[[int], Any]] = {
        "expect": lambda number: _text(end.expect(number)),
        "drive_anew": lambda number: _text(end.drive_anew(number)),
        "taken": end.taken,
        "digest": end.digest,
        "end": end.end,
        "all_free": lambda _number: end.all_free(),
        "refused": lambda _number: dict(end.receiver.refused),
    }
    async for said in _commands(pipe):
        pipe.send_bytes(json.dumps(verbs[said["do"]](said.get("number", 0))).encode())


async def _serve_sending(pipe: Connection, timeout_seconds: float) -> None:
    _quiet()
    end = SendingEnd(timeout_seconds)
    pipe.send_bytes(b'""')
    async for said in _commands(pipe):
        reservation = Reservation.FromString(bytes.fromhex(said["reservation"]))
        try:
            await end.ship(said["number"], reservation, said["address"])
            outcome = "committed"
        except DrystoneError as error:
            outcome = f"{error.reason}: {error.message}"
        pipe.send_bytes(json.dumps(outcome).encode())


async def _commands(pipe: Connection) -> AsyncIterator[dict[str, Any]]:
    while True:
        try:
            raw = await asyncio.to_thread(pipe.recv_bytes)
        except EOFError:
            return
        yield json.loads(raw)


def _text(reservation: Reservation) -> str:
    return reservation.SerializeToString().hex()


def _quiet() -> None:
    torch.set_num_threads(1)
    logs.configure("error", "json")
