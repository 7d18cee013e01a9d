"""Warms a corpus through the command, interrupts it again and again, and counts: nothing may be encoded twice.

python -m tests.load.warm_interrupted --questions hotpotqa-100.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import drystone
from drystone.local.options import ServeOptions
from drystone.local.supervisor import Supervisor

_DONE, _INTERRUPTED = 0, 130


def main() -> int:
    """Prints what happened; 1 when a block was encoded twice or left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="JSON Lines with documents")
    parser.add_argument("--interrupts", type=int, default=5, help="times that the command is interrupted")
    parser.add_argument("--seconds", type=float, default=20.0, help="longest time before an interrupt")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="drystone-warm-") as folder:
        serve = ServeOptions(port=0, log_level="error", store=Path(folder))
        with Supervisor(serve, report=lambda _: None) as server:
            for number in range(options.interrupts):
                code = _warm(server.address, options.questions, draw.uniform(1.0, options.seconds))[0]
                print(f"interrupt {number + 1}: exit code {code}", flush=True)
                if code not in (_DONE, _INTERRUPTED):
                    return 1
            code, report = _warm(server.address, options.questions, None)
            with drystone.Client(server.address) as client:
                workers = [process for process in client.status() if process.role == "prefill"]
            encoded = int(sum(process.values["blocks_encoded_total"] for process in workers))
    preamble = 1
    wanted = report["blocks"] + preamble
    print(f"{report['blocks']} blocks of {report['documents']} documents and the preamble; encoded {encoded} blocks")
    return int(code != _DONE or encoded != wanted)


def _warm(address: str, questions: Path, seconds: float | None) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "drystone.cli", "warm", "--jsonl", str(questions), "--json", "--server", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        if seconds is not None:
            time.sleep(seconds)
            running.send_signal(signal.SIGINT)
        told, _ = running.communicate()
    return running.returncode, json.loads(told) if told.strip() else {}


if __name__ == "__main__":
    sys.exit(main())
