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
from dataclasses import dataclass
from pathlib import Path

import torch

from shared import logs
from shared.engine.rotation import Rotation, RotationKind

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


@dataclass(frozen=True, slots=True)
class Run:
    """A piece as the kernel sees it: a run of records and the stacked rows that attend to it.

    Attributes:
        kv: View [layers, keys, 2, kv_heads, head_dim] into the arena.
        row_first: First stacked row.
        rows: Stacked rows.
        causal: Row i sees keys 0..i; else all.
    """

    kv: torch.Tensor
    row_first: int
    rows: int
    causal: bool


class NativeKernel:
    """The built kernel. Stateless; made by `load`."""

    def takes(self, dtype: torch.dtype, head_dim: int, queries: int) -> bool:
        """True when this kernel has a form for the dtype and head size, and `queries` per KV head are few."""
        return dtype in (torch.float32, torch.bfloat16) and head_dim in _HEAD_DIMS and queries <= MAX_QUERIES

    def pieces(self, runs: Sequence[Run], record_elements: int) -> torch.Tensor:
        """The kernel's table of pieces, int64 [n, 6]: first, stride, keys, row_first, rows, own."""
        return torch.tensor(
            [
                (
                    run.kv.storage_offset() // record_elements,
                    run.kv.stride(0) // record_elements,
                    run.kv.shape[1],
                    run.row_first,
                    run.rows,
                    0 if run.causal else -1,
                )
                for run in runs
            ],
            dtype=torch.int64,
        )

    def attend(
        self,
        records: torch.Tensor,
        layer: int,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        tail_stride: int,
        pieces: torch.Tensor,
        rows: torch.Tensor,
        rotation: Rotation,
        tables: tuple[torch.Tensor, torch.Tensor],
        merge: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Writes the rows' own KV and attends.

        Args:
            records: The arena, [slots, 2 * kv_heads * d].
            layer: Index of the layer.
            qkv: [1, heads, rows, d], [1, kv_heads, rows, d] twice, of the records' dtype.
            slots: Record of each row in layer 0 of its tail, int64 [rows].
            tail_stride: Records from one layer of a tail segment to the next.
            pieces: From `pieces`.
            rows: Query row of each stacked row, int64 [stacked].
            rotation: How the layer rotates.
            tables: Cosines and sines of the stacked rows that turn, float32 [turned, rotary_dim]; they come first.
            merge: Stacked rows of each query row, int64 [rows, most], padded with `stacked`.
            scale: Factor of the scores.

        Returns:
            [1, rows, heads, d] in q's dtype.
        """
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in qkv)
        out: torch.Tensor = torch.ops.drystone.step_attention(
            records, layer, q, k, v, slots, tail_stride, pieces, rows, *tables, _KINDS[rotation.kind], merge, scale
        )
        return out[None]


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
