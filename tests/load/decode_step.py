"""A whole decode step: the fused decoder against the seam, by rows and sharing, beside what memory allows.

    OMP_NUM_THREADS=1 taskset -c 1 python -m tests.load.decode_step [--clock cpu] [--json FILE]

Times are minima over runs that take turns, from plan to logits, Python included. On a shared machine `--clock cpu`
counts this process alone. The floor is the bytes of weights and KV over what one thread reads when it does nothing
else (tests/load/bandwidth.py, one stream); a step that reads by several streams at once can be below it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import torch

from decode_worker.arena import Arena, Extent
from decode_worker.attention.native import NativeAttention
from decode_worker.fused import FusedDecoder
from decode_worker.step import Placement, RowSpan, StepPlan
from decode_worker.tail import SEGMENT_TOKENS, Tail
from shared.engine import served_model
from shared.engine.native import builder
from shared.engine.served_model import ServedModel
from shared.model.catalog import DEFAULT, cache_dir, resolve_model
from tests.load.bandwidth import Floor, read_rate

_FILLED: Final = 40
_CLOCKS: Final = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Case:
    """One kind of step.

    Attributes:
        name: Shown.
        passages: Blocks of each request.
        tokens: Tokens of a block.
        requests: Requests over the same blocks, each in another order.
        rows: New rows of each request: 1 decodes, more read a question.
        share: Requests share the reading of blocks.
    """

    name: str
    passages: int = 10
    tokens: int = 177
    requests: int = 1
    rows: int = 1
    share: bool = True


@dataclass(frozen=True)
class Row:
    """What was measured, in milliseconds. `floor` is None where a step computes more than it reads."""

    case: str
    fused: float
    seam: float
    floor: float | None


CASES: Final = (
    Case("1 stream"),
    Case("8 streams", requests=8),
    Case("16 streams", requests=16),
    Case("16 streams, 7,500 tokens", passages=43, tokens=175, requests=16),
    Case("16 streams, 7,500 tokens, not shared", passages=43, tokens=175, requests=16, share=False),
    Case("question of 20", rows=20),
    Case("question of 60", rows=60),
    Case("question of 120", rows=120),
)


class Bench:
    """A model, an arena, and both ways of running a step."""

    def __init__(self, model: ServedModel, clock: Callable[[], float], runs: int) -> None:
        self._model, self._clock, self._runs = model, clock, runs
        shape = model.geometry.shape
        tokens = max(case.passages * case.tokens + case.requests * 4 * SEGMENT_TOKENS for case in CASES)
        self._arena = Arena(shape, shape.extent_bytes(tokens), torch.device("cpu"))
        self._arena.records.normal_(generator=torch.Generator().manual_seed(0))
        kernel = builder.load(cache_dir() / "kernels")
        fused = FusedDecoder.prove(model, self._arena, kernel) if kernel else None
        if kernel is None or fused is None:
            raise SystemExit("the fused decoder cannot be had here; see the line above")
        self._seam = NativeAttention(self._arena, model.geometry.layers, kernel)
        self._fused = fused

    def measure(self, case: Case, floor: Callable[[int], float]) -> Row:
        """Both ways in turns; the least time of each."""
        spans, held = self._requests(case)
        times: dict[str, list[float]] = {"fused": [], "seam": []}
        for _ in range(self._runs):
            for name, run in (("fused", self._run_fused), ("seam", self._run_seam)):
                began = self._clock()
                run(StepPlan(spans, share=case.share), torch.arange(1, case.requests + 1) * case.rows - 1)
                times[name].append((self._clock() - began) * 1e3)
        for extent in held:
            self._arena.free(extent)
        least = floor(case.passages * case.tokens) * 1e3 if case.rows == 1 and case.share else None
        return Row(case.name, min(times["fused"]), min(times["seam"]), least)

    def _run_fused(self, plan: StepPlan, keep: torch.Tensor) -> None:
        self._fused.logits(plan, keep)

    def _run_seam(self, plan: StepPlan, keep: torch.Tensor) -> None:
        self._model.forward_logits(plan.token_ids, plan.positions, keep, self._seam.begin(plan))

    def _requests(self, case: Case) -> tuple[list[RowSpan], list[Extent]]:
        blocks = [self._extent(case.tokens) for _ in range(case.passages)]
        held, spans = list(blocks), []
        for request in range(case.requests):
            order = [(request + at) % case.passages for at in range(case.passages)]
            placements = [Placement(bytes([at]), blocks[at], case.tokens * place) for place, at in enumerate(order)]
            own = [self._extent(SEGMENT_TOKENS) for _ in range(-(-(_FILLED + case.rows) // SEGMENT_TOKENS))]
            tail = Tail(self._arena, case.tokens * case.passages, own=own, filled=_FILLED)
            spans.append(RowSpan([5 + request] * case.rows, placements, tail))
            held.extend(own)
        return spans, held

    def _extent(self, tokens: int) -> Extent:
        extent = self._arena.allocate(tokens)
        if extent is None:
            raise MemoryError("the arena is too small for its own cases")
        return extent


def _floor(model: ServedModel) -> Floor:
    """Every parameter once, a tied head with the embeddings; the KV of a context."""
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in model.module.parameters()}
    shape = model.geometry.shape
    return Floor(sum(weights.values()), shape.layers * shape.record_bytes, 0, read_rate())


def main() -> None:
    """Prints a line for each case, then the ratios that are wanted of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT, help="folder, GGUF file, hub id or 'default'")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--runs", type=int, default=9, help="runs of each case")
    parser.add_argument("--clock", choices=sorted(_CLOCKS), default="wall")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = resolve_model(options.model, print)
    model = served_model.load(folder, name=options.model, dtype=options.dtype)
    floor = _floor(model)
    torch.set_num_threads(options.threads)
    bench = Bench(model, _CLOCKS[options.clock], options.runs)
    print(f"{model.geometry.shape.dtype}, {options.threads} thread(s), {floor.bytes_per_second / 1e9:.1f} GB/s")
    print(f"{'step':<38}{'fused ms':>9}{'seam ms':>9}{'ratio':>7}{'floor ms':>9}{'of floor':>9}")
    rows = []
    for case in CASES:
        row = bench.measure(case, lambda tokens: replace(floor, context_tokens=tokens).seconds)
        rows.append(row)
        least = f"{row.floor:9.1f}{row.floor / row.fused:9.0%}" if row.floor else ""
        print(f"{row.case:<38}{row.fused:9.1f}{row.seam:9.1f}{row.seam / row.fused:7.2f}{least}", flush=True)
    one, eight, sixteen, shared, apart = (row.fused for row in rows[:5])
    print(f"8 streams / 1: {eight / one:.2f}   16 / 1: {sixteen / one:.2f}   shared / not shared: {shared / apart:.2f}")
    if options.json:
        figures = {"dtype": model.geometry.shape.dtype, "threads": options.threads, "clock": options.clock}
        options.json.write_text(json.dumps(figures | {"steps": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
