"""The Triton backend on real steps of the decode worker, against dense float64 attention."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from decode_worker.attention import base
from decode_worker.attention.triton_backend import TritonAttention, TritonStep
from shared.engine.probe import LayerGeometry
from shared.engine.rotation import RotationKind
from shared.kv.layout import KvShape
from tests.kernels.scenes import NONE, TOLERANCE, rotation
from tests.kernels.steps import Step

# A chunk over a tail's segments, two decoding rows that share its blocks, and a block laid twice.
LENGTHS = [70, 1, 33]
ASKS = [([0, 1, 2], 60, 6), ([2, 0], 70, 1), ([1, 2, 1], 3, 1)]
LAYERS = [
    LayerGeometry(rotation(), None),
    LayerGeometry(rotation(), 50),
    LayerGeometry(NONE, None),
    LayerGeometry(rotation(RotationKind.HALF_NEGATIVE, 8), 7),
]


def made(device: torch.device, dtype: str, *, share: bool = True) -> Step:
    shape = KvShape(len(LAYERS), 2, 16, dtype)
    return Step.make(device, LENGTHS, ASKS, shape=shape, group=2, layers=LAYERS, share=share)


@pytest.mark.parametrize(
    ("dtype", "share"), [("float32", True), ("float32", False), ("bfloat16", True), ("float16", True)]
)
def test_a_step_of_the_worker(device: torch.device, dtype: str, *, share: bool) -> None:
    step = made(device, dtype, share=share)
    step.check(TritonAttention(step.arena, step.layers, step.heads), TOLERANCE[getattr(torch, dtype)])


def test_a_step_too_large_for_the_workspace_attends_in_passes(device: torch.device) -> None:
    step = made(device, "float32")
    partial = step.heads * (16 + 1) * 4
    backend = TritonAttention(step.arena, step.layers, step.heads, workspace_bytes=14 * partial)
    assert len(cast("TritonStep", backend.begin(step.plan))._passes) > 1
    step.check(backend, TOLERANCE[torch.float32])


def test_what_a_machine_cannot_run_is_refused_by_name(device: torch.device) -> None:
    step = made(device, "float32")
    with pytest.raises(ValueError, match="'fast' is none of auto, flash, native, varlen, triton"):
        base.make("fast", None, step.arena)  # type: ignore[arg-type] # the name is checked first
