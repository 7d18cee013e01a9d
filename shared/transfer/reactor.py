"""A thread that owns sockets, and everything that is known only behind them.

ZeroMQ's sockets belong to one thread. Here it is a thread of its own, so that copies and checksums hold up neither the
event loop nor the model, and so that no state behind the sockets needs a lock: other threads hand in calls.

    other threads ── call(f) ──▶ deque ─┐
                                        ├─▶ this thread: calls, then messages, then `tick`, again
    sockets ────────────────── poll ────┘
"""

from __future__ import annotations

import socket as sockets
import threading
import time
from collections import deque
from collections.abc import Callable

import zmq

from shared import logs
from shared.transfer.handshakes import Handshake, HandshakeMonitor

# Longest sleep: a defect in a timer must not stop the thread for good.
_LONGEST_SECONDS = 5.0
# Messages taken from one socket before the others have their turn.
_ROUND_MESSAGES = 64


class Reactor:
    """Polls sockets on one thread until stopped.

    Args:
        name: Of the thread and in logs.
        tick: Run after each round, on the thread; returns in how many seconds it wants to run again at the latest.

    Attributes:
        context: ZeroMQ context of every socket here.
        defects_total: Callbacks that raised; each is logged.
    """

    def __init__(self, name: str, tick: Callable[[float], float]) -> None:
        self.context = zmq.Context()
        self.defects_total = 0
        self._tick = tick
        self._name = name
        self._calls: deque[Callable[[], None]] = deque()
        self._signalled = False
        self._stopping = False
        self._wake_out, self._wake_in = sockets.socketpair()
        self._wake_in.setblocking(False)  # noqa: FBT003 - the library's own signature
        self._poller = zmq.Poller()
        self._poller.register(self._wake_in, zmq.POLLIN)
        self._readers: dict[zmq.Socket[bytes] | int, Callable[[], bool]] = {}
        self._monitors: dict[zmq.Socket[bytes], HandshakeMonitor] = {}
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._log = logs.get(name)

    def start(self) -> None:
        """Begins to poll."""
        self._thread.start()

    def call(self, function: Callable[[], None]) -> None:
        """Has the thread run `function` soon. From any thread; never blocks. What comes after `stop` is not run."""
        self._calls.append(function)
        # Lowered by the thread before it looks at the calls: one of the two sees the other's change.
        if not self._signalled:
            self._signalled = True
            self._wake_out.send(b"!")

    def register(self, socket: zmq.Socket[bytes], read: Callable[[], bool]) -> None:
        """Has `read` called while there may be messages; it takes one without waiting, and says whether it did."""
        self._readers[socket] = read
        self._poller.register(socket, zmq.POLLIN)

    def register_file(self, descriptor: int, read: Callable[[], bool]) -> None:
        """The same for an open file, such as a pipe; its owner closes it, after `forget_file`."""
        self._readers[descriptor] = read
        self._poller.register(descriptor, zmq.POLLIN)

    def forget_file(self, descriptor: int) -> None:
        """Looks no more; twice is as once."""
        if self._readers.pop(descriptor, None) is not None:
            self._poller.unregister(descriptor)

    def watch(self, socket: zmq.Socket[bytes], told: Callable[[Handshake], None]) -> None:
        """Has `told` called with the end of each handshake of a socket, until that one is forgotten."""
        monitor = self._monitors[socket] = HandshakeMonitor(self.context, socket, told)
        self.register(monitor.socket, monitor.read)

    def forget(self, socket: zmq.Socket[bytes]) -> None:
        """Closes a socket; what it has not sent is dropped."""
        monitor = self._monitors.pop(socket, None)
        if monitor is not None:
            monitor.end()
            self.forget(monitor.socket)
        if self._readers.pop(socket, None) is not None:
            self._poller.unregister(socket)
        socket.close(0)

    def stop(self, seconds: float = 5.0) -> bool:
        """Ends the thread, closes its sockets; False when it did not end in time, and then nothing is closed."""
        self._stopping = True
        if self._thread.is_alive():
            self.call(lambda: None)
            self._thread.join(seconds)
        if self._thread.is_alive():
            self._log.error("thread_stuck", thread=self._name, seconds=seconds)
            return False
        for socket in [*self._monitors, *self._readers]:
            if isinstance(socket, int):
                self.forget_file(socket)
            else:
                self.forget(socket)
        self.context.destroy(0)
        self._wake_in.close()
        self._wake_out.close()
        return True

    def _run(self) -> None:
        wait = 0.0
        while not self._stopping:
            ready = dict(self._poller.poll(round(max(0.0, min(wait, _LONGEST_SECONDS)) * 1e3)))
            if self._wake_in.fileno() in ready:
                self._wake_in.recv(64)
            self._signalled = False
            # As many as there are now: a call that hands in another must not hold up the messages.
            for _ in range(len(self._calls)):
                self._guarded(self._calls.popleft())
            for socket, read in list(self._readers.items()):
                if socket in ready:
                    self._drain(socket, read)
            wait = self._next()
        # What was handed in before `stop`: it may have to end what outlives the sockets.
        while self._calls:
            self._guarded(self._calls.popleft())

    def _drain(self, socket: zmq.Socket[bytes] | int, read: Callable[[], bool]) -> None:
        for _ in range(_ROUND_MESSAGES):
            if socket not in self._readers or not self._guarded(read):
                return

    def _next(self) -> float:
        try:
            return self._tick(time.monotonic())
        except Exception as error:  # noqa: BLE001 - as in _guarded
            self._defect(error)
            return _LONGEST_SECONDS

    def _guarded(self, function: Callable[[], bool | None]) -> bool:
        try:
            return bool(function())
        except Exception as error:  # noqa: BLE001 - a defect in one pair must not end the thread of all pairs
            self._defect(error)
            return False

    def _defect(self, error: Exception) -> None:
        self.defects_total += 1
        self._log.error("transfer_defect", exc_info=error)
