"""pyzmq alone, and one copy of the same bytes: DEALER to ROUTER, chunks of the same size in a window of the same bytes.

send(copy=False) ──▶ recv_into(a buffer) ──▶ numpy.copyto(the place) ──▶ one empty frame back
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import zmq

from shared.kv.birth import CHUNK_BYTES, chunk_plan
from tests.load.transport_sides import SHAPE, WINDOW_BYTES, sources

_TIMEOUT_SECONDS = 120.0


class BareSender:
    """Sends chunks until the window is full, and then one for each answer."""

    def connect(self, told: Mapping[str, Any], tokens: int) -> None:
        """A DEALER without limits of its own."""
        self._socket = _socket(zmq.DEALER)
        self._socket.connect(str(told["address"]))
        plan = chunk_plan(SHAPE, tokens)
        blocks = [memoryview(each) for each in sources(tokens)]
        self._blocks = [[block[one.offset : one.offset + one.length] for one in plan] for block in blocks]
        self._in_window = max(1, WINDOW_BYTES // plan[0].length)

    def prepare(self, tickets: Sequence[str]) -> None:
        """Nothing is to be done."""

    def send(self, tickets: Sequence[str], at_once: int) -> tuple[float, list[float]]:
        """The window alone bounds what is under way; with `at_once` 1, a block is."""
        ended = list[float]()
        under_way, answers, chunks = 0, 0, len(self._blocks[0])

        def answer() -> None:
            nonlocal under_way, answers
            self._socket.recv()
            under_way -= 1
            answers += 1
            if answers % chunks == 0:
                ended.append(time.monotonic())

        began = time.monotonic()
        for _, block in zip(tickets, itertools.cycle(self._blocks), strict=False):
            for chunk in block:
                if under_way == self._in_window:
                    answer()
                self._socket.send(chunk, copy=False)
                under_way += 1
            while under_way and at_once == 1:
                answer()
        while under_way:
            answer()
        return began, ended


class BareReceiver:
    """Copies every chunk to its place."""

    def listen(self, address: str, tokens: int, count: int) -> Mapping[str, Any]:
        """One ROUTER."""
        self._size = SHAPE.extent_bytes(tokens)
        self._plan = chunk_plan(SHAPE, tokens)
        self._memory = np.zeros(count * self._size, dtype=np.uint8)
        self._memory.fill(1)
        self._buffer = np.ones(max(CHUNK_BYTES, SHAPE.record_bytes), dtype=np.uint8)
        self._socket = _socket(zmq.ROUTER)
        self._socket.bind(address)
        self._thread = ThreadPoolExecutor(1)
        self._read: Future[int] | None = None
        return {"address": self._socket.getsockopt_string(zmq.LAST_ENDPOINT)}

    def expect(self, count: int) -> list[str]:
        """Reads on a thread."""
        self._read = self._thread.submit(self._take, count)
        return [""] * count

    def clear(self) -> int:
        """Blocks read."""
        return 0 if self._read is None else self._read.result(_TIMEOUT_SECONDS)

    def _take(self, count: int) -> int:
        for number in range(count):
            for chunk in self._plan:
                peer = self._socket.recv()
                size = self._socket.recv_into(self._buffer)
                start = number * self._size + chunk.offset
                np.copyto(self._memory[start : start + size], self._buffer[:size])
                self._socket.send_multipart([peer, b""])
        return count


def _socket(kind: int) -> zmq.Socket[bytes]:
    made = zmq.Context.instance().socket(kind)
    made.setsockopt(zmq.SNDHWM, 0)
    made.setsockopt(zmq.RCVHWM, 0)
    made.setsockopt(zmq.LINGER, 0)
    for option in (zmq.SNDTIMEO, zmq.RCVTIMEO):
        made.setsockopt(option, round(_TIMEOUT_SECONDS * 1e3))
    return made
