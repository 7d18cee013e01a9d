"""A peer's process: where it runs, and that nothing of it is left."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import httpx2
import pytest

from tests.load.peers.server import Launch, PeerError, Server, free_port

CORE = min(os.sched_getaffinity(0))
# A main process that serves, and a child that stands for an engine: it sleeps until it is killed.
SERVING = """
import subprocess, sys
from http.server import HTTPServer, SimpleHTTPRequestHandler
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "engine"])
print(child.pid, flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), SimpleHTTPRequestHandler).serve_forever()
"""


def launch(program: str, engine: str = "", helper_core: int | None = None) -> Launch:
    port = free_port()
    command = [sys.executable, "-c", program, str(port)]
    return Launch(command, port, health="/", engine=engine, helper_core=helper_core)


def test_it_serves_on_its_core_and_leaves_no_child(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    server = Server(launch(SERVING), CORE, log)
    try:
        child = int(log.read_text().split()[0])
        assert os.sched_getaffinity(child) == {CORE}
        server.pause()
        server.resume()
        assert httpx2.get(f"{server.base_url}/", trust_env=False).is_success
    finally:
        server.stop()
    # Its parent is gone, so it is nobody's zombie for longer than init takes: what is left has no command line.
    left = Path(f"/proc/{child}/cmdline")
    assert not left.exists() or not left.read_bytes()
    server.stop()


def test_a_server_that_ends_is_told_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"code 3(.|\n)*no such model"):
        Server(launch("print('no such model'); raise SystemExit(3)"), CORE, tmp_path / "server.log")


def test_an_engine_that_nobody_is_cannot_be_left_alone(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="no process of it is titled VLLM::Worker"):
        Server(launch(SERVING, engine="VLLM::Worker", helper_core=CORE), CORE, tmp_path / "server.log")
