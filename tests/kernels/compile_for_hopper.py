"""Compiles both kernels for sm_90, which needs no GPU, and prints what the compiler made of them as JSON lines.

`python -m tests.kernels.compile_for_hopper` without TRITON_INTERPRET; one line a variant: bytes of shared
memory, and counts of the instructions that tell whether it is fast: 16-byte asynchronous copies,
matrix products, and local-memory traffic, which is spilled registers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from decode_worker.attention import triton_kernel
from decode_worker.attention.triton_cut import choose_tiling, padded_dim

_HOPPER = GPUTarget("cuda", 90, 32)
_DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_COUNTED = {"copies": r"LDGSTS\S*\.128", "matrix": r"\bHG?MMA", "wgmma": r"\bHGMMA", "spills": r"\b(?:LDL|STL)"}
_KV_HEADS = 8


def main() -> None:
    """Llama-3.1-8B decoding and question chunks, other head sizes, windows and types."""
    variants: list[tuple[str, int, int, dict[str, Any]]] = [
        ("bf16", 128, 1, {}),
        ("bf16", 128, 256, {"WINDOWED": True}),
        ("fp16", 64, 4, {"INTERLEAVED": True, "ROTARY_DIM": 32}),
        ("bf16", 256, 256, {}),
        ("fp32", 128, 1, {}),
    ]
    for dtype, head_dim, rows, constants in variants:
        _report(f"{dtype} {head_dim} rows={rows}", *_segments(dtype, head_dim, rows, constants))
    pointers = {"outs": "*fp32", "lses": "*fp32", "offsets": "*i32", "members": "*i32", "merged": "*bf16"}
    sizes = {"HEADS": 32, "HEAD_DIM": 128, "BLOCK_DIM": 128, "TILE_PARTIALS": 16}
    _report("merge", triton_kernel.merge_rows, pointers, sizes, 4, 3)


def _segments(
    dtype: str, head_dim: int, rows: int, constants: dict[str, Any]
) -> tuple[Any, dict[str, str], dict[str, Any], int, int]:
    tiling = choose_tiling(4, head_dim, 4 if dtype == "fp32" else 2, rows, processors=132)
    pointers = dict.fromkeys(("records", "q"), f"*{dtype}")
    pointers |= dict.fromkeys(("cosines", "sines", "outs", "lses"), "*fp32")
    pointers |= dict.fromkeys(("items", "runs", "rows", "turns", "limits", "reaches"), "*i32")
    scalars = dict.fromkeys(("layer", "window", "q_head_stride", "q_row_stride"), "i32") | {"scale_log2": "fp32"}
    sizes: dict[str, Any] = {
        "KV_HEADS": _KV_HEADS,
        "GROUP": 4,
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": padded_dim(head_dim),
        "ROTARY_DIM": head_dim,
        "INTERLEAVED": False,
        "WINDOWED": False,
        "FLOAT32_DOT": False,
        "TILE_ROWS": tiling.tile_rows,
        "TILE_KEYS": tiling.tile_keys,
    }
    return triton_kernel.segment_partials, pointers | scalars, sizes | constants, tiling.warps, tiling.stages


def _report(
    name: str, kernel: Any, arguments: dict[str, str], constants: dict[str, Any], warps: int, stages: int
) -> None:
    names = list(kernel.arg_names)
    # As at a launch: tensors begin at multiples of 16 bytes, rows of q at multiples of 16 elements.
    aligned = [n for n, kind in arguments.items() if kind.startswith("*") or n.startswith("q_")]
    source = ASTSource(
        fn=kernel,
        signature={argument: arguments.get(argument, "constexpr") for argument in names},
        constexprs={(names.index(constant),): value for constant, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    compiled = triton.compile(source, target=_HOPPER, options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        command = [str(_DISASSEMBLER), "--dump-sass", binary.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {what: len(re.findall(pattern, text)) for what, pattern in _COUNTED.items()}
    sys.stdout.write(json.dumps({"name": name, "shared": compiled.metadata.shared, **counts}) + "\n")


if __name__ == "__main__":
    main()
