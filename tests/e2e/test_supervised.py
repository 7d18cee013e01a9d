"""A gateway and its workers as the processes of one supervisor: they live together and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import drystone
from drystone.local.options import ServeOptions
from drystone.local.supervisor import Supervisor, SupervisorError
from tests.conftest import MakeFolder


def options(folder: Path) -> ServeOptions:
    return ServeOptions(model=str(folder), dtype="float32", port=0, threads=1, json_logs=True, start_seconds=90.0)


def alive(pid: int) -> bool:
    """True for a process that runs: one that has ended and waits to be collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")


def test_ask_then_kill_a_worker(tiny_folder: MakeFolder) -> None:
    said: list[str] = []
    supervisor = Supervisor(options(tiny_folder()), report=said.append)
    supervisor.start()
    pids = dict(supervisor.pids)
    try:
        assert set(pids) == {"prefill-0", "decode-0", "gateway"}
        with drystone.Client(supervisor.address) as client:
            documents = ["A wall of dry stone.", "The harbour opens at seven."]
            cold = client.generate("What opens?", documents=documents, max_new_tokens=5)
            warm = client.generate("What opens?", documents=documents[::-1], max_new_tokens=5)
            assert {str(block.source) for block in cold.blocks[:-1]} == {"encoded"}
            assert {str(block.source) for block in warm.blocks[:-1]} == {"resident"}
            assert (warm.usage.blocks_encoded, warm.usage.shipped_bytes) == (0, 0)
            # Every block says where it came from, however fast the answer was.
            for number in range(30):
                answer = client.generate(blocks=[f"alpha {number}", f"beta {number}", "q"], max_new_tokens=1)
                assert {str(block.source) for block in answer.blocks[:-1]} == {"encoded"}
                assert answer.usage.blocks_encoded == 2
            os.kill(pids["decode-0"], signal.SIGKILL)
            with pytest.raises(SupervisorError, match="decode-0 was killed by SIGKILL"):
                supervisor.wait()
            with pytest.raises(drystone.UnavailableError):
                client.generate(blocks=["alpha", "beta"], max_new_tokens=1, timeout=10.0)
    finally:
        supervisor.stop()
    assert not [name for name, pid in pids.items() if alive(pid)]
    assert supervisor.pids == {}
    events = [json.loads(line) for line in said if line.startswith("{")]
    assert {event["role"] for event in events} == {"gateway", "prefill", "decode"}
    assert not [event for event in events if event["level"] in ("error", "critical")]


SUPERVISE = """
import json, sys
from pathlib import Path
from drystone.local.options import ServeOptions
from drystone.local.supervisor import Supervisor

supervisor = Supervisor(ServeOptions(model=sys.argv[1], dtype="float32", port=0, threads=1))
supervisor.start()
print(json.dumps(supervisor.pids), flush=True)
supervisor.wait()
"""


def test_children_of_a_killed_supervisor_end_by_themselves(tiny_folder: MakeFolder) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, str(tiny_folder())],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        pids = json.loads(process.stdout.readline())
        assert len(pids) == 3
        assert all(alive(pid) for pid in pids.values())
        process.kill()
        process.wait()
        try:
            until(lambda: not any(alive(pid) for pid in pids.values()), 20.0)
        finally:
            for pid in pids.values():
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
