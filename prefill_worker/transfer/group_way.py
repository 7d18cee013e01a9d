"""A pair's process group, as its sender uses it: a way beside ZeroMQ that may be missing at any time.

    none ── a chunk to send ──▶ asked ──GroupInvite──▶ meeting ──▶ ready ── chunks
      ▲                           │                       │          │
      └─────── rest ◀─────────────┴── failed, counted ────┴──────────┤
      └──────────────────────────────────────────────────── idle ◀───┘

Until it is ready and after it failed, chunks go by ZeroMQ: `send` says None, and nobody waits for a group. Chunks that
a group took to its grave are answered by the receiver with NO_GROUP and sent again.
"""

from __future__ import annotations

from collections.abc import Callable

from shared import logs
from shared.internal.v1.transfer_pb2 import GroupAsk, GroupEnd, GroupInvite, TransferHeader
from shared.transfer.choice import Backend, End, wanted
from shared.transfer.group import MEET_SECONDS, PairGroup
from shared.transfer.group_messages import GROUP_IDLE, MAX_NAME_BYTES, Kind
from shared.transfer.pair_stats import PairStats
from shared.transfer.reactor import Reactor

# After a failure, until a group is asked for again.
REST_SECONDS = 30.0
# A group that carries nothing gives its memory back: 24 MiB of staging, and a process with torch in it, on either end.
GROUP_IDLE_SECONDS = 60.0
_MAX_PORT = 65535
_TICK_SECONDS = 0.25


class GroupWay:
    """Owns the sending end's process of one pair. Used by the sending thread alone.

    Args:
        end: This worker.
        reactor: Reads what the process says.
        tell: Sends a message to the receiver.
        stats: Of the pair; its transport is the group's name while that carries.
        on_fallback: Told why a group failed: "rendezvous", "timeout", "died", "start" or "peer".
    """

    def __init__(
        self,
        end: End,
        reactor: Reactor,
        tell: Callable[[TransferHeader], None],
        stats: PairStats,
        on_fallback: Callable[[str], None],
    ) -> None:
        self.end = end
        self._reactor = reactor
        self._tell = tell
        self._stats = stats
        self._on_fallback = on_fallback
        self._without = stats.transport
        self._backend: Backend | None = None
        self._group: PairGroup | None = None
        self._number = 0
        self._asked_at: float | None = None
        self._rest_until = self._used_at = 0.0
        self._log = logs.get("group")

    @property
    def process(self) -> int | None:
        """Process id of the group's owner, while there is one."""
        return None if self._group is None else self._group.pid

    @property
    def ready(self) -> bool:
        """True while it carries."""
        return self._group is not None and self._group.ready

    def welcomed(self, backend: str) -> None:
        """A session begins: with this group, should one be asked for; any other than this worker wants is none."""
        self.close()
        mine = wanted(self.end)
        self._backend = mine if backend == mine else None

    def send(self, data: memoryview, now: float) -> tuple[int, int] | None:
        """Takes a chunk's bytes: number of group and run. None: send it over ZeroMQ."""
        if self._group is not None:
            run = self._group.send(data) if self._group.ready else None
            if run is None:
                return None
            self._used_at = now
            return self._number, run
        if self._backend is not None and self._asked_at is None and now >= self._rest_until:
            self._asked_at = now
            self._tell(TransferHeader(group_ask=GroupAsk()))
        return None

    def invited(self, invite: GroupInvite, now: float) -> None:
        """The receiver's end waits."""
        self._number = invite.group
        fits = 0 < invite.port <= _MAX_PORT and 0 < len(invite.name.encode()) <= MAX_NAME_BYTES and invite.group
        if self._asked_at is None or self._backend is None or self._group is not None or not fits:
            self._tell(TransferHeader(group_end=GroupEnd(group=invite.group, reason="not asked for")))
            return
        try:
            self._group = PairGroup("send", self._backend, invite.name, invite.port, self.end.ordinal)
        except OSError as error:
            self._fail("start", str(error), now)
            return
        self._asked_at, self._used_at = None, now
        self._reactor.register_file(self._group.fileno(), self.read)

    def ended(self, end: GroupEnd, now: float) -> None:
        """The receiver has let go of it."""
        mine = end.group == self._number if self._group is not None else self._asked_at is not None
        if not mine:
            return
        if end.reason == GROUP_IDLE:
            self.close()
        else:
            self._fail("peer", end.reason[:200], now, told=True)

    def read(self) -> bool:
        """Takes what the process has said; False, for it takes all at once."""
        if self._group is None:
            return False
        for event in self._group.events():
            if event.kind is Kind.READY:
                self._stats.transport = str(self._backend)
                self._log.info("group_ready", receiver=self._stats.peer, backend=self._backend)
            elif event.kind is Kind.FAILED:
                self._fail("died", event.text, self._used_at)
                break
        return False

    def tick(self, now: float) -> float:
        """Ends what takes too long, or is not used; returns the seconds until it wants to look again."""
        if self._asked_at is not None and now - self._asked_at > MEET_SECONDS:
            self._fail("rendezvous", f"no invitation within {MEET_SECONDS} s", now)
        if self._group is None:
            return GROUP_IDLE_SECONDS if self._asked_at is None else _TICK_SECONDS
        overdue = self._group.overdue(now)
        if overdue is not None:
            self._fail(overdue, "no progress", now)
        elif self._group.ready and not self._group.runs and now - self._used_at > GROUP_IDLE_SECONDS:
            self._log.info("group_idle", receiver=self._stats.peer)
            self._tell(TransferHeader(group_end=GroupEnd(group=self._number, reason=GROUP_IDLE)))
            self.close()
        return _TICK_SECONDS

    def close(self) -> None:
        """Ends the process; chunks go by ZeroMQ from here on."""
        self._asked_at = None
        self._stats.transport = self._without
        if self._group is not None:
            group, self._group = self._group, None
            self._reactor.forget_file(group.fileno())
            group.kill()

    def _fail(self, reason: str, detail: str, now: float, *, told: bool = False) -> None:
        self.close()
        self._rest_until = now + REST_SECONDS
        self._stats.fallbacks_total += 1
        self._stats.last_error = f"group: {reason}: {detail}"
        self._on_fallback(reason)
        self._log.warning("group_failed", receiver=self._stats.peer, reason=reason, detail=detail)
        if not told:
            self._tell(TransferHeader(group_end=GroupEnd(group=self._number, reason=reason)))
