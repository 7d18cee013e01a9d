"""The process that owns one two-rank process group for a worker: `python -m shared.transfer.group_process`.

Blocks rest in host memory, so runs come from it and go to it: Gloo sends them as they are, NCCL from a buffer on the
GPU to one on the other. Checksums are those of the blocks' birth, made and checked by the workers.

Neither Gloo nor NCCL can be relied on to end when its peer does: with an absent peer NCCL's receive and its abort both
block for good. A process can be killed at any moment, so the group has one to itself, and the worker none.

    worker ── RUN ──▶ this process ══ group ══▶ other process ── DONE ──▶ other worker
       └── staging memory ──┘                      └── staging memory ──┘

It ends when its worker does: stdin closes, and the kernel sends SIGKILL to children of a thread that ended.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from shared.transfer.group_messages import MAX_TEXT_BYTES, RECORD, Kind, Order

if TYPE_CHECKING:
    import torch

_PR_SET_PDEATHSIG = 1
_GREETING_BYTES = 8
_LONGEST_ORDER = 4096
# Moves one run, uint8 [bytes] of the staging memory, and returns when it is sent, or there.
Move = Callable[["torch.Tensor"], None]


def main() -> None:
    """Runs until the worker closes the pipe, or something fails."""
    _die_with_parent()
    order = Order.of(_order_line())
    runs: queue.SimpleQueue[tuple[int, int, int]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(runs,), name="commands", daemon=True).start()
    try:
        _serve(order, runs)
    except Exception as error:  # noqa: BLE001 - whatever it is, the worker hears of it and the process ends
        text = f"{type(error).__name__}: {error}".encode()[:MAX_TEXT_BYTES]
        _tell(Kind.FAILED, length=len(text), text=text)
    # Not sys.exit: the group's own threads may be beyond ending.
    os._exit(1)


def _serve(order: Order, runs: queue.SimpleQueue[tuple[int, int, int]]) -> None:
    import torch

    torch.set_num_threads(1)
    with mmap.mmap(order.staging_fd, order.staging_bytes) as memory:
        staging = torch.frombuffer(memory, dtype=torch.uint8)
        move = _joined(order)
        # A group that is made is not one that works: bytes go both ways first.
        for along in (True, False):
            move[along](torch.zeros(_GREETING_BYTES, dtype=torch.uint8))
        _tell(Kind.READY)
        while True:
            number, offset, length = runs.get()
            move[True](staging[offset : offset + length])
            _tell(Kind.DONE, number)


def _joined(order: Order) -> dict[bool, Move]:
    """Meets the other process; what moves runs in this end's direction (True), and against it."""
    distributed: Any = importlib.import_module("torch.distributed")
    limit = timedelta(seconds=order.seconds)
    rank = 0 if order.role == "receive" else 1
    if order.role == "receive":
        listener = socket.create_server((order.address, 0))
        port = listener.getsockname()[1]
        store = distributed.TCPStore(
            order.address,
            port,
            world_size=2,
            is_master=True,
            timeout=limit,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        _tell(Kind.LISTENING, port)
    else:
        store = distributed.TCPStore(
            order.address, order.port, world_size=2, is_master=False, timeout=limit, wait_for_workers=False
        )
    own = distributed.PrefixStore(order.name, store)
    make = _nccl if order.backend == "nccl" else _gloo
    send, receive = make(own, rank, order, limit)
    return {True: send, False: receive} if order.role == "send" else {True: receive, False: send}


def _gloo(store: Any, rank: int, order: Order, limit: timedelta) -> tuple[Move, Move]:
    gloo: Any = importlib.import_module("torch.distributed").ProcessGroupGloo
    options = gloo._Options()  # noqa: SLF001 - the one way to bind it to one address
    options._devices = [gloo.create_device(hostname=order.address)]  # noqa: SLF001 - likewise
    options._timeout = limit  # noqa: SLF001 - likewise
    group = gloo(store, rank, 2, options)

    def send(run: torch.Tensor) -> None:
        group.send([run], 1 - rank, 0).wait(limit)

    def receive(run: torch.Tensor) -> None:
        group.recv([run], 1 - rank, 0).wait(limit)

    return send, receive


def _nccl(store: Any, rank: int, order: Order, limit: timedelta) -> tuple[Move, Move]:
    """Runs go through a buffer on the GPU, on a stream of their own."""
    import torch

    nccl: Any = importlib.import_module("torch.distributed").ProcessGroupNCCL
    device = torch.device("cuda", order.ordinal)
    torch.cuda.set_device(device)
    options = nccl.Options(is_high_priority_stream=True)
    options._timeout = limit  # noqa: SLF001 - the one way to set it
    group = nccl(store, rank, 2, options)
    stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call] # torch has no types for it
    buffer = torch.empty(0, dtype=torch.uint8, device=device)

    def room(run: torch.Tensor) -> torch.Tensor:
        nonlocal buffer
        if len(buffer) < len(run):
            buffer = torch.empty(len(run), dtype=torch.uint8, device=device)
        return buffer[: len(run)]

    def send(run: torch.Tensor) -> None:
        with torch.cuda.stream(stream):
            there = room(run)
            there.copy_(run)
            group.send([there], 1 - rank, 0).wait(limit)
            stream.synchronize()

    def receive(run: torch.Tensor) -> None:
        with torch.cuda.stream(stream):
            there = room(run)
            group.recv([there], 1 - rank, 0).wait(limit)
            run.copy_(there)
            stream.synchronize()

    return send, receive


def _order_line() -> bytes:
    """The first line, and not a byte more: records follow it."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _LONGEST_ORDER:
        line += os.read(sys.stdin.fileno(), 1) or b"\n"
    return line


def _listen(runs: queue.SimpleQueue[tuple[int, int, int]]) -> None:
    """Hands on what the worker says; ends the process when the worker is gone, whatever the group is doing."""
    pipe, left = sys.stdin.fileno(), b""
    while piece := os.read(pipe, 1 << 16):
        left += piece
        whole = len(left) // RECORD.size * RECORD.size
        for _, number, offset, length in RECORD.iter_unpack(left[:whole]):
            runs.put((number, offset, length))
        left = left[whole:]
    os._exit(0)


def _tell(kind: Kind, number: int = 0, length: int = 0, text: bytes = b"") -> None:
    os.write(sys.stdout.fileno(), RECORD.pack(kind, number, 0, length) + text)


def _die_with_parent() -> None:
    """Has the kernel kill this process with the thread that started it; pipes closing is the other way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
