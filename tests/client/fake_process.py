"""Stands in for a worker or the gateway: takes their flags, serves gRPC health, writes its ready file.

python fake_process.py normal|dies|dies_later|stubborn|silent|not_serving FLAGS...
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode")
    parser.add_argument("--ready-file", type=Path)
    parser.add_argument("--host")
    parser.add_argument("--port")
    arguments, _ = parser.parse_known_args()
    print("argv", *sys.argv[1:], flush=True)  # noqa: T201
    if arguments.mode == "dies":
        print("the model is made of straw", file=sys.stderr)  # noqa: T201
        return 7
    stop = threading.Event()
    stubborn = arguments.mode == "stubborn"
    signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else lambda *_: stop.set())
    if arguments.mode == "silent":
        return _sleep(stop)
    server = grpc.server(futures.ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    if arguments.mode == "not_serving":
        servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"{arguments.host}:{arguments.port}")
    server.start()
    scratch = arguments.ready_file.with_suffix(".part")
    scratch.write_text(json.dumps({"grpc_address": f"{arguments.host}:{port}", "pid": os.getpid()}))
    scratch.replace(arguments.ready_file)
    if arguments.mode == "dies_later":
        time.sleep(1.0)
        print("out of stones")  # noqa: T201
        os.kill(os.getpid(), signal.SIGKILL)
    _sleep(stop)
    server.stop(None).wait()
    return 0


def _sleep(stop: threading.Event) -> int:
    # Bounded, so that a failing test leaves nothing behind for long.
    deadline = time.monotonic() + 60
    while not stop.is_set() and time.monotonic() < deadline:
        stop.wait(0.05)
    return 0


if __name__ == "__main__":
    sys.exit(main())
