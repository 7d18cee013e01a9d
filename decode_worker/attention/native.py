"""The CPU kernel: found or built once per machine, called once per layer of a decode step.

Built by torch's own extension builder from `cpu_kernel.cpp` at the first start (about ten seconds, with
a C++ compiler and ninja) and kept in the cache; without a compiler the torch path serves, equal and slower.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from decode_worker.arena import Arena
from decode_worker.attention.flash import Angles, FlashStep
from decode_worker.step import StepPlan
from decode_worker.tail import SEGMENT_TOKENS
from shared import logs
from shared.engine.probe import LayerGeometry
from shared.engine.rotation import RotationKind
from shared.engine.seam import AttentionContext

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
# Vectorised sums need their order free; infinities and NaN keep their meaning.
_FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fassociative-math",
    "-fopenmp-simd",
)
_KINDS = {RotationKind.NONE: 0, RotationKind.HALF: 1, RotationKind.HALF_NEGATIVE: 1, RotationKind.INTERLEAVED: 2}
_HEAD_DIMS = frozenset({16, 32, 64, 80, 96, 128, 256})
# With more queries per KV head the matrix path of torch's flash attention is faster (docs/measurements.md).
MAX_QUERIES = 16


class NativeKernel:
    """The built kernel. Stateless; made by `load`."""

    def takes(self, dtype: torch.dtype, head_dim: int, queries: int) -> bool:
        """True when this kernel has a form for the dtype and head size, and `queries` per KV head are few."""
        return dtype in (torch.float32, torch.bfloat16) and head_dim in _HEAD_DIMS and queries <= MAX_QUERIES


class NativeAttention:
    """Few rows by the kernel; many rows, and layers with a window, by torch's flash attention.

    Args:
        arena: Memory of all KV.
        layers: Rotation and window of each layer.
        kernel: The built kernel.
    """

    name = "native"

    def __init__(self, arena: Arena, layers: Sequence[LayerGeometry], kernel: NativeKernel) -> None:
        self._arena = arena
        self._layers = layers
        self._kernel = kernel

    def begin(self, plan: StepPlan) -> AttentionContext:
        """A step by this backend."""
        return _NativeStep(self._arena, self._layers, self._kernel, plan)


class _NativeStep:
    def __init__(self, arena: Arena, layers: Sequence[LayerGeometry], kernel: NativeKernel, plan: StepPlan) -> None:
        self._arena, self._layers, self._kernel, self._plan = arena, layers, kernel, plan
        self._angles = Angles(plan)
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None
        self._flash: FlashStep | None = None

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Writes the rows' own KV into their tails, then attends to blocks and tails."""
        queries = self._plan.most_rows * q.shape[1] // k.shape[1]
        if window is not None or not self._kernel.takes(q.dtype, q.shape[3], queries):
            if self._flash is None:
                self._flash = FlashStep(self._arena, self._layers, self._plan, self._angles)
            return self._flash.attend(layer, q, k, v, scale, window)
        if self._tables is None:
            self._tables = (pieces_table(self._plan), self._plan.merge_table())
        pieces, merge = self._tables
        rotation = self._layers[layer].rotation
        qkv = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        out: torch.Tensor = torch.ops.drystone.step_attention(
            self._arena.records,
            layer,
            *qkv,
            self._plan.slots,
            SEGMENT_TOKENS,
            pieces,
            self._plan.rows,
            *self._angles.of(rotation),
            _KINDS[rotation.kind],
            merge,
            scale,
        )
        return out[None]


def pieces_table(plan: StepPlan) -> torch.Tensor:
    """The kernel's table of pieces, int64 [n, 6]: first, stride, keys, row_first, rows, own."""
    table, first = [], 0
    for piece in plan.pieces:
        table.append((piece.first, piece.stride, piece.keys, first, len(piece.rows), 0 if piece.causal else -1))
        first += len(piece.rows)
    return torch.tensor(table, dtype=torch.int64)


def load(folder: Path) -> NativeKernel | None:
    """The kernel, built into `folder` if it is not there yet; None where it cannot be had, with the reason logged.

    Built aside and moved in whole: a build that is killed leaves nothing that another could wait for or load.
    """
    log = logs.get("kernel")
    if hasattr(torch.ops.drystone, "step_attention"):
        return NativeKernel()  # torch keeps one library of a name for the process
    library = folder / f"{_build_name()}.so"
    try:
        if not library.exists():
            _build(library)
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call] # torch's own
    except (RuntimeError, OSError) as error:
        log.warning("native_kernel_off", reason=str(error).partition("\n")[0])
        return None
    return NativeKernel()


def _build(library: Path) -> None:
    # ninja lies beside this Python, whose environment may not be activated; torch looks for it on PATH.
    before = os.environ.get("PATH", "")
    path = os.pathsep.join([str(Path(sys.executable).parent), before])
    if not (shutil.which("ninja", path=path) and any(shutil.which(c, path=path) for c in ("c++", "g++", "clang++"))):
        raise RuntimeError("no C++ compiler or no ninja; the torch path serves")
    from torch.utils.cpp_extension import load as build

    logs.get("kernel").info("building_native_kernel", into=str(library))
    library.parent.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = path
    with contextlib.ExitStack() as undo:
        undo.callback(os.environ.__setitem__, "PATH", before)
        aside = undo.enter_context(tempfile.TemporaryDirectory(dir=library.parent))
        build("drystone_cpu", [str(SOURCE)], extra_cflags=[*_FLAGS], is_python_module=False, build_directory=aside)
        (Path(aside) / "drystone_cpu.so").replace(library)


def _build_name() -> str:
    """Differs whenever source, flags, torch or the processor do: what was built elsewhere may not run here."""
    processor = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else platform.processor()
    flags = next((line for line in processor.splitlines() if line.startswith("flags")), processor)
    parts = (SOURCE.read_text(), " ".join(_FLAGS), torch.__version__, platform.machine(), flags)
    return "attention-" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
