"""Process groups of this worker's pairs, the receiving end: runs of bytes that belong to headers come by ZeroMQ.

    ZeroMQ ── Chunk(group, run 7) ──▶ waiting: [run 5, run 6, Ping, run 7]
    group ─── bytes of run 5 ───────▶ staging ─▶ take: fenced, copied, summed as what ZeroMQ brings ─▶ answer

Every header's run is received, wanted or not, so that both ends stay in step; a gap ends the group. A Ping is answered
behind the runs before it, for its Pong says that they will not be answered any more.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import partial

from shared import logs
from shared.internal.v1.transfer_pb2 import Chunk, GroupEnd, GroupInvite, PairEnd, Ping, TransferHeader
from shared.transfer.choice import Backend, End, chosen, heard
from shared.transfer.group import PairGroup
from shared.transfer.group_messages import GROUP_IDLE, Kind
from shared.transfer.reactor import Reactor

# Each has a process with torch in it and 24 MiB of staging.
MAX_GROUPS = 16
# Longer than a sender's: it is the one that says so, where it lives.
GROUP_IDLE_SECONDS = 120.0
_TICK_SECONDS = 0.25
_RESTING_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class PairPort:
    """What a group needs of its pair.

    Attributes:
        take: Takes a chunk with the bytes that came for it, and answers.
        lost: Answers a chunk whose bytes will not come.
        pong: Answers a Ping.
        send: Sends a message to the sender.
        failed: Told why the group failed.
    """

    take: Callable[[Chunk, memoryview], None]
    lost: Callable[[Chunk], None]
    pong: Callable[[Ping], None]
    send: Callable[[TransferHeader], None]
    failed: Callable[[str], None]


@dataclass(slots=True, eq=False)
class _Run:
    """A chunk whose bytes are on their way, and the Pings that came behind its header."""

    chunk: Chunk
    pings: list[Ping] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Runs:
    """One pair's group, and the runs that it has not brought yet."""

    number: int
    name: str
    group: PairGroup
    port: PairPort
    waiting: deque[_Run] = field(default_factory=deque)
    used_at: float = field(default_factory=time.monotonic)


class Groups:
    """Owns the processes. Used by the receiving thread alone.

    Args:
        end: This worker.
        reactor: Reads what the processes say.
    """

    def __init__(self, end: End, reactor: Reactor) -> None:
        self._end = end
        self._reactor = reactor
        self._numbers = itertools.count(1)
        self._runs: dict[bytes, _Runs] = {}
        self._log = logs.get("group")
        self.received_runs = 0

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def processes(self) -> list[int]:
        """Process ids of the groups' owners."""
        return [runs.group.pid for runs in self._runs.values()]

    def choice(self, sender: PairEnd) -> Backend | None:
        """The group that a sender may ask for."""
        return chosen(heard(sender), self._end)

    def ask(self, pair: bytes, backend: Backend | None, port: PairPort) -> None:
        """Begins a group; the sender is invited once it listens, or told why not."""
        self.forget(pair)
        if backend is None or len(self._runs) >= MAX_GROUPS:
            why = "no group was chosen" if backend is None else f"there are {MAX_GROUPS} groups"
            port.send(TransferHeader(group_end=GroupEnd(reason=why)))
            return
        name = secrets.token_hex(16)
        try:
            group = PairGroup("receive", backend, name, ordinal=self._end.ordinal)
        except OSError as error:
            self._log.warning("group_not_started", detail=str(error))
            port.send(TransferHeader(group_end=GroupEnd(reason="its process cannot be started")))
            return
        self._runs[pair] = _Runs(next(self._numbers), name, group, port)
        self._reactor.register_file(group.fileno(), partial(self._read, pair))

    def expect(self, pair: bytes, chunk: Chunk) -> bool:
        """Makes ready for the bytes of a chunk; False where they will not come."""
        runs = self._runs.get(pair)
        if runs is None or runs.number != chunk.group:
            return False
        runs.used_at = time.monotonic()
        # A length that no staging has room for is refused by the group's ring, before anything is touched.
        if runs.group.receive(chunk.length) != chunk.run:
            self._break(pair, f"out of step at run {chunk.run} of {chunk.length} bytes")
            return False
        runs.waiting.append(_Run(chunk))
        return True

    def hold(self, pair: bytes, ping: Ping) -> bool:
        """Keeps a Ping behind the runs before it; False where there are none."""
        runs = self._runs.get(pair)
        if runs is None or not runs.waiting:
            return False
        runs.waiting[-1].pings.append(ping)
        return True

    def ended(self, pair: bytes, number: int) -> None:
        """The sender has let go of a group."""
        runs = self._runs.get(pair)
        if runs is not None and runs.number == number:
            self._drop(pair)

    def forget(self, pair: bytes) -> None:
        """The pair is no more, or begins anew: nobody waits for an answer."""
        runs = self._runs.get(pair)
        if runs is not None:
            runs.waiting.clear()
            self._drop(pair)

    def tick(self, now: float, pairs: Container[bytes]) -> float:
        """Ends groups that make no progress, have nothing to do, or belong to none of `pairs`; seconds to the next."""
        for pair, runs in list(self._runs.items()):
            overdue = runs.group.overdue(now)
            if pair not in pairs:
                self.forget(pair)
            elif overdue is not None:
                self._break(pair, overdue)
            elif not runs.waiting and now - runs.used_at > GROUP_IDLE_SECONDS:
                self._break(pair, GROUP_IDLE)
        return _TICK_SECONDS if self._runs else _RESTING_SECONDS

    def close(self) -> None:
        """Ends every process."""
        for pair in list(self._runs):
            self.forget(pair)

    def _read(self, pair: bytes) -> bool:
        runs = self._runs.get(pair)
        for event in [] if runs is None else runs.group.events():
            if runs is not self._runs.get(pair) or runs is None:
                break  # what came before it has ended the group
            if event.kind is Kind.LISTENING:
                invite = GroupInvite(group=runs.number, name=runs.name, port=event.number)
                runs.port.send(TransferHeader(group_invite=invite))
            elif event.kind is Kind.FAILED:
                self._break(pair, event.text)
            elif event.kind is Kind.DONE:
                self._arrived(runs)
        return False

    def _arrived(self, runs: _Runs) -> None:
        run = runs.waiting.popleft()
        self.received_runs += 1
        with runs.group.received() as data:
            runs.port.take(run.chunk, data)
        runs.group.release()
        for ping in run.pings:
            runs.port.pong(ping)

    def _break(self, pair: bytes, reason: str) -> None:
        """Ends a group from this side; the sender hears of it before it hears of what was lost."""
        runs = self._runs[pair]
        if reason != GROUP_IDLE:
            runs.port.failed(reason)
        runs.port.send(TransferHeader(group_end=GroupEnd(group=runs.number, reason=reason)))
        self._drop(pair)

    def _drop(self, pair: bytes) -> None:
        runs = self._runs.pop(pair)
        self._reactor.forget_file(runs.group.fileno())
        runs.group.kill()
        for run in runs.waiting:
            runs.port.lost(run.chunk)
            for ping in run.pings:
                runs.port.pong(ping)
