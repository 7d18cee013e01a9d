"""A slow, far and unreliable TCP wire: bytes arrive late, at a capped rate, stall, or stop in the middle of a message.

    sender ──TCP──▶ read ▶ paced: rate, delay, stalls ▶ queue ▶ gate: all, held, or cut ▶ write ──TCP──▶ target

It knows nothing of messages. The gate counts bytes towards the target over all connections, so that a test can say
between which two bytes of a chunk the wire stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from shared.runtime import cancelled

_PIECE_BYTES = 64 << 10
# What stalls is drawn once for so many bytes: the size of most chunks.
_STALL_EVERY_BYTES = 1 << 20
# What waits in a wire without a rate.
_UNPACED_PIECES = 64


@dataclass(frozen=True, slots=True)
class Weather:
    """What the wire does to bytes towards the target; answers suffer the delay alone.

    Args:
        delay_seconds: Of every byte, in each direction.
        rate: Most bytes a second; None for as fast as it goes.
        stall_share: Of MiBs that are held up, and all that follows them.
        stall_seconds: How long.
    """

    delay_seconds: float = 0.0
    rate: float | None = None
    stall_share: float = 0.0
    stall_seconds: float = 0.0


class TcpRelay:
    """Stands between senders and one receiver; an async context manager.

    Args:
        target: Where it leads, tcp://host:port; may be changed, and counts from the next connection on.
        weather: May be changed likewise.
        seed: Of the stalls.

    Attributes:
        address: Where senders connect, tcp://host:port.
        passed_bytes: Written towards the target.
        stalls_total: Stalls so far.
        connections_total: Connections so far.
        cuts_total: Connections cut so far.
    """

    def __init__(self, target: str, weather: Weather | None = None, seed: int = 1) -> None:
        self.target = target
        self.weather = weather or Weather()
        self.address = ""
        self.passed_bytes = self.stalls_total = self.connections_total = self.cuts_total = 0
        self._draw = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: dict[int, tuple[asyncio.StreamWriter, ...]] = {}
        self._numbers = itertools.count()
        # Count of passed bytes at which something happens.
        self._stop_at: int | None = None
        self._cuts = False
        self._stopped = asyncio.Event()
        self._go_on = asyncio.Event()
        self._go_on.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            await cancelled(task)
        await self._server.wait_closed()

    def hold_after(self, size: int) -> asyncio.Event:
        """Lets so many more bytes through, then none until `go_on`; the event says when it has come to that."""
        return self._at(size, cuts=False)

    def cut_after(self, size: int) -> asyncio.Event:
        """Lets so many more bytes through, then cuts every connection; new ones pass freely."""
        return self._at(size, cuts=True)

    def go_on(self) -> None:
        """Ends a hold, and whatever was still to happen."""
        self._stop_at = None
        self._go_on.set()

    def cut(self) -> None:
        """Cuts every connection at once, with a reset."""
        for number in list(self._writers):
            self._abort(number)

    def _at(self, size: int, *, cuts: bool) -> asyncio.Event:
        self._stop_at, self._cuts = self.passed_bytes + size, cuts
        self._stopped = asyncio.Event()
        return self._stopped

    def _stalls(self) -> bool:
        stalls = self._draw.random() < self.weather.stall_share
        self.stalls_total += stalls
        return stalls

    def _abort(self, number: int) -> None:
        for writer in self._writers.pop(number, ()):
            writer.transport.abort()
        self.cuts_total += 1

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        number = next(self._numbers)
        self.connections_total += 1
        writers = [writer]
        try:
            host, _, port = self.target.removeprefix("tcp://").rpartition(":")
            back_reader, back_writer = await asyncio.open_connection(host, int(port))
            writers.append(back_writer)
            self._writers[number] = tuple(writers)
            await self._both(reader, back_writer, back_reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # the target is not there, an end is gone, or the relay closes: connections are cut all the same
        finally:
            self._writers.pop(number, None)
            for one in writers:
                one.transport.abort()
            self._tasks.discard(task)

    async def _both(
        self,
        reader: asyncio.StreamReader,
        back_writer: asyncio.StreamWriter,
        back_reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Carries until one side ends."""
        weather = self.weather
        there, back = Line(weather, self._stalls), Line(Weather(weather.delay_seconds), lambda: False)
        running = [
            asyncio.create_task(there.fill(reader)),
            asyncio.create_task(back.fill(back_reader)),
            asyncio.create_task(self._pour(there, back_writer, gated=True)),
            asyncio.create_task(self._pour(back, writer, gated=False)),
        ]
        try:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in running:
                with contextlib.suppress(OSError):
                    await cancelled(task)

    async def _pour(self, line: Line, writer: asyncio.StreamWriter, *, gated: bool) -> None:
        while True:
            piece = await line.due()
            if gated and self._stop_at is not None and self.passed_bytes + len(piece) >= self._stop_at:
                piece = await self._stop(piece, writer)
            if gated:
                await self._go_on.wait()
                self.passed_bytes += len(piece)
            writer.write(piece)
            await writer.drain()

    async def _stop(self, piece: bytes, writer: asyncio.StreamWriter) -> bytes:
        """Passes what may pass of a piece, and does what was to happen; the rest of it."""
        assert self._stop_at is not None
        head = piece[: self._stop_at - self.passed_bytes]
        writer.write(head)
        await writer.drain()
        self.passed_bytes += len(head)
        self._stop_at = None
        if self._cuts:
            self.cut()
            self._stopped.set()
            raise ConnectionResetError
        self._go_on.clear()
        self._stopped.set()
        await self._go_on.wait()
        return piece[len(head) :]


class Line:
    """One direction of one connection: pieces and when each of them arrives."""

    def __init__(self, weather: Weather, stalls: Callable[[], bool]) -> None:
        self._weather = weather
        self._stalls = stalls
        self._free_at = 0.0
        self._carried = 0
        pieces = _UNPACED_PIECES
        if weather.rate is not None:  # as much as is on such a wire at once, and a little for its switches
            pieces = int(weather.rate * weather.delay_seconds + _STALL_EVERY_BYTES) // _PIECE_BYTES
        self._queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(pieces)

    async def fill(self, reader: asyncio.StreamReader) -> None:
        """Takes what comes, until it ends."""
        loop, weather = asyncio.get_running_loop(), self._weather
        while piece := await reader.read(_PIECE_BYTES):
            self._free_at = max(self._free_at, loop.time())
            before, self._carried = self._carried, self._carried + len(piece)
            if before // _STALL_EVERY_BYTES != self._carried // _STALL_EVERY_BYTES and self._stalls():
                self._free_at += weather.stall_seconds
            if weather.rate is not None:
                self._free_at += len(piece) / weather.rate
            await self._queue.put((self._free_at + weather.delay_seconds, piece))

    async def due(self) -> bytes:
        """The next piece, when its time has come."""
        at, piece = await self._queue.get()
        left = at - asyncio.get_running_loop().time()
        if left > 0:
            await asyncio.sleep(left)
        return piece
