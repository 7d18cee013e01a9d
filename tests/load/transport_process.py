r"""A side in a process of its own, told what to do by lines of JSON.

python -m tests.load.transport_process WAY {sender,receiver}

parent ── {"do": "expect", "count": 32}\n ──▶ child's input
       ◀────────── {"tickets": [...]}\n ───── child's output          its log and its errors go where the parent's go
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, TextIO

from tests.load.peers.bare_pyzmq import BareReceiver, BareSender
from tests.load.peers.plain_socket import PlainReceiver, PlainSender
from tests.load.transport_ours import OurReceiver, OurSender
from tests.load.transport_sides import ReceivingSide, SendingSide, busy_seconds

Ends = tuple[Callable[[], SendingSide], Callable[[], ReceivingSide]]
WAYS: Final[Mapping[str, Ends]] = {
    "drystone": (OurSender, OurReceiver),
    "drystone, CURVE": (OurSender, lambda: OurReceiver(secured=True)),
    "drystone, no checksum": (OurSender, lambda: OurReceiver(summed=False)),
    "pyzmq and memcpy": (BareSender, BareReceiver),
    "plain socket": (PlainSender, PlainReceiver),
}
_STOP_SECONDS = 10.0


class Process:
    """The parent's end of one side. Ended with `close`, whatever it was doing.

    Args:
        way: A name of `WAYS`.
        side: "sender" or "receiver".
    """

    def __init__(self, way: str, side: str) -> None:
        command = [sys.executable, "-m", __spec__.name, way, side]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def tell(self, do: str, **fields: Any) -> None:
        """Has it do something; `answer` waits until it is done."""
        _write(_pipe(self._process.stdin), {"do": do, **fields})

    def answer(self) -> dict[str, Any]:
        """What it says to the last `tell`; raises ChildProcessError when it has ended instead."""
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise ChildProcessError(f"{self._process.args} ended with code {self._process.wait(_STOP_SECONDS)}")
        told: dict[str, Any] = json.loads(line)
        return told

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Both."""
        self.tell(do, **fields)
        return self.answer()

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait(_STOP_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            _pipe(pipe).close()


def _pipe(pipe: Any) -> TextIO:
    made: TextIO = pipe
    return made


def _write(to: TextIO, message: Mapping[str, Any]) -> None:
    to.write(json.dumps(message) + "\n")
    to.flush()


def _sender(side: SendingSide, told: dict[str, Any]) -> dict[str, Any]:
    match told.pop("do"):
        case "connect":
            side.connect(told["told"], told["tokens"])
            return {}
        case "prepare":
            side.prepare(told["tickets"])
            return {}
        case "send":
            busy = busy_seconds()
            began, ended = side.send(told["tickets"], told["at_once"])
            return {"began": began, "ended": ended, "busy_seconds": busy_seconds() - busy}
        case other:
            raise ValueError(other)


def _receiver(side: ReceivingSide, told: dict[str, Any]) -> dict[str, Any]:
    match told.pop("do"):
        case "listen":
            return {"told": side.listen(told["address"], told["tokens"], told["count"])}
        case "expect":
            return {"tickets": side.expect(told["count"]), "busy_seconds": busy_seconds()}
        case "clear":
            busy = busy_seconds()
            return {"blocks": side.clear(), "busy_seconds": busy}
        case other:
            raise ValueError(other)


def main() -> int:
    """Does what it is told until its input ends."""
    import torch

    from shared import logs

    way, side = sys.argv[1:]
    output, sys.stdout = sys.stdout, sys.stderr  # what anything prints must not be taken for an answer
    logs.configure("error", "json")
    torch.set_num_threads(1)
    if side == "sender":
        sender = WAYS[way][0]()
        for line in sys.stdin:
            _write(output, _sender(sender, json.loads(line)))
    else:
        receiver = WAYS[way][1]()
        for line in sys.stdin:
            _write(output, _receiver(receiver, json.loads(line)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
