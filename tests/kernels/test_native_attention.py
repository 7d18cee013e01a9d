"""The CPU kernel equals the torch path: same rows, same pieces, every rotation it knows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from decode_worker.arena import Arena
from decode_worker.attention import native
from decode_worker.attention.flash import FlashAttention
from decode_worker.attention.native import NativeAttention, NativeKernel
from decode_worker.step import Placement, RowSpan, StepPlan
from decode_worker.tail import Tail
from shared.engine.probe import LayerGeometry
from shared.engine.rotation import Rotation, RotationKind
from shared.kv.layout import KvShape

LAYERS = 3


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> NativeKernel:
    made = native.load(tmp_path_factory.mktemp("kernels"))
    if made is None:
        pytest.skip("needs a C++ compiler and ninja")
    return made


def scene(arena: Arena, seed: int, rows: list[int]) -> list[RowSpan]:
    """Requests of `rows` rows each, over blocks that they share at different offsets, one of them twice."""
    draw = torch.Generator().manual_seed(seed)
    arena.records.copy_(torch.randn(arena.records.shape, generator=draw))
    blocks = []
    for name, tokens in enumerate((1, 37, 80, 5)):
        extent = arena.allocate(tokens)
        assert extent is not None
        blocks.append((bytes([name]), extent, tokens))
    spans = []
    for number, count in enumerate(rows):
        offset, placements = 0, []
        for index in torch.randint(0, len(blocks), (2 + number,), generator=draw).tolist():
            key, extent, tokens = blocks[index]
            placements.append(Placement(key, extent, offset))
            offset += tokens
        tail = Tail.reserve(arena, offset, 200)
        assert tail is not None
        tail.filled = (0, 63, 70)[number % 3]
        spans.append(RowSpan(list(range(5, 5 + count)), placements, tail))
    return spans


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 16), (8, 1, 128)])
@pytest.mark.parametrize(
    ("kind", "rotary"),
    [
        (RotationKind.HALF, 16),
        (RotationKind.HALF, 8),
        (RotationKind.INTERLEAVED, 16),
        (RotationKind.HALF_NEGATIVE, 16),
        (RotationKind.NONE, 0),
    ],
)
def test_equals_the_torch_path(
    kernel: NativeKernel, dtype: str, heads: int, kv_heads: int, width: int, kind: RotationKind, rotary: int
) -> None:
    shape = KvShape(LAYERS, kv_heads, width, dtype)
    rotation = Rotation(kind, 1.0 / 100.0 ** (torch.arange(0, rotary, 2) / max(rotary, 1)))
    geometry = [LayerGeometry(rotation, None)] * LAYERS
    for seed, rows in enumerate(([1], [1, 1, 1], [3, 1], [2, 2, 1, 1])):
        arena = Arena(shape, shape.extent_bytes(1600), torch.device("cpu"))
        spans = scene(arena, seed, rows)
        draw = torch.Generator().manual_seed(seed)
        shapes = ((heads, sum(rows)), (kv_heads, sum(rows)), (kv_heads, sum(rows)))
        q, k, v = (torch.randn(1, *form, width, generator=draw).to(getattr(torch, dtype)) for form in shapes)
        taken = []
        kernel_takes = kernel.takes(q.dtype, width, 1)
        for backend in (FlashAttention(arena, geometry), NativeAttention(arena, geometry, kernel)):
            context = backend.begin(StepPlan(spans))
            taken.append(context.attend(1, q, k, v, width**-0.5, None).float())
        assert kernel_takes
        torch.testing.assert_close(*taken, atol=2e-6 if dtype == "float32" else 2e-2, rtol=0)


def test_a_build_leaves_one_whole_file_that_the_next_process_takes(tmp_path: Path, kernel: NativeKernel) -> None:
    assert isinstance(kernel, NativeKernel)
    (tmp_path / "abandoned").mkdir()
    (tmp_path / "abandoned" / "lock").touch()
    program = "import sys, pathlib; from decode_worker.attention import native; native.load(pathlib.Path(sys.argv[1]))"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)
        [library] = [file for file in tmp_path.iterdir() if file.is_file()]
        assert library.suffix == ".so"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["abandoned", library.name])


def test_without_a_compiler_the_torch_path_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.ops, "drystone", object())
    assert native.load(tmp_path / "kernels") is None
