"""The least that can be done: blocking sockets, bytes straight into their place, one byte back for each block."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from tests.load.transport_sides import SHAPE, sources

_TAKEN = b"t"
_TIMEOUT_SECONDS = 120.0


class PlainSender:
    """Sends block after block; of the answers it reads the one of the block before."""

    def connect(self, told: Mapping[str, Any], tokens: int) -> None:
        """Over TCP or a Unix-domain socket."""
        self._socket = _socket(str(told["address"]))
        self._socket.settimeout(_TIMEOUT_SECONDS)
        self._socket.connect(_target(str(told["address"])))
        self._blocks = [memoryview(each) for each in sources(tokens)]

    def prepare(self, tickets: Sequence[str]) -> None:
        """Nothing is to be done."""

    def send(self, tickets: Sequence[str], at_once: int) -> tuple[float, list[float]]:
        """With `at_once` 1 each block waits for the answer to the one before, else one more is on its way."""
        ended = list[float]()
        began = time.monotonic()
        for number, block in zip(range(len(tickets)), itertools.cycle(self._blocks), strict=False):
            self._socket.sendall(block)
            if number or at_once == 1:
                self._answer(ended)
        if at_once > 1:
            self._answer(ended)
        return began, ended

    def _answer(self, ended: list[float]) -> None:
        if self._socket.recv(1) != _TAKEN:
            raise ConnectionError("the receiver hung up")
        ended.append(time.monotonic())


class PlainReceiver:
    """Reads into the places of the blocks."""

    def listen(self, address: str, tokens: int, count: int) -> Mapping[str, Any]:
        """One sender will connect."""
        self._size = SHAPE.extent_bytes(tokens)
        self._memory = np.zeros(count * self._size, dtype=np.uint8)
        self._memory.fill(1)
        self._listener = _socket(address)
        self._listener.settimeout(_TIMEOUT_SECONDS)
        self._listener.bind(_target(address))
        self._listener.listen(1)
        self._thread = ThreadPoolExecutor(1)
        self._connected = self._thread.submit(self._accept)
        self._read: Future[int] | None = None
        if self._listener.family == socket.AF_UNIX:
            return {"address": address}
        return {"address": f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"}

    def expect(self, count: int) -> list[str]:
        """Reads on a thread."""
        self._read = self._thread.submit(self._take, count)
        return [""] * count

    def clear(self) -> int:
        """Blocks read."""
        return 0 if self._read is None else self._read.result(_TIMEOUT_SECONDS)

    def _accept(self) -> socket.socket:
        peer, _ = self._listener.accept()
        peer.settimeout(_TIMEOUT_SECONDS)
        return peer

    def _take(self, count: int) -> int:
        peer, memory = self._connected.result(), memoryview(self._memory)
        for number in range(count):
            place = memory[number * self._size : (number + 1) * self._size]
            while place:
                place = place[peer.recv_into(place) :]
            peer.sendall(_TAKEN)
        return count


def _socket(address: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX if address.startswith("ipc://") else socket.AF_INET)
    if made.family == socket.AF_INET:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _target(address: str) -> Any:
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    return rest if scheme == "ipc" else (host, int(port))
