"""Times of work on a GPU, by events around a captured graph's replays."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import torch


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
    source = torch.empty(elements // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    seconds = [
        timed(work, 20, device) for work in (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    ]
    return 2 * source.nbytes / min(seconds)


def say(text: str) -> None:
    """A line, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
