"""A worker's handle on the process that owns one two-rank group (`group_process.py`).

    owner's thread                                     process
    start ───────────── Order ────────────────────────▶ joins
    poll(fileno) ◀───── LISTENING, READY ──────────────
    run(data) ── copy into staging ── RUN ────────────▶ group.send
    poll(fileno) ◀───── DONE ──────────────────────────

Nothing here waits for the process: its pipe is polled by the thread that owns the handle, and whatever takes too long
is `overdue`, upon which the owner kills it. Staging is a memfd: gone with the last of the two that maps it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np

from shared import logs
from shared.transfer.choice import Backend
from shared.transfer.group_messages import RECORD, Kind, Order, Role
from shared.transfer.ring import Ring

# Groups do not leave the host (choice.py).
LOOPBACK = "127.0.0.1"
# For the two to meet: each has torch to import first.
MEET_SECONDS = 60.0
# For one run to pass, behind those before it.
RUN_SECONDS = 5.0
STAGING_BYTES = 24 << 20
# Runs that the process has not done: their records fit into a pipe.
MAX_RUNS = 1024
_KILL_SECONDS = 1.0
_DYING_WORDS = "the process of the group ended"


@dataclass(frozen=True, slots=True)
class Event:
    """What the process has said.

    Attributes:
        kind: LISTENING, READY, DONE, or FAILED, which is the last.
        number: The port; or the run.
        text: Why it failed.
    """

    kind: Kind
    number: int = 0
    text: str = ""


class PairGroup:
    """One end of a group. Used by one thread alone, the one that ends last: the process is killed with it.

    Args:
        role: Of this end.
        backend: What carries it.
        name: Of the group, the same on both ends, known to nobody else.
        port: Where the receiving end's process listens; 0 for that end itself.
        ordinal: Of the GPU, for NCCL.
        staging_bytes: Runs in the process's hands fit into it: a pair's window, and what a ring wastes.
        meet_seconds: Longest time until READY.
        run_seconds: Longest time until DONE, for the oldest run.

    Attributes:
        ready: Bytes have gone both ways.

    Raises:
        OSError: There is no memory, or no process can be started.
    """

    def __init__(
        self,
        role: Role,
        backend: Backend,
        name: str,
        port: int = 0,
        ordinal: int = 0,
        staging_bytes: int = STAGING_BYTES,
        meet_seconds: float = MEET_SECONDS,
        run_seconds: float = RUN_SECONDS,
    ) -> None:
        self.ready = False
        self._role, self._meet_seconds, self._run_seconds = role, meet_seconds, run_seconds
        self._ring = Ring(staging_bytes)
        self._since: deque[float] = deque()
        self._numbers = self._done = 0
        self._heard = b""
        self._log = logs.get("group")
        self._began = time.monotonic()
        staging = os.memfd_create("drystone-group")
        try:
            os.ftruncate(staging, staging_bytes)
            self._staging = mmap.mmap(staging, staging_bytes)
            self._process = _started(staging)
        finally:
            os.close(staging)
        self._to, self._from = cast("IO[bytes]", self._process.stdin), cast("IO[bytes]", self._process.stdout)
        for pipe in (self._to, self._from):
            os.set_blocking(pipe.fileno(), False)
        # In the process a limit guards against being orphaned; the times that count are kept here.
        seconds = max(meet_seconds, run_seconds)
        order = Order(role, backend, LOOPBACK, port, name, ordinal, seconds, staging, staging_bytes)
        self._write(order.line())

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def runs(self) -> int:
        """Runs that are in the process's hands, or done and not taken."""
        return len(self._ring)

    def fileno(self) -> int:
        """To poll for reading: there may be events."""
        return self._from.fileno()

    def send(self, data: memoryview) -> int | None:
        """Hands over a run and returns its number, from 1; None while there is no room for it."""
        place = self._posted(len(data))
        if place is not None:
            target = np.frombuffer(self._staging, dtype=np.uint8, count=len(data), offset=place)
            np.copyto(target, np.frombuffer(data, dtype=np.uint8))
            self._command(place, len(data))
        return None if place is None else self._numbers

    def receive(self, length: int) -> int | None:
        """Makes ready for the next run of the other end; its number, None while there is no room for it."""
        place = self._posted(length)
        if place is not None:
            self._command(place, length)
        return None if place is None else self._numbers

    def received(self) -> memoryview:
        """Bytes of the oldest run, after its DONE and until `release`."""
        offset, length = self._ring.oldest
        return memoryview(self._staging)[offset : offset + length]

    def release(self) -> None:
        """The oldest received run has been used; no view of it is left."""
        self._ring.drop()

    def events(self) -> list[Event]:
        """What the process has said since; never waits."""
        try:
            piece = os.read(self.fileno(), 1 << 16)
        except BlockingIOError:
            return []
        if not piece:
            return [Event(Kind.FAILED, 0, _DYING_WORDS)]
        self._heard += piece
        return self._parsed()

    def overdue(self, now: float) -> str | None:
        """What has taken too long; None while nothing has."""
        if not self.ready:
            return "rendezvous" if now - self._began > self._meet_seconds else None
        return "timeout" if self._since and now - self._since[0] > self._run_seconds else None

    def kill(self) -> None:
        """Ends it, whatever it is doing; within a second. Twice is as once."""
        self._process.kill()
        try:
            self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            # In the kernel's hands, as with a GPU that hangs; subprocess reaps it when the next one is started.
            self._log.error("process_stuck", pid=self.pid)
        with contextlib.suppress(BrokenPipeError):  # what it did not read is of no use any more
            self._to.close()
        self._from.close()
        self._staging.close()

    def _posted(self, length: int) -> int | None:
        return None if len(self._since) >= MAX_RUNS else self._ring.take(length)

    def _command(self, place: int, length: int) -> None:
        self._numbers += 1
        # Runs handed over before the two have met wait for nothing but that.
        self._since.append(time.monotonic())
        self._write(RECORD.pack(Kind.RUN, self._numbers, place, length))

    def _write(self, message: bytes) -> None:
        try:
            os.write(self._to.fileno(), message)
        except BrokenPipeError:
            self._log.info("group_process_gone", pid=self.pid)  # its other pipe says so too: FAILED follows

    def _parsed(self) -> list[Event]:
        events: list[Event] = []
        while len(self._heard) >= RECORD.size:
            kind, number, _, length = RECORD.unpack_from(self._heard)
            if len(self._heard) < RECORD.size + length:
                break
            text = self._heard[RECORD.size : RECORD.size + length].decode(errors="replace")
            self._heard = self._heard[RECORD.size + length :]
            events.append(self._event(Event(Kind(kind), number, text)))
        return events

    def _event(self, event: Event) -> Event:
        now = time.monotonic()
        if event.kind is Kind.READY:
            self.ready = True
            self._since = deque(now for _ in self._since)
        elif event.kind is Kind.DONE:
            self._since.popleft()
            if self._since:
                self._since[0] = now  # the next one's time begins
            if self._role == "send":
                self._ring.drop()
        return event


def _started(staging: int) -> subprocess.Popen[bytes]:
    import shared

    root = str(Path(shared.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "shared.transfer.group_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        pass_fds=(staging,),
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
