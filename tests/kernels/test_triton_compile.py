"""What the compiler makes of the kernels for sm_90; it needs no GPU, but a process without the interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SHARED_MEMORY = 227 * 1024
# A few before a run's first tile cost nothing; in the loop over tiles there would be hundreds.
_SPILLS = 32


def test_compiles_for_hopper_without_spilling(tmp_path: Path) -> None:
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        pytest.skip("triton is not installed")
    if not (Path(found.origin).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this build of triton has no disassembler")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-m", "tests.kernels.compile_for_hopper"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    reports = {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}
    assert len(reports) == 6
    for report in reports.values():
        assert report["spills"] <= _SPILLS, report
    merge = reports.pop("merge")
    assert merge["shared"] < _SHARED_MEMORY // 16
    for report in reports.values():
        assert report["copies"] > 0, "keys and values come in 16-byte asynchronous copies"
        assert report["shared"] <= _SHARED_MEMORY // 1.7, "at least one program and most of another fit"
    assert reports["bf16 128 rows=1"]["shared"] * 3 <= _SHARED_MEMORY, "three decoding programs share a multiprocessor"
    assert reports["bf16 128 rows=1"]["matrix"] > 0
    assert reports["bf16 128 rows=256"]["wgmma"] > 0
