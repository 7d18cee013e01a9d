"""A peer's process: pinned, watched until it is ready, paused while others are measured, and stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx2

# vLLM compiles at its first start: two minutes of a free core.
START_SECONDS: Final = 600.0
STOP_SECONDS: Final = 15.0
_POLL_SECONDS: Final = 0.2
_LAST_LINES: Final = 15


class PeerError(Exception):
    """A peer could not be installed or started; the message says why."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a peer's server is started.

    Args:
        command: Program and arguments.
        port: Port that it serves HTTP on, on loopback.
        environment: Variables beside those of this process.
        health: Path that answers 200 once requests are taken.
        engine: Title of the process that computes, where it is one of several; the others leave its core to it.
        helper_core: Core that the others move to once the server takes requests.
    """

    command: Sequence[str]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    health: str = "/health"
    engine: str = ""
    helper_core: int | None = None


class Server:
    """A running server of a peer and all its children, owned from start to stop.

    Args:
        launch: How it is started.
        core: Core that it is pinned to.
        log: File that its output goes to.

    Raises:
        PeerError: It ended, or did not answer in time; nothing is left running then.
    """

    def __init__(self, launch: Launch, core: int, log: Path) -> None:
        self.base_url = f"http://127.0.0.1:{launch.port}"
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["taskset", "-c", str(core), *launch.command],  # noqa: S607 - util-linux, wherever it is
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **launch.environment},
            )
        try:
            self._await_ready(launch.health)
            if launch.engine and launch.helper_core is not None:
                _move_helpers(self._process.pid, launch.engine, launch.helper_core)
        except BaseException:
            self.stop()
            raise

    def pause(self) -> None:
        """Takes all its processes off the cores: some peers poll while they have nothing to do."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it run again."""
        self._send(signal.SIGCONT)

    def stop(self) -> None:
        """Ends it with its children. May be called repeatedly."""
        for sent, seconds in ((signal.SIGCONT, 0.0), (signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
            self._send(sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def _send(self, sent: signal.Signals) -> None:
        # A server that died says so when it is asked next.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, sent)

    def _await_ready(self, health: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        with httpx2.Client(base_url=self.base_url, trust_env=False, timeout=2.0) as client:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise PeerError(f"it exited with code {self._process.returncode}; its last lines:\n{self._end()}")
                with contextlib.suppress(httpx2.TransportError):
                    if client.get(health).is_success:
                        return
                time.sleep(_POLL_SECONDS)
        raise PeerError(f"it did not answer within {START_SECONDS:g} s; its last lines:\n{self._end()}")

    def _end(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:])


def free_port() -> int:
    """A port of loopback that nobody holds now; servers that cannot choose one themselves are told it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _move_helpers(group: int, engine: str, core: int) -> None:
    """Pins every thread of every process of a group to a core, save the processes whose title begins with `engine`.

    Raises:
        PeerError: No process has that title, so nothing is known of who computes.
    """
    titles = {int(folder.name): _title(folder) for folder in Path("/proc").glob("[0-9]*")}
    members = {process: title for process, title in titles.items() if title and _group(process) == group}
    helpers = [process for process, title in members.items() if not title.startswith(engine)]
    if len(helpers) == len(members):
        raise PeerError(f"no process of it is titled {engine}: {', '.join(members.values())}")
    for process in helpers:
        for thread in Path(f"/proc/{process}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def _title(folder: Path) -> str:
    try:
        return (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _group(process: int) -> int:
    try:
        return os.getpgid(process)
    except ProcessLookupError:
        return 0
