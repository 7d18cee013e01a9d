"""Attention of a step: the CPU kernel against the torch path, in one run.

    python -m tests.load.decode_attention [--tokens 1760] [--threads 1]

SmolLM2-135M's shapes, random values: 30 layers, 9 heads over 3 KV heads of 64, blocks of 160 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from decode_worker.arena import Arena, Extent
from decode_worker.attention.flash import FlashAttention
from decode_worker.attention.native import NativeAttention
from decode_worker.step import Placement, RowSpan, StepPlan
from decode_worker.tail import SEGMENT_TOKENS, Tail
from shared.engine.native import builder
from shared.engine.native.builder import NativeKernel
from shared.engine.probe import LayerGeometry
from shared.engine.rotation import Rotation, RotationKind
from shared.engine.seam import AttentionContext
from shared.kv.layout import KvShape
from shared.model.catalog import cache_dir

LAYERS, HEADS, KV_HEADS, WIDTH, BLOCK, FILLED = 30, 9, 3, 64, 160, 70


# Requests, and new rows of each.
CASES = ((1, 1), (4, 1), (16, 1), (1, 20), (1, 60))


def spans(arena: Arena, tokens: int, requests: int, rows: int) -> list[RowSpan]:
    """Requests over the same blocks, each in another order."""
    views = [_extent(arena, BLOCK) for _ in range(tokens // BLOCK)]
    made = []
    for request in range(requests):
        order = [*range(request % len(views), len(views)), *range(request % len(views))]
        placements = [Placement(bytes([at]), views[at], BLOCK * place) for place, at in enumerate(order)]
        own = [_extent(arena, SEGMENT_TOKENS) for _ in range(-(-(FILLED + rows) // SEGMENT_TOKENS))]
        made.append(RowSpan([5] * rows, placements, Tail(arena, BLOCK * len(views), own=own, filled=FILLED)))
    return made


def _extent(arena: Arena, tokens: int) -> Extent:
    extent = arena.allocate(tokens)
    if extent is None:
        raise MemoryError("the arena is too small for --tokens")
    return extent


def median_ms(step: Callable[[], None], runs: int = 15) -> float:
    """Median milliseconds of a step after two that are not counted."""
    times = []
    for _ in range(runs + 2):
        began = time.perf_counter()
        step()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[2:])


def measure(kernel: NativeKernel, dtype: str, tokens: int, requests: int, count: int) -> tuple[float, float]:
    """Milliseconds of all layers' attention: torch path, kernel."""
    shape = KvShape(LAYERS, KV_HEADS, WIDTH, dtype)
    arena = Arena(shape, shape.extent_bytes(tokens + 256 * requests), torch.device("cpu"))
    arena.records.normal_()
    rotation = Rotation(RotationKind.HALF, 1.0 / 1e5 ** (torch.arange(0, WIDTH, 2) / WIDTH))
    rows = spans(arena, tokens, requests, count)
    q, k, v = (
        torch.randn(1, heads, requests * count, WIDTH).to(getattr(torch, dtype))
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    results = []
    layers = [LayerGeometry(rotation, None)] * LAYERS
    for backend in (FlashAttention(arena, layers), NativeAttention(arena, layers, kernel)):
        context = backend.begin(StepPlan(rows))

        def step(context: AttentionContext = context) -> None:
            for layer in range(LAYERS):
                context.attend(layer, q, k, v, WIDTH**-0.5, None)

        results.append(median_ms(step))
    return results[0], results[1]


def main() -> None:
    """Prints one line for each type and number of requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1760, help="tokens of the blocks")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernel = builder.load(cache_dir() / "kernels")
    if kernel is None:
        raise SystemExit("the kernel cannot be built here; see the line above")
    print(f"{'type':>10} {'requests':>8} {'rows':>5} {'torch ms':>9} {'kernel ms':>9} {'ratio':>6}")
    for dtype in ("float32", "bfloat16"):
        for requests, count in CASES:
            torch_ms, kernel_ms = measure(kernel, dtype, options.tokens, requests, count)
            print(f"{dtype:>10} {requests:>8} {count:>5} {torch_ms:9.1f} {kernel_ms:9.1f} {torch_ms / kernel_ms:6.1f}")


if __name__ == "__main__":
    main()
