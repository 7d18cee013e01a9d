"""The three programs, each started alone: health, reflection, readiness, SIGTERM, and a parent that is killed."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from drystone.v1.operations_pb2 import ProcessState
from shared.internal.v1 import worker_pb2
from shared.internal.v1.worker_pb2_grpc import WorkerStub
from tests.conftest import MakeFolder

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
ALWAYS = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
SERVICES = {
    "gateway": {"drystone.v1.Generation", "drystone.v1.Operations"},
    "prefill_worker": {"drystone.internal.v1.Prefill", "drystone.internal.v1.Worker"},
    "decode_worker": {"drystone.internal.v1.Decode", "drystone.internal.v1.Worker"},
}


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def runs(pid: int) -> bool:
    """False as well for a process that has ended and that nobody collects."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


class Program:
    """One program as a process of its own."""

    def __init__(self, name: str, folder: Path, model: Path, *flags: str) -> None:
        self.name = name
        self.ready_file = folder / f"{name}.json"
        command = [sys.executable, "-m", name, "--model", str(model), "--ready-file", str(self.ready_file), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def ready(self) -> dict[str, Any]:
        """What it wrote once it served."""
        until(lambda: self.ready_file.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.output()
        said: dict[str, Any] = json.loads(self.ready_file.read_text())
        return said

    @contextlib.contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        with grpc.insecure_channel(self.ready()["grpc_address"]) as channel:
            yield channel

    def health(self, service: str = "") -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        with self.channel() as channel:
            return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=10.0).status)

    def services(self) -> set[str]:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        with self.channel() as channel:
            replies = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
            return {service.name for service in next(iter(replies)).list_services_response.service}

    def output(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def test_each_serves_alone_and_ends_at_sigterm(tiny_folder: MakeFolder, tmp_path: Path) -> None:
    model = tiny_folder()
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
    worker = ("--dtype", "float32", "--threads", "1")
    started: list[Program] = []
    try:
        gateway = Program("gateway", tmp_path, model, "--decode-workers", f"127.0.0.1:{port}", "--poll-seconds", "0.2")
        started.append(gateway)
        started.append(Program("prefill_worker", tmp_path, model, *worker))
        # Requests are refused and calls answered, long before a decode worker is there.
        until(lambda: gateway.health() == NOT_SERVING)
        assert gateway.health("drystone.v1.Generation") == NOT_SERVING
        decode = Program("decode_worker", tmp_path, model, *worker, "--port", port)
        started.append(decode)
        until(lambda: gateway.health("drystone.v1.Generation") == SERVING)
        for program in started:
            said = program.ready()
            assert said["pid"] == program.process.pid
            assert program.services() == SERVICES[program.name] | ALWAYS
            for service in ("", *SERVICES[program.name]):
                assert program.health(service) == SERVING, (program.name, service)
        for program in started[1:]:
            with program.channel() as channel:
                status = WorkerStub(channel).GetStatus(worker_pb2.GetStatusRequest(), timeout=10.0).status
            assert status.state == ProcessState.PROCESS_STATE_READY
            assert status.address == program.ready()["grpc_address"]
        # A gateway that loses its last decode worker says so.
        end_by_sigterm(decode)
        until(lambda: gateway.health() == NOT_SERVING, 20.0)
        for program in started[:2]:
            end_by_sigterm(program)
    finally:
        for program in started:
            program.end()
    assert list(tmp_path.iterdir()) == []


def end_by_sigterm(program: Program) -> None:
    began = time.monotonic()
    program.process.send_signal(signal.SIGTERM)
    output, _ = program.process.communicate(timeout=20.0)
    assert program.process.returncode == 0, output
    assert time.monotonic() - began < 8.0, "idle, it has nothing to wait for"
    assert not program.ready_file.exists()
    assert [json.loads(line)["level"] for line in output.splitlines() if json.loads(line)["level"] == "critical"] == []


BETWEEN = """
import os, subprocess, sys, time
command = [sys.executable, "-m", *sys.argv[1:], "--exit-with-parent", str(os.getpid())]
subprocess.Popen(command, stdout=subprocess.DEVNULL)
time.sleep(120)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
def test_it_ends_when_its_parent_is_killed(tiny_folder: MakeFolder, tmp_path: Path) -> None:
    ready_file = tmp_path / "ready.json"
    command = [sys.executable, "-c", BETWEEN, "gateway", "--model", str(tiny_folder()), "--ready-file", str(ready_file)]
    with subprocess.Popen(command) as between:
        try:
            until(ready_file.exists)
            pid = json.loads(ready_file.read_text())["pid"]
            time.sleep(1.2)
            assert runs(pid), "its parent lives"
        finally:
            between.kill()
    until(lambda: not ready_file.exists(), 10.0)
    until(lambda: not runs(pid), 10.0)
