"""Checks the backends on a GPU, then times them at the shapes of served models; prints tables.

`python -m tests.kernels.measure_on_gpu` on the GPU. `TRITON_INTERPRET=1 ... --tiny` is a dry run of the
same code on a CPU, whose times mean nothing. `--tilings` times the kernel's other tilings as well.

All layers are timed in one captured graph, so that a layer's keys are never in the cache from before.
Bytes are every key's and value's, once, whoever reads them: `share` is of 4.8 TB/s, `of copy` of the
bandwidth that a plain copy has here.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from decode_worker.attention.base import SegmentAttention
from decode_worker.attention.triton_backend import TritonAttention
from decode_worker.attention.triton_cut import Tiling
from decode_worker.attention.varlen import VarlenAttention
from decode_worker.step import StepPlan
from shared.engine.probe import LayerGeometry
from shared.engine.rotation import RotationKind
from shared.kv.layout import KvShape
from tests.kernels.gpu_clock import copy_bandwidth, say, timed
from tests.kernels.scenes import NONE, TOLERANCE, rotation
from tests.kernels.steps import Asked, Step
from tests.kernels.varlen_double import varlen_double

DATASHEET = 4.8e12


@dataclass(frozen=True)
class Size:
    """What is measured: a model's shape, and tokens of all blocks together."""

    name: str
    layers: int
    kv_heads: int
    group: int
    head_dim: int
    tokens: int = 32_768
    filled: int = 40
    repeats: int = 15


MODELS = [Size("Qwen3-8B", 36, 8, 4, 128), Size("Llama-3.2-1B", 16, 8, 4, 64)]
TINY = [Size("tiny", 2, 1, 2, 16, tokens=600, filled=5, repeats=1)]


def main() -> None:
    """Checks, then measures every model and case with every backend."""
    tiny = "--tiny" in sys.argv
    device = torch.device("cpu" if tiny else "cuda")
    check(device, tiny=tiny)
    bandwidth = copy_bandwidth(device, 1 << (16 if tiny else 32))
    say(f"copy {bandwidth / 1e12:.2f} TB/s; torch {torch.__version__}")
    for size in TINY if tiny else MODELS:
        measure(size, device, bandwidth)


def measure(size: Size, device: torch.device, bandwidth: float) -> None:
    """Every case of a model."""
    draw = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < size.tokens:
        lengths.append(min(int(draw.integers(100, 257)), size.tokens - sum(lengths)))
    laid = range(len(lengths))

    def asks(requests: int, rows: int = 1, part: float = 1.0) -> list[Asked]:
        count = round(part * len(lengths))
        return [(draw.permutation(laid)[:count].tolist(), size.filled, rows) for _ in range(requests)]

    cases: list[tuple[str, list[Asked]]] = [
        ("1 request", asks(1)),
        ("16 requests, all blocks", asks(16)),
        ("64 requests, all blocks", asks(64)),
        ("16 requests, a quarter of the blocks each", asks(16, part=0.25)),
        ("question of 64 rows", asks(1, rows=64)),
        ("question of 512 rows", asks(1, rows=512)),
    ]
    say(f"\n{size.name}: {size.layers} layers, {size.kv_heads} KV heads of {size.head_dim}, group {size.group}; ")
    say(f"{len(lengths)} blocks of 100 to 256 tokens, {sum(lengths)} in all; times are of one layer")
    for name, case in cases:
        shape = KvShape(size.layers, size.kv_heads, size.head_dim, "bfloat16")
        step = Step.make(device, lengths, case, shape=shape, group=size.group)
        start = time.perf_counter()
        StepPlan(step.spans)
        planned = time.perf_counter() - start
        bytes_read = sum(piece.keys for piece in step.plan.pieces) * shape.record_bytes
        megabytes = f"{bytes_read / 1e6:.1f} MB"
        say(f"\n{name}: {len(step.plan.rows)} stacked rows, {megabytes}, laid out in {planned * 1e3:.1f} ms")
        for label, backend in backends(step, device):
            report(label, step, backend, size, bytes_read, bandwidth)
        own = replace(step, plan=StepPlan(step.spans, share=False))
        if len(case) > 1:
            report("triton, nothing shared", own, triton(own), size, bytes_read, bandwidth)
        gathered(step, case, lengths, size, bytes_read)
        if "--tilings" in sys.argv and size is MODELS[0] and len(laid) == len(case[0][0]):
            tilings(step, size)
        del step, own
        if device.type == "cuda":
            torch.cuda.empty_cache()


def backends(step: Step, device: torch.device) -> list[tuple[str, SegmentAttention]]:
    """Those of a GPU; on a CPU varlen's double stands in."""
    options = {} if device.type == "cuda" else {"varlen": varlen_double}
    apart = triton(step)
    chosen = apart._kernel.tiling
    apart._kernel.tiling = lambda rows: replace(chosen(rows), join=False)  # type: ignore[method-assign] # measured
    varlen = VarlenAttention(step.arena, step.layers, step.heads, **options)
    return [("triton", triton(step)), ("triton, pieces not joined", apart), ("varlen", varlen)]


def triton(step: Step) -> TritonAttention:
    """Our own kernel with room for every variant."""
    return TritonAttention(step.arena, step.layers, step.heads, workspace_bytes=4 << 30)


def report(label: str, step: Step, backend: SegmentAttention, size: Size, bytes_read: int, bandwidth: float) -> None:
    """One line: a layer's time in a graph and launched from Python, and what beginning the step costs."""
    q, k, v = step.queries(0)
    begins = []
    for _ in range(4):
        start = time.perf_counter()
        context = backend.begin(step.plan)
        begins.append(time.perf_counter() - start)
    scale = size.head_dim**-0.5

    def layers() -> None:
        for layer in range(size.layers):
            context.attend(layer, q, k, v, scale, None)

    seconds = timed(layers, size.repeats, q.device) / size.layers
    start = time.perf_counter()
    layers()
    launched = (time.perf_counter() - start) / size.layers
    rate = bytes_read / seconds
    say(
        f"  {label:28s} {seconds * 1e6:8.1f} us  share {rate / DATASHEET:5.2f}  of copy {rate / bandwidth:5.2f}  "
        f"from Python {launched * 1e6:6.0f} us  begin {min(begins) * 1e3:5.2f} ms"
    )


def gathered(step: Step, case: list[Asked], lengths: list[int], size: Size, bytes_read: int) -> None:
    """Torch's SDPA over a copy of each request's keys, one layer: the copy made beforehand, and made each time.

    Keys are not rotated to their places: the time would be the copy's, the arithmetic little.
    """
    shape, device = step.arena.shape, step.arena.records.device
    if any(len(laid) < len(lengths) for laid, _, _ in case):
        return
    # Pieces of the plan come in the order in which the first request lays its blocks.
    starts = {block: piece.first for block, piece in zip(case[0][0], step.plan.pieces, strict=False)}
    index = torch.stack(
        [
            torch.cat([torch.arange(starts[block], starts[block] + lengths[block]) for block in laid])
            for laid, _, _ in case
        ]
    ).to(device)
    records = step.arena.records.view(-1, 2, shape.kv_heads, shape.head_dim)
    rows = case[0][2]
    q = torch.randn(len(case), step.heads, rows, shape.head_dim, device=device, dtype=records.dtype)

    def gather() -> tuple[torch.Tensor, torch.Tensor]:
        k, v = records[index].unbind(2)
        return k.transpose(1, 2), v.transpose(1, 2)

    def attend(kv: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, *kv, enable_gqa=True)

    kv = gather()
    apart = timed(lambda: attend(kv), size.repeats, device)
    both = timed(lambda: attend(gather()), size.repeats, device)
    say(f"  SDPA over a gathered copy    {apart * 1e6:8.1f} us  share {bytes_read / apart / DATASHEET:5.2f}")
    say(f"  gather, then SDPA            {both * 1e6:8.1f} us  share {bytes_read / both / DATASHEET:5.2f}")


def tilings(step: Step, size: Size) -> None:
    """The chosen tiling, then one change at a time; twice the chosen one, whose difference is the noise."""
    backend = triton(step)
    kernel = backend._kernel
    chosen = kernel.tiling(step.plan.most_rows)
    wide = chosen.tile_rows > 16
    changes: list[dict[str, int]] = [{}, {}, *({"programs": 132 * n} for n in (1, 2, 3, 6, 8))]
    changes += [{"stages": 2, "programs": 132 * n} for n in (3, 4, 6)]
    changes += [{"tile_keys": 32, "programs": 132 * n} for n in (3, 4, 6)]
    changes += [{"tile_keys": 32, "stages": 4, "programs": 132 * 4}, {"tile_keys": 128, "programs": 132 * 2}]
    if wide:
        changes += [{"tile_rows": 128, "warps": 8, "programs": 132 * n} for n in (1, 2, 4)]
        changes += [{"tile_rows": 128, "warps": 8, "stages": 2, "programs": 132 * 2}, {"warps": 8}]
        changes += [{"tile_rows": 128, "warps": 8, "tile_keys": 128, "stages": 2, "programs": 132}, {"tile_rows": 32}]
    else:
        changes += [{"warps": 2, "programs": 132 * n} for n in (3, 4)]
        changes += [{"tile_keys": 32, "warps": 2, "programs": 132 * n} for n in (4, 6)]
        changes += [
            {"tile_keys": 32, "warps": 1, "programs": 132 * 6},
            {"tile_keys": 32, "stages": 2, "programs": 132 * 8},
        ]
    q = step.queries(0)[0][0]
    for change in changes:
        tiling = Tiling(**{**vars_of(chosen), **change})
        prepared = kernel.prepare(step.plan.pieces, step.plan.positions.tolist(), tiling=tiling)

        def layers(merge: bool = True) -> None:  # noqa: FBT001, FBT002 - called at once
            for layer in range(size.layers):
                kernel._launch_partials(prepared, layer, q, size.head_dim**-0.5, None)  # noqa: B023 - called at once
                if merge:
                    kernel._launch_merge(prepared, q.dtype)  # noqa: B023 - called at once

        try:
            both, first = (timed(work, size.repeats, q.device) for work in (layers, lambda: layers(merge=False)))
        except Exception as error:  # noqa: BLE001 - a tiling that does not fit is a finding
            say(f"    {change}: {type(error).__name__}")
            continue
        layer_us, merge_us = (seconds / size.layers * 1e6 for seconds in (both, both - first))
        say(f"    {layer_us:8.1f} us  merge {merge_us:6.1f}  items {prepared.counts.items:5d}  {change}")


def vars_of(tiling: Tiling) -> dict[str, int]:
    """A tiling's fields."""
    return {name: getattr(tiling, name) for name in Tiling.__dataclass_fields__}


def check(device: torch.device, *, tiny: bool) -> None:
    """Refuses to time what is wrong: dtypes, head sizes, rotations, windows, chunks, long blocks."""
    factor = 1 if tiny else 10
    lengths = [int(n) for n in np.random.default_rng(1).integers(10 * factor, 26 * factor, 8)] + [100 * factor]
    asks: list[Asked] = [(range(9), 70, 1), ([8, 3, 1, 3], 10, 40), (range(8, -1, -1), 130, 1), ([], 0, 66)]
    for head_dim in (16,) if tiny else (64, 128):
        turns = [rotation(rotary_dim=head_dim), rotation(RotationKind.INTERLEAVED, head_dim // 2), NONE]
        layers = [LayerGeometry(turns[i % 3], window) for i, window in enumerate((None, 50 * factor, None, 7))]
        for dtype in ("bfloat16", "float16", "float32"):
            shape = KvShape(len(layers), 2 if tiny else 8, head_dim, dtype)
            step = Step.make(device, lengths, asks, shape=shape, group=2 if tiny else 4, layers=layers)
            tolerance = TOLERANCE[getattr(torch, dtype)]
            say(f"triton {dtype} {head_dim}: {step.check(triton(step), tolerance):.1e}")
            if dtype != "float32" and device.type == "cuda":
                varlen = VarlenAttention(step.arena, step.layers, step.heads)
                say(f"varlen {dtype} {head_dim}: {step.check(varlen, TOLERANCE[torch.bfloat16]):.1e}")
    say(f"equal to dense float64 attention on {device}")


if __name__ == "__main__":
    main()
