"""One process that the supervisor started: its output, its readiness, its end."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
import subprocess
import threading
from typing import IO, TYPE_CHECKING, Final

import grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

_LAST_LINES: Final = 20
_LONGEST_LINE: Final = 64 * 1024
_PROBE_SECONDS: Final = 1.0


class Child:
    """A process in a session of its own, so that a terminal's Ctrl-C reaches the supervisor alone.

    This object owns the process and its group: `reap` is the only end of both.

    Args:
        name: Label, such as "prefill-0".
        command: Program and arguments.
        ready_file: JSON file that the process writes once it serves.
        relay: Called with the name and each line that the process writes, from a thread.
        environment: Its environment.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        ready_file: Path,
        relay: Callable[[str, str], None],
        environment: Mapping[str, str],
    ) -> None:
        self.name = name
        self._ready_file = ready_file
        self._relay = relay
        self._last_lines: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**environment, "PYTHONUNBUFFERED": "1"},
        )
        self._reader = threading.Thread(target=self._read, name=f"read-{name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id, which is the group's too."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """True until the process has ended."""
        return self._process.poll() is None

    def address(self) -> str | None:
        """Its gRPC host:port once it serves; None before."""
        try:
            said = json.loads(self._ready_file.read_text())
        except FileNotFoundError:
            return None
        address = str(said["grpc_address"])
        return address if _serving(address) else None

    def epitaph(self) -> str:
        """How the process ended, and its last lines."""
        # Its pipe may stay open in a grandchild; the lines so far are enough then.
        self._reader.join(_PROBE_SECONDS)
        code = self._process.poll()
        if code is None:
            how = "is still running"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"exited with code {code}"
        lines = "".join(f"\n    {line}" for line in self._last_lines)
        return f"{self.name} {how}" + (f"; its last lines:{lines}" if lines else " and wrote nothing")

    def terminate(self) -> None:
        """Asks the process to stop."""
        self._process.terminate()

    def reap(self) -> None:
        """Kills what is left of the process and its group, and collects it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(_PROBE_SECONDS)
        if not self._reader.is_alive() and self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        stream: IO[bytes] | None = self._process.stdout
        if stream is None:
            return
        while raw := stream.readline(_LONGEST_LINE):
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            self._last_lines.append(line)
            self._relay(self.name, line)


def _serving(address: str) -> bool:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_PROBE_SECONDS)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
