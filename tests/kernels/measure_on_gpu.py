"""Times the segment kernel at Llama-3.1-8B shapes on a GPU, after checking it there; prints one table.

`python -m tests.kernels.measure_on_gpu` on the GPU. `TRITON_INTERPRET=1 ... --tiny` is a dry run of the
same code on a CPU, whose times mean nothing.

All layers are timed in one captured graph, so that a layer's keys are never in the cache from before.
The floor is every key's bytes once over the bandwidth of a plain copy measured here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch

from decode_worker.attention.triton_plan import SegmentPiece, Tiling
from decode_worker.attention.triton_segments import Limits, TritonSegmentAttention
from shared.engine.rotation import RotationKind
from tests.kernels.scenes import NONE, Ask, Heads, Scene, rotation

_SEGMENT = 64


@dataclass(frozen=True)
class Size:
    """What is measured: the model's shape, tokens of all blocks together, and the tail before the step."""

    layers: int = 32
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    tokens: int = 32_768
    filled: int = 200
    chunk: int = 256
    repeats: int = 20


TINY = Size(layers=2, kv_heads=1, group=2, head_dim=16, tokens=256, filled=20, chunk=8, repeats=1)


def main() -> None:
    """Checks, then measures every case with every tiling."""
    tiny = "--tiny" in sys.argv
    size, device = (TINY, torch.device("cpu")) if tiny else (Size(), torch.device("cuda"))
    check(device, Heads(1, 2) if tiny else Heads(8, 4, 128), 60 if tiny else 3_000)
    bandwidth = copy_bandwidth(device, 1 << (16 if tiny else 31))
    _say(f"copy {bandwidth / 1e12:.2f} TB/s")
    # Room for eight tails of whole segments.
    tokens = size.tokens + 8 * (size.filled + size.chunk + _SEGMENT)
    shape = (size.layers * tokens, 2 * size.kv_heads * size.head_dim)
    records = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
    passage = size.tokens // 16
    cases = {
        "1 row": ([range(16)], 1),
        "8 requests, same blocks": ([range(16)] * 8, 1),
        "8 requests, own blocks": ([range(2 * i, 2 * i + 2) for i in range(8)], 1),
        "question chunk": ([range(16)], size.chunk),
    }
    for name, (laid, rows) in cases.items():
        pieces, positions = step_of(size, laid, rows, passage)
        keys = sum(piece.keys for piece in pieces)
        floor = keys * records.shape[1] * records.element_size() / bandwidth
        _say(f"\n{name}: {keys} keys, floor {floor * 1e6:.1f} us a layer")
        stacked = sum(len(piece.rows) for piece in pieces)
        attention = TritonSegmentAttention(
            records,
            heads=size.kv_heads * size.group,
            kv_heads=size.kv_heads,
            head_dim=size.head_dim,
            rotations=[rotation(rotary_dim=size.head_dim)] * size.layers,
            limits=Limits(len(positions), stacked, stacked + 8_192),
        )
        q = torch.randn(size.kv_heads * size.group, len(positions), size.head_dim, device=device).to(records.dtype)
        for tiling in tilings(attention.tiling(rows * len(laid)), wide=rows > 1, tiny=tiny):
            start = time.perf_counter()
            counts = attention.prepare(pieces, positions, tiling=tiling)
            planned = time.perf_counter() - start
            both, first = (layer_time(attention, q, size, merge=merge) for merge in (True, False))
            _say(
                f"  {both * 1e6:8.1f} us  merge {(both - first) * 1e6:6.1f}  floor/time {floor / both:5.2f}  items "
                f"{counts.items:5d}  prepare {planned * 1e3:5.2f} ms  {tiling}"
            )


def check(device: torch.device, heads: Heads, length: int) -> None:
    """Refuses to time a kernel that is wrong: types, rotations, windows, a chunk, splits."""
    asks = [Ask([0, 1, 0], filled=30), Ask([1], filled=5, rows=20), Ask([1, 0])]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for turn in (
            rotation(rotary_dim=heads.head_dim),
            rotation(RotationKind.INTERLEAVED, heads.head_dim // 2),
            NONE,
        ):
            for window in (None, length // 2):
                scene = Scene(asks, [length, 41], heads, turn, dtype, start=70_000, device=device)
                scene.check(window)
    _say(f"equal to dense float64 attention on {device}")


def step_of(size: Size, laid: list[range], rows: int, passage: int) -> tuple[list[SegmentPiece], list[int]]:
    """Requests with their blocks in this order, a tail each, and `rows` rows each."""
    pieces, positions = [], []
    for block in sorted({block for blocks in laid for block in blocks}):
        users = [(i, blocks.index(block) * passage) for i, blocks in enumerate(laid) if block in blocks]
        of_piece = [i * rows + row for i, _ in users for row in range(rows)]
        bases = [base for _, base in users for _ in range(rows)]
        pieces.append(SegmentPiece(block * passage * size.layers, passage, passage, of_piece, bases, local=True))
    record = size.tokens * size.layers
    for i, blocks in enumerate(laid):
        tail = len(blocks) * passage
        positions.extend(range(tail + size.filled, tail + size.filled + rows))
        for begin in range(0, size.filled + rows, _SEGMENT):
            after = range(i * rows + max(0, begin - size.filled), (i + 1) * rows)
            keys = min(_SEGMENT, size.filled + rows - begin)
            pieces.append(SegmentPiece(record, _SEGMENT, keys, after, [tail + begin] * len(after), local=False))
            record += _SEGMENT * size.layers
    return pieces, positions


def tilings(chosen: Tiling, *, wide: bool, tiny: bool) -> list[Tiling]:
    """The chosen tiling, then one change at a time; twice the chosen one, whose difference is the noise."""
    if tiny:
        return [chosen, replace(chosen, programs=8, tile_keys=16, min_keys=16)]
    changes: list[dict[str, int]] = [{}, *({"programs": 132 * n} for n in (2, 3, 6, 8, 12))]
    changes += [{"min_keys": 128}, {"min_keys": 512}, {"stages": 2}, {"stages": 4}, {"tile_keys": 32}]
    changes += [{"warps": 8}, {"tile_rows": 128, "warps": 8}] if wide else [{"warps": 2}, {"tile_keys": 128}]
    return [chosen, *(replace(chosen, **change) for change in changes)]


def layer_time(attention: TritonSegmentAttention, q: torch.Tensor, size: Size, *, merge: bool) -> float:
    """Seconds a layer of a prepared step."""

    def step() -> None:
        for layer in range(size.layers):
            attention._launch_partials(layer, q, size.head_dim**-0.5, None)
            if merge:
                attention._launch_merge(q.dtype)

    return timed(step, size.repeats, q.device) / size.layers


def timed(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median seconds of `work`, captured and replayed where there is a GPU."""
    work()
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    seconds = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return median(seconds)


def copy_bandwidth(device: torch.device, elements: int) -> float:
    """Bytes read and written a second by a plain copy."""
    source = torch.empty(elements // 2, dtype=torch.int16, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), 20, device)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
