"""Building the kernels: whole or not at all, once, and never needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.engine.native import builder
from shared.engine.native.builder import NativeKernel

# Unoptimised: what is looked at is the files that a build leaves.
_PROGRAM = """
import pathlib, sys
from shared.engine.native import builder
kernel = builder.load(pathlib.Path(sys.argv[1]), flags=("-O0", "-march=native", "-fopenmp", "-Wno-psabi"))
sys.exit(kernel is None)
"""


@pytest.mark.slow
def test_a_build_leaves_one_whole_file_that_the_next_process_takes(tmp_path: Path, kernel: NativeKernel) -> None:
    del kernel  # asked for so that this is skipped where nothing can be built
    (tmp_path / "abandoned").mkdir()
    (tmp_path / "abandoned" / "lock").touch()
    libraries = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", _PROGRAM, str(tmp_path)], check=True, timeout=240)
        [library_file] = tmp_path.glob("*.so")
        libraries.append((library_file.name, library_file.stat().st_mtime_ns))
    assert libraries[0] == libraries[1]
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"abandoned", libraries[0][0], library_file.with_suffix(".lock").name}


def test_without_a_compiler_torch_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert builder.load(tmp_path / "kernels", name="drystone_nowhere") is None
    assert not (tmp_path / "kernels").exists()


def test_a_library_that_does_not_load_is_no_kernel(tmp_path: Path) -> None:
    (tmp_path / f"{builder._build_name('drystone_torn', builder.FLAGS)}.so").write_bytes(b"\x7fELF torn")
    assert builder.load(tmp_path, name="drystone_torn") is None


def test_kernels_take_the_types_and_widths_they_have() -> None:
    kernel = NativeKernel(torch.zeros, torch.zeros)
    assert kernel.takes(torch.bfloat16, 80)
    assert not kernel.takes(torch.float16, 64)
    assert not kernel.takes(torch.float32, 100)
    assert not kernel.takes(torch.float32, 512)
