"""A gateway with its workers on this machine: started together, watched, and stopped together.

    prepare ──► start: workers, all at once ──► each ready? ──► gateway ──► ready? ──► wait ──► stop
                       │                          │                                      │
                       └── one dies or the time is up: stop everything, say which        └── one dies: likewise

After `stop` no process is left. Should this process be killed itself, its children see that and exit.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from drystone.local import commands
from drystone.local.child import Child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Self

    from drystone.local.options import ServeOptions

_POLL_SECONDS: Final = 0.05


class SupervisorError(Exception):
    """The processes could not be started, or one of them died; the message says which and how."""


class StopRequested(SupervisorError):  # noqa: N818 - not a failure
    """Stopping was asked for before everything was ready."""


class Supervisor:
    """The processes of one `drystone serve`, owned from their start to their end.

    Args:
        options: What to run.
        report: Takes one line about what happens, for people. Default: stderr.
        command: Program for a role ("prefill", "decode", "gateway") and index; flags are added.
        resolve: Finds the model for a name.
    """

    def __init__(
        self,
        options: ServeOptions,
        *,
        report: Callable[[str], None] | None = None,
        command: Callable[[str, int], list[str]] = commands.program,
        resolve: Callable[[str, Callable[[str], None]], commands.ServedModel] = commands.resolve_model,
    ) -> None:
        self._options = options
        self._report = report or _to_stderr
        self._report_lock = threading.Lock()
        self._command = command
        self._resolve = resolve
        self._model: commands.ServedModel | None = None
        self._folder: Path | None = None
        self._workers: list[Child] = []
        self._gateway: Child | None = None
        self._address = ""
        # Set from signal handlers: plain flags, for a handler must not take a lock.
        self._stop_requested = False
        self._stopping = False
        self._kill_now = False

    @property
    def address(self) -> str:
        """The gateway's host:port; empty before it is ready."""
        return self._address

    @property
    def description(self) -> str:
        """What runs, in a few words."""
        name = self._model.name if self._model else self._options.model
        return f"model {name}, {self._options.prefill} prefill, {self._options.decode} decode"

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name: "prefill-0", "decode-0", "gateway"."""
        return {child.name: child.pid for child in self._children}

    def prepare(self) -> None:
        """Obtains the model, which may take a download. Starts nothing.

        Raises:
            SupervisorError: When the model cannot be had.
        """
        if self._model is None:
            try:
                self._model = self._resolve(self._options.model, self._tell)
            except commands.ModelUnavailableError as error:
                raise SupervisorError(str(error)) from error

    def start(self) -> None:
        """Starts everything and returns when the gateway takes requests.

        Raises:
            SupervisorError: When a process dies, or the time is up; nothing is left running then.
            StopRequested: When `request_stop` was called meanwhile.
        """
        self.prepare()
        _require_free_port(self._options.host, self._options.port)
        self._folder = Path(tempfile.mkdtemp(prefix="drystone-"))
        try:
            self._start_all(time.monotonic() + self._options.start_seconds)
        except BaseException:
            self.stop()
            raise

    def wait(self) -> None:
        """Returns when stopping is asked for.

        Raises:
            SupervisorError: When a process died.
        """
        while not self._stop_requested:
            self._require_alive("")
            time.sleep(_POLL_SECONDS)

    def request_stop(self) -> None:
        """Asks `start` or `wait` to end; asked again, or while stopping, kills at once. Safe in a signal handler."""
        self._kill_now = self._stop_requested or self._stopping
        self._stop_requested = True

    def stop(self) -> None:
        """Stops the gateway, then the workers, and collects them. May be called repeatedly."""
        self._stopping = True
        if self._children:
            self._tell("stopping ...")
        self._end([self._gateway] if self._gateway else [])
        self._end(self._workers)
        self._gateway, self._workers = None, []
        self._stopping = False
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Self:
        """Starts."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops."""
        self.stop()

    @property
    def _children(self) -> list[Child]:
        return [*self._workers, *([self._gateway] if self._gateway else [])]

    def _start_all(self, deadline: float) -> None:
        if self._model is None or self._folder is None:
            raise SupervisorError("start() prepares both")
        for role, count in (("prefill", self._options.prefill), ("decode", self._options.decode)):
            for index in range(count):
                name = f"{role}-{index}"
                flags = commands.worker_flags(self._options, self._model, name, self._folder / f"{name}.json")
                self._workers.append(self._launch(name, [*self._command(role, index), *flags]))
        addresses = self._await_ready(self._workers, deadline)
        by_role = {
            role: [address for name, address in addresses.items() if name.startswith(f"{role}-")]
            for role in ("prefill", "decode")
        }
        flags = commands.gateway_flags(self._options, self._model, by_role, self._folder / "gateway.json")
        self._gateway = self._launch("gateway", [*self._command("gateway", 0), *flags])
        self._address = self._await_ready([self._gateway], deadline)["gateway"]

    def _launch(self, name: str, command: list[str]) -> Child:
        if self._folder is None:
            raise SupervisorError("no folder for ready files")
        self._tell(f"starting {name}")
        environment = commands.environment(name.partition("-")[0], os.environ)
        return Child(name, command, self._folder / f"{name}.json", self._relay, environment)

    def _await_ready(self, children: Iterable[Child], deadline: float) -> dict[str, str]:
        waiting = list(children)
        addresses: dict[str, str] = {}
        while len(addresses) < len(waiting):
            if self._stop_requested:
                raise StopRequested("stopped before it was ready")
            self._require_alive(" before it was ready")
            if time.monotonic() > deadline:
                late = ", ".join(child.name for child in waiting if child.name not in addresses)
                raise SupervisorError(f"{late} not ready after {self._options.start_seconds:g} s")
            for child in waiting:
                if child.name not in addresses and (address := child.address()):
                    addresses[child.name] = address
            time.sleep(_POLL_SECONDS)
        return {child.name: addresses[child.name] for child in waiting}

    def _require_alive(self, when: str) -> None:
        for child in self._children:
            if not child.running:
                raise SupervisorError(f"a process ended{when}: {child.epitaph()}")

    def _end(self, children: list[Child]) -> None:
        for child in children:
            child.terminate()
        deadline = time.monotonic() + self._options.grace_seconds
        while [child for child in children if child.running] and time.monotonic() < deadline and not self._kill_now:
            time.sleep(_POLL_SECONDS)
        for child in children:
            if child.running:
                self._tell(f"{child.name} did not stop: killed")
            child.reap()

    def _relay(self, name: str, line: str) -> None:
        # JSON lines name their process themselves and must stay JSON.
        self._tell(line if self._options.json_logs and line.startswith("{") else f"[{name}] {line}")

    def _tell(self, line: str) -> None:
        with self._report_lock:
            self._report(line)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is a command's voice


def _require_free_port(host: str, port: int) -> None:
    """Refuses a port in use before models are loaded."""
    if not port:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SupervisorError(f"cannot serve on {host}:{port}: {error.strerror}; choose another --port") from error
