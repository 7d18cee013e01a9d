"""The attention kernel equals the torch path: same rows, same pieces, every rotation and width it knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decode_worker.attention.flash import FlashAttention
from decode_worker.attention.native import NativeAttention
from decode_worker.step import StepPlan
from shared.engine.native.agreement import distance
from shared.engine.native.builder import NativeKernel
from shared.engine.probe import LayerGeometry
from shared.engine.rotation import Rotation, RotationKind
from shared.kv.layout import KvShape
from tests.kernels.native.ragged import Ragged

LAYERS = 3
# Relative RMS distance. In bfloat16 the torch path rounds queries, weights and outputs, each once; so does the kernel.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
KINDS = [
    (RotationKind.HALF, 16),
    (RotationKind.HALF, 8),
    (RotationKind.INTERLEAVED, 16),
    (RotationKind.HALF_NEGATIVE, 16),
    (RotationKind.NONE, 0),
]


def assert_equal_to_torch(
    kernel: NativeKernel, ragged: Ragged, heads: int, rotation: Rotation, window: int | None = None
) -> None:
    shape, results = ragged.shape, []
    dtype, rows = getattr(torch, shape.dtype), sum(ragged.rows)
    geometry = [LayerGeometry(rotation, window)] * LAYERS
    draw = torch.Generator().manual_seed(ragged.seed)
    forms = (heads, shape.kv_heads, shape.kv_heads)
    qkv = [torch.randn(1, n, rows, shape.head_dim, generator=draw).to(dtype) for n in forms]
    for make in (FlashAttention, lambda arena, layers: NativeAttention(arena, layers, kernel)):
        arena, spans = ragged.build()
        out = make(arena, geometry).begin(StepPlan(spans)).attend(1, *qkv, shape.head_dim**-0.5, window)
        results.append((out, arena.records))
    (wanted, records), (given_, own_records) = results
    assert given_.dtype == wanted.dtype
    assert given_.shape == wanted.shape
    assert distance(given_, wanted) < TOLERANCE[shape.dtype]
    assert torch.equal(own_records, records), "the rows' own KV is in its place, and nothing else changed"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 16), (8, 1, 128), (6, 2, 80), (4, 1, 256)])
@pytest.mark.parametrize(("kind", "rotary"), KINDS)
def test_equals_the_torch_path(
    any_kernel: NativeKernel, dtype: str, heads: int, kv_heads: int, width: int, kind: RotationKind, rotary: int
) -> None:
    rotation = Rotation(kind, 1.0 / 100.0 ** (torch.arange(0, rotary, 2) / max(rotary, 1)))
    for seed, rows in enumerate(((1,), (1, 1, 1, 1), (3, 70, 1))):
        assert_equal_to_torch(any_kernel, Ragged(KvShape(LAYERS, kv_heads, width, dtype), rows, seed), heads, rotation)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.one_of(st.integers(1, 4), st.integers(1, 130)), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    group=st.integers(1, 8),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_ragged_steps(kernel: NativeKernel, rows: list[int], seed: int, group: int, dtype: str) -> None:
    rotation = Rotation(RotationKind.HALF, 1.0 / 100.0 ** (torch.arange(0, 32, 2) / 32))
    assert_equal_to_torch(kernel, Ragged(KvShape(LAYERS, 2, 32, dtype), tuple(rows), seed), 2 * group, rotation)


def test_two_threads_cut_pieces_and_change_nothing(kernel: NativeKernel) -> None:
    rotation = Rotation(RotationKind.HALF, 1.0 / 100.0 ** (torch.arange(0, 32, 2) / 32))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for dtype in ("float32", "bfloat16"):
            assert_equal_to_torch(kernel, Ragged(KvShape(LAYERS, 2, 32, dtype), (1, 90, 3)), 6, rotation)
    finally:
        torch.set_num_threads(before)


def test_a_window_goes_by_the_torch_path(kernel: NativeKernel) -> None:
    rotation = Rotation(RotationKind.HALF, 1.0 / 100.0 ** (torch.arange(0, 16, 2) / 16))
    ragged = Ragged(KvShape(LAYERS, 2, 16, "float32"), (3, 1))
    assert_equal_to_torch(kernel, ragged, 4, rotation, window=50)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 4, 20), "k": torch.zeros(2, 2, 20)}, "head_dim 20"),
        ({"rows": torch.zeros(2)}, "plan tables"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, "plan shapes"),
        ({"q": torch.zeros(2, 4, 16, dtype=torch.float64)}, "q, k, v"),
    ],
)
def test_what_does_not_fit_is_refused(kernel: NativeKernel, change: dict[str, torch.Tensor], words: str) -> None:
    fitting: dict[str, Any] = {
        "records": torch.zeros(64, 64),
        "layer": 0,
        "q": torch.zeros(2, 4, 16),
        "k": torch.zeros(2, 2, 16),
        "v": torch.zeros(2, 2, 16),
        "slots": torch.tensor([0, 1]),
        "slot_step": 8,
        "pieces": torch.tensor([[0, 8, 2, 0, 2, 0]]),
        "rows": torch.tensor([0, 1]),
        "cosine": torch.zeros(0, 16),
        "sine": torch.zeros(0, 16),
        "kind": 1,
        "scale": 1.0,
    }
    kernel.step_attention(**fitting)
    with pytest.raises(RuntimeError, match=words):
        kernel.step_attention(**(fitting | change))
