"""The protos are commented, their stubs fresh, and a change that would break a peer is found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
SAMPLING = Path("drystone/v1/sampling.proto")


def _buf(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    # buf-bin puts it beside the interpreter.
    beside = Path(sys.executable).with_name("buf")
    program = str(beside) if beside.exists() else shutil.which("buf")
    assert program, "buf is not installed; `make env` does it"
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PROTOS, tmp_path / "protos"))


def _edit(copy: Path, pattern: str, replacement: str) -> None:
    file = copy / SAMPLING
    text, count = re.subn(pattern, replacement, file.read_text(encoding="utf-8"), count=1)
    assert count == 1
    file.write_text(text, encoding="utf-8")


def test_stubs_are_fresh() -> None:
    # protoc looks for its plugins on the path; they are beside the interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "protos/generate.py", "--check"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr


def test_every_element_is_commented() -> None:
    done = _buf("lint", "protos")
    assert done.returncode == 0, done.stdout


def test_a_missing_comment_is_found(copy: Path) -> None:
    _edit(copy, r"  // Seed of the draws[^\n]*\n", "")
    done = _buf("lint", copy)
    assert done.returncode != 0
    assert '"seed" should have a non-empty comment' in done.stdout


def test_protos_are_compatible_with_themselves(copy: Path) -> None:
    assert _buf("breaking", "protos", "--against", copy).returncode == 0


@pytest.mark.parametrize(
    ("pattern", "replacement", "told"),
    [
        (r"  // Seed of the draws[^\n]*\n[^\n]*\n", "", 'field "6" with name "seed"'),
        (r"optional uint64 seed = 6", "optional uint64 seed = 60", 'field "6" with name "seed"'),
        (r"optional uint64 seed = 6", "optional string seed = 6", "changed type"),
        (r"FINISH_REASON_LENGTH = 2", "FINISH_REASON_LONG = 2", "FINISH_REASON_LENGTH"),
    ],
    ids=["removed", "renumbered", "retyped", "renamed-value"],
)
def test_a_breaking_change_is_found(copy: Path, pattern: str, replacement: str, told: str) -> None:
    _edit(copy, pattern, replacement)
    done = _buf("breaking", copy, "--against", "protos")
    assert done.returncode != 0
    assert told in done.stdout
