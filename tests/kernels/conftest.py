"""The kernels run in Triton's interpreter; TRITON_INTERPRET=0 on a machine with a GPU runs the same tests there."""

from __future__ import annotations

import os
from types import ModuleType

import numpy as np
import pytest
import torch

# Before anything imports triton: it decides then, once for the process.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels can run; skips, saying why, where they cannot."""
    from decode_worker.attention.triton_segments import TritonUnavailableError, load_kernels

    wanted = torch.device("cuda" if os.environ["TRITON_INTERPRET"] == "0" and torch.cuda.is_available() else "cpu")
    try:
        kernels = load_kernels(wanted)
    except TritonUnavailableError as error:
        pytest.skip(str(error))
    if kernels.INTERPRETED:
        _skip_if_loops_do_not_run(kernels)
    return wanted


def _skip_if_loops_do_not_run(kernels: ModuleType) -> None:
    """Triton 3.6's interpreter turns arrays of one element into loop bounds, which numpy 2 warns of and 2.4 refuses."""
    partials, offsets = torch.zeros(1, 1, 16), torch.tensor([0, 1], dtype=torch.int32)
    sizes = {"HEADS": 1, "HEAD_DIM": 16, "BLOCK_DIM": 16, "TILE_PARTIALS": 16}
    try:
        kernels.merge_rows[(1, 1)](partials, partials[..., 0], offsets, offsets, partials, **sizes)
    except kernels.triton.runtime.errors.InterpreterError as error:
        if not any(words in str(error) for words in ("0-dimensional", "ndim > 0")):
            raise
        pytest.skip(f"the interpreter of triton {kernels.triton.__version__} does not run with numpy {np.__version__}")
