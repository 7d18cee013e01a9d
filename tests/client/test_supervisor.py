"""The supervisor with real, small processes: readiness, deaths, stopping, and nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from drystone.local import commands
from drystone.local.commands import ModelUnavailableError, ServedModel
from drystone.local.options import ServeOptions
from drystone.local.supervisor import Supervisor, SupervisorError

if TYPE_CHECKING:
    from collections.abc import Callable

FAKE = str(Path(__file__).with_name("fake_process.py"))
OPTIONS = ServeOptions(port=0, start_seconds=30.0, grace_seconds=3.0, threads=1)


class Watched(Supervisor):
    """A supervisor of fake processes that remembers what it said and every process it started."""

    def __init__(self, options: ServeOptions = OPTIONS, **modes: str) -> None:
        self.said: list[str] = []
        self.started: dict[str, int] = {}
        super().__init__(
            options,
            report=self.said.append,
            command=lambda role, _: [sys.executable, FAKE, modes.get(role, "normal")],
            resolve=lambda name, _: ServedModel(Path("/models") / name, "Tiny"),
        )

    def _launch(self, name: str, command: list[str]) -> Any:
        child = super()._launch(name, command)
        self.started[name] = child.pid
        return child

    def assert_nothing_left(self) -> None:
        assert self.started
        for name, pid in self.started.items():
            assert not _alive(pid), name
        assert self.pids == {}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_start_and_stop() -> None:
    supervisor = Watched()
    with supervisor:
        assert set(supervisor.pids) == {"prefill-0", "decode-0", "gateway"}
        host, port = supervisor.address.split(":")
        socket.create_connection((host, int(port)), timeout=5).close()
        assert supervisor.description == "model Tiny, 1 prefill, 1 decode"
        folder = supervisor._folder
        assert folder is not None
        supervisor.request_stop()
        supervisor.wait()
    supervisor.assert_nothing_left()
    assert not folder.exists()
    supervisor.stop()
    flags = next(line for line in supervisor.said if line.startswith("[prefill-0] argv"))
    for flag in ("--model /models/default", "--model-name Tiny", "--worker-id prefill-0", "--threads 1", "--port 0"):
        assert flag in flags
    assert f"--exit-with-parent {os.getpid()}" in flags
    flags = next(line for line in supervisor.said if line.startswith("[gateway] argv"))
    assert "--prefill-workers 127.0.0.1:" in flags
    assert "--decode-workers 127.0.0.1:" in flags
    assert not any("killed" in line for line in supervisor.said)
    assert supervisor.said.count("stopping ...") == 1


def test_draining_leaves_time_to_exit() -> None:
    options = ServeOptions()
    model = ServedModel(Path("/models/tiny"), "Tiny")
    flags = commands.worker_flags(options, model, "prefill-0", Path("ready.json"))
    assert flags[flags.index("--drain-seconds") + 1] == "4"
    assert options.grace_seconds == 10


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads environments through /proc")
def test_processes_do_not_inherit_what_the_flags_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "PORT", "HOST", "THREADS", "PREFILL", "POOL_BYTES", "METRICS_PORT"):
        monkeypatch.setenv(f"DRYSTONE_{name}", "7")
    with Watched() as supervisor:
        given = {
            name: {entry.partition("=")[0] for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")}
            for name, pid in supervisor.pids.items()
        }
    both = {"DRYSTONE_POOL_BYTES"}
    ours = {name: {each for each in names if each.startswith("DRYSTONE_")} for name, names in given.items()}
    assert ours == {"prefill-0": both, "decode-0": both, "gateway": {*both, "DRYSTONE_METRICS_PORT"}}
    assert "PATH" in given["gateway"]


def test_a_death_at_start_is_told_and_stops_the_others() -> None:
    supervisor = Watched(decode="dies", prefill="silent")
    with pytest.raises(SupervisorError) as caught:
        supervisor.start()
    assert "decode-0 exited with code 7" in str(caught.value)
    assert "the model is made of straw" in str(caught.value)
    assert "gateway" not in supervisor.started
    supervisor.assert_nothing_left()


def test_a_death_later_is_told() -> None:
    supervisor = Watched(gateway="dies_later")
    with pytest.raises(SupervisorError, match="gateway was killed by SIGKILL"), supervisor:
        supervisor.wait()
    supervisor.assert_nothing_left()


def test_who_ignores_sigterm_is_killed() -> None:
    supervisor = Watched(replace(OPTIONS, grace_seconds=0.3), prefill="stubborn")
    with supervisor:
        pass
    assert "prefill-0 did not stop: killed" in supervisor.said
    supervisor.assert_nothing_left()


@pytest.mark.parametrize("mode", ["silent", "not_serving"])
def test_who_is_never_ready_is_named(mode: str) -> None:
    supervisor = Watched(replace(OPTIONS, start_seconds=2.0), decode=mode)
    with pytest.raises(SupervisorError, match="decode-0 not ready after 2 s"):
        supervisor.start()
    supervisor.assert_nothing_left()


def test_a_port_in_use_is_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        supervisor = Watched(replace(OPTIONS, port=taken.getsockname()[1]))
        with pytest.raises(SupervisorError, match="choose another --port"):
            supervisor.start()
    assert supervisor.started == {}


def test_a_missing_model_is_refused_before_anything_starts() -> None:
    def resolve(name: str, announce: Callable[[str], None]) -> ServedModel:
        del announce
        raise ModelUnavailableError(f"no {name}")

    with pytest.raises(SupervisorError, match="no default"):
        Supervisor(OPTIONS, resolve=resolve).start()


SERVE = """
import sys
from pathlib import Path
from drystone.cli.serve import _run
from drystone.local.commands import ServedModel
from drystone.local.options import ServeOptions
from drystone.local.supervisor import Supervisor

supervisor = Supervisor(
    ServeOptions(port=0, grace_seconds=float(sys.argv[2])),
    command=lambda role, index: [sys.executable, sys.argv[1], sys.argv[3] if role == "prefill" else "normal"],
    resolve=lambda name, announce: ServedModel(Path(name), "Tiny"),
)
_run(supervisor)
"""


def _serve(grace_seconds: float, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SERVE, FAKE, str(grace_seconds), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds children through /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(number: signal.Signals) -> None:
    with _serve(10.0, "normal") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: http2 gRPC gateway at 127.0.0.1:")
        assert line.endswith("(model Tiny, 1 prefill, 1 decode)\n")
        children = _children(process.pid)
        assert len(children) == 3
        process.send_signal(number)
        assert process.wait(10) == 0
    assert not any(_alive(child) for child in children)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds children through /proc")
def test_a_second_signal_kills_at_once() -> None:
    with _serve(30.0, "stubborn") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready:")
        children = _children(process.pid)
        process.send_signal(signal.SIGINT)
        _until(lambda: len(_children(process.pid)) == 1)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    assert not any(_alive(child) for child in children)
