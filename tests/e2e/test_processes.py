"""The three programs as processes: help, bad flags, models and ports they cannot have, drain."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import drystone
from tests.conftest import MakeFolder

PROGRAMS = ("decode_worker", "prefill_worker", "gateway")


def command(program: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", program, *flags]


def run(program: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(program, *flags), capture_output=True, text=True, timeout=60, check=False)


def run_all(runs: list[tuple[str, ...]]) -> list[subprocess.CompletedProcess[str]]:
    """Runs programs two at a time: most of their time goes into imports."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda one: run(*one), runs))


def json_lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_help_and_bad_flags() -> None:
    runs = [(program, *flags) for program in PROGRAMS for flags in (("--help",), ("--port", "x"), ("--levitate",))]
    ended = run_all(runs)
    for (program, flag, *_), result in zip(runs, ended, strict=True):
        assert "Traceback" not in result.stderr, result.stderr
        if flag == "--help":
            assert result.returncode == 0
            assert "--log-format" in result.stdout
            continue
        assert result.returncode == 2, (program, flag)
        assert flag in result.stderr
        assert result.stdout == ""


@pytest.fixture(scope="module")
def taken_port() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield str(taken.getsockname()[1])


def test_what_cannot_start_says_why_in_one_json_line(tiny_folder: MakeFolder, taken_port: str) -> None:
    tiny, refused = str(tiny_folder()), str(tiny_folder("gpt2"))
    runs = {
        **{(program, "--model", "/nonexistent"): "/nonexistent" for program in PROGRAMS},
        ("prefill_worker", "--model", refused): "layer 0",
        ("gateway", "--model", tiny, "--port", taken_port): taken_port,
        ("decode_worker", "--model", tiny, "--kv-port", taken_port): taken_port,
        ("decode_worker", "--model", tiny, "--pool-bytes", str(1 << 60)): "pool",
    }
    for (flags, why), result in zip(runs.items(), run_all(list(runs)), strict=True):
        assert result.returncode == 1, (flags, result)
        assert "Traceback" not in result.stderr + result.stdout, (flags, result.stderr, result.stdout)
        told = [line for line in json_lines(result.stdout) if line["level"] in ("error", "critical")]
        assert [line["event"] for line in told] == ["cannot_start"], (flags, result.stdout, result.stderr)
        assert why in told[0]["reason"], flags
        assert told[0]["role"] in ("decode", "prefill", "gateway")


def ready(process: subprocess.Popen[str], file: Path) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert process.poll() is None, "it ended before it was ready"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    said: dict[str, Any] = json.loads(file.read_text())
    return said


def test_sigterm_lets_running_answers_end(tiny_folder: MakeFolder, tmp_path: Path) -> None:
    common = ("--model", str(tiny_folder()), "--model-name", "tiny", "--drain-seconds", "20")
    worker_file, gateway_file = tmp_path / "decode.json", tmp_path / "gateway.json"
    flags = (*common, "--dtype", "float32", "--threads", "1", "--worker-id", "decode-0")
    with subprocess.Popen(
        command("decode_worker", *flags, "--ready-file", str(worker_file)), stdout=subprocess.PIPE, text=True
    ) as worker:
        said = ready(worker, worker_file)
        assert said["pid"] == worker.pid
        assert said["worker_id"] == "decode-0"
        assert said["kv_address"].startswith("tcp://127.0.0.1:")
        gateway_flags = (*common, "--decode-workers", said["grpc_address"], "--ready-file", str(gateway_file))
        with (
            subprocess.Popen(command("gateway", *gateway_flags), stdout=subprocess.PIPE, text=True) as gateway,
            drystone.Client(ready(gateway, gateway_file)["grpc_address"]) as client,
        ):
            stream = client.stream(blocks=["alpha", "beta"], max_new_tokens=150, ignore_eos=True)
            while not isinstance(next(stream), drystone.TextDelta):
                pass
            for process in (gateway, worker):
                process.send_signal(signal.SIGTERM)
            answer = stream.read()
            assert len(answer.token_ids) == 150
            with pytest.raises(drystone.UnavailableError):
                client.generate(blocks=["alpha", "beta"], max_new_tokens=1, timeout=5.0)
            for process, file in ((gateway, gateway_file), (worker, worker_file)):
                assert process.stdout is not None
                lines = json_lines(process.stdout.read())
                assert process.wait(30) == 0
                events = [line["event"] for line in lines]
                assert events[-1] == "stopped"
                assert "stopping" in events
                assert not file.exists()
                assert [line for line in lines if line["level"] != "info"] == []
                traced = [line for line in lines if line["event"] in ("request", "completed")]
                assert {line["request_id"] for line in traced} == {answer.request_id}
                assert len({line["trace_id"] for line in traced}) == 1
                assert "alpha" not in json.dumps(lines), "prompts are never logged"
