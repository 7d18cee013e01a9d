"""A sender and a receiver of one way of shipping, each in its process, and a round of blocks between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.load.transport_process import Process
from tests.load.transport_sides import SHAPE, Sent, Transport


@dataclass(frozen=True, slots=True)
class Round:
    """What one round took.

    Args:
        sent: The sender's part.
        receiver_busy_seconds: Processor time of the receiver.
    """

    sent: Sent
    receiver_busy_seconds: float

    @property
    def busy_per_gigabyte(self) -> tuple[float, float]:
        """Processor seconds of sender and receiver for 1e9 bytes."""
        gigabytes = len(self.sent.ended) * self.sent.block_bytes / 1e9
        return self.sent.busy_seconds / gigabytes, self.receiver_busy_seconds / gigabytes


class Pair:
    """Two processes, connected.

    Args:
        way: A name of `WAYS`.
        tokens: Of a block.
        count: Most blocks in a round.
    """

    def __init__(self, way: str, transport: Transport, folder: Path, tokens: int, count: int) -> None:
        self.way, self.tokens = way, tokens
        self.receiver = Process(way, "receiver")
        self.sender = Process(way, "sender")
        try:
            path = folder / f"{self.receiver.pid}.sock"
            address = "tcp://127.0.0.1:0" if transport == "tcp" else f"ipc://{path}"
            told = self.receiver.ask("listen", address=address, tokens=tokens, count=count)["told"]
            self.sender.ask("connect", told=told, tokens=tokens)
        except BaseException:
            self.close()
            raise

    def round(self, count: int, at_once: int) -> Round:
        """Sends so many blocks; every one must be in its place at the end."""
        self.begin(count, at_once)
        return self.end()

    def begin(self, count: int, at_once: int, *, go: bool = True) -> None:
        """Begins a round; `go` False leaves the sender waiting for `go`."""
        expected = self.receiver.ask("expect", count=count)
        self._count, self._tickets, self._at_once = count, expected["tickets"], at_once
        self._receiver_began = float(expected["busy_seconds"])
        self.sender.ask("prepare", tickets=self._tickets)
        if go:
            self.go()

    def go(self) -> None:
        """Has the sender send what was prepared."""
        self.sender.tell("send", tickets=self._tickets, at_once=self._at_once)

    def end(self) -> Round:
        """Waits until the round is over."""
        told = self.sender.answer()
        cleared = self.receiver.ask("clear")
        if cleared["blocks"] != self._count or len(told["ended"]) != self._count:
            raise AssertionError(f"{self.way}: {cleared['blocks']} of {self._count} blocks arrived")
        sent = Sent(told["began"], tuple(told["ended"]), SHAPE.extent_bytes(self.tokens), told["busy_seconds"])
        return Round(sent, cleared["busy_seconds"] - self._receiver_began)

    def close(self) -> None:
        """Ends both."""
        self.sender.close()
        self.receiver.close()


@contextlib.contextmanager
def pairs(ways: list[str], transport: Transport, folder: Path, tokens: int, count: int) -> Iterator[list[Pair]]:
    """Pairs that live together, so that they can take turns."""
    with contextlib.ExitStack() as stack:
        made = list[Pair]()
        for way in ways:
            made.append(Pair(way, transport, folder, tokens, count))
            stack.callback(made[-1].close)
        yield made
