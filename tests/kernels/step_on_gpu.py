"""Whole steps of a model on a GPU: a tiny one against the CPU's logits, then one of a served model's shape, timed.

`python -m tests.kernels.step_on_gpu`. The large model has random weights: times do not depend on them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from decode_worker.arena import Arena
from decode_worker.attention.base import SegmentAttention
from decode_worker.attention.flash import FlashAttention
from decode_worker.attention.triton_backend import TritonAttention
from decode_worker.attention.varlen import VarlenAttention
from decode_worker.step import Placement, RowSpan, StepPlan
from decode_worker.tail import SEGMENT_TOKENS, Tail, segments_for
from shared.engine import seam
from shared.engine.encode import encode_block, encode_blocks
from shared.engine.probe import probe
from shared.engine.served_model import ServedModel
from tests.kernels.gpu_clock import say, timed
from tests.support.tiny_models import make_tiny

QWEN3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


def main() -> None:
    """Exactness, then times."""
    seam.register()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("llama-default", "llama-yarn", "mistral-sliding", "qwen3"):
            exact(kind, make_tiny(kind, Path(folder) / kind))
    if "--exact" not in sys.argv:
        large()


def served(module: Any, dtype: str, context: int) -> ServedModel:
    """A model as `served_model.load` makes it, on whatever device it is."""
    module = module.eval().requires_grad_(requires_grad=False)
    geometry = probe(module, dtype=dtype, context_tokens=context)
    return ServedModel("model", Path(), module, geometry, bytes(32), context, frozenset())


class Run:
    """An arena with encoded blocks, and requests over them."""

    def __init__(self, model: ServedModel, lengths: list[int], tokens: int, *, pack: bool = False) -> None:
        self.model = model
        shape = model.geometry.shape
        self.arena = Arena(shape, shape.extent_bytes(tokens), model.device)
        draw = np.random.default_rng(3)
        self.ids = [draw.integers(3, model.vocabulary_size, n).tolist() for n in lengths]
        self.extents = []
        for ids in self.ids:
            extent = self.arena.allocate(len(ids))
            assert extent is not None
            if not pack:
                encode_block(model, ids, self.arena.view(extent))
            self.extents.append(extent)
        if pack:
            views = [self.arena.view(extent) for extent in self.extents]
            assert encode_blocks(model, list(zip(self.ids, views, strict=True))) == [None] * len(views)

    def span(self, laid: list[int], ids: list[int], filled: int = 0) -> RowSpan:
        """A request's next rows."""
        placements, offset = [], 0
        for index in laid:
            placements.append(Placement(index.to_bytes(4, "big"), self.extents[index], offset))
            offset += len(self.ids[index])
        own = [self.arena.allocate(SEGMENT_TOKENS, high=True) for _ in range(segments_for(filled + len(ids)))]
        tail = Tail(self.arena, offset, own=[extent for extent in own if extent is not None], filled=filled)
        for extent in tail.own:
            self.arena.view(extent).normal_()
        return RowSpan(ids, placements, tail)

    @torch.inference_mode()
    def step(self, spans: list[RowSpan], backend: SegmentAttention) -> torch.Tensor:
        """Logits of each span's last row, as the runner asks for them."""
        plan = StepPlan(spans)
        ends = torch.tensor([len(span.token_ids) for span in spans]).cumsum(0) - 1
        moved = (tensor.to(self.model.device) for tensor in (plan.token_ids, plan.positions, ends))
        return self.model.forward_logits(*moved, backend.begin(plan))


def exact(kind: str, folder: Path) -> None:
    """Float32 logits of the CPU's step and the GPU's; bfloat16 ones against them by relative RMS."""
    logits = {}
    for name, device, dtype in (
        ("cpu", "cpu", "float32"),
        ("triton", "cuda", "float32"),
        ("bf16", "cuda", "bfloat16"),
        ("packed", "cuda", "bfloat16"),
    ):
        module = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation=seam.NAME
        )
        run = Run(served(module.to(device), dtype, 2048), [90, 1, 140, 33], 2_000, pack=name == "packed")
        geometry = run.model.geometry
        spans = [run.span([0, 2, 1], [9, 8, 7, 6, 5] * 9), run.span([3, 0, 3], [4] * 3), run.span([], [5, 6, 7])]
        chosen: list[tuple[str, SegmentAttention]] = [("flash", FlashAttention(run.arena, geometry.layers))]
        if device == "cuda":
            chosen = [("triton", TritonAttention(run.arena, geometry.layers, geometry.heads))]
        if dtype == "bfloat16":
            chosen.append(("varlen", VarlenAttention(run.arena, geometry.layers, geometry.heads)))
        for label, backend in chosen:
            logits[f"{name} {label}"] = run.step(spans, backend).cpu()
    reference = logits.pop("cpu flash")
    for name, made in logits.items():
        worst, rms = (made - reference).abs().max(), (made - reference).norm() / reference.norm()
        say(f"{kind:18s} {name:16s} largest logit difference {float(worst):.1e}, relative RMS {float(rms):.1e}")


def large() -> None:
    """Qwen3-8B's shape: encoding 32K tokens, a warm first token over them, decoding steps."""
    config = AutoConfig.for_model("qwen3", **QWEN3_8B)
    with torch.device("cuda"):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=seam.NAME)
    model = served(module, "bfloat16", 40_960)
    draw = np.random.default_rng(0)
    lengths = [int(n) for n in draw.integers(100, 257, 184)]
    say(f"\nQwen3-8B shape, {sum(lengths)} tokens in {len(lengths)} blocks")
    for pack in (False, True, True):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run = Run(model, lengths, sum(lengths) + 110 * SEGMENT_TOKENS, pack=pack)
        torch.cuda.synchronize()
        say(f"  encoded {'together' if pack else 'one by one'} in {time.perf_counter() - start:.2f} s")
    geometry = model.geometry
    order = list(range(len(lengths)))
    cases = {
        "first token, question of 64": [run.span(order, [5] * 64)],
        "decode, 1 request": [run.span(order, [5], filled=70)],
        "decode, 16 requests": [run.span(draw.permutation(order).tolist(), [5], filled=70) for _ in range(16)],
        "decode, 64 requests": [run.span(draw.permutation(order).tolist(), [5], filled=10) for _ in range(64)],
    }
    for name, spans in cases.items():
        for backend in (
            TritonAttention(run.arena, geometry.layers, geometry.heads),
            VarlenAttention(run.arena, geometry.layers, geometry.heads),
        ):
            times = []
            for _ in range(6):
                torch.cuda.synchronize()
                start = time.perf_counter()
                run.step(spans, backend).argmax(-1).cpu()
                times.append(time.perf_counter() - start)
            say(f"  {name:28s} {backend.name:8s} {median(times[1:]) * 1e3:7.1f} ms a step (first {times[0] * 1e3:.0f})")
        try:
            say(f"  {name:28s} captured {captured(run, spans) * 1e3:7.1f} ms a step")
        except RuntimeError as error:
            say(f"  {name:28s} cannot be captured: {error}")


@torch.inference_mode()
def captured(run: Run, spans: list[RowSpan]) -> float:
    """Seconds of a step's launches in one CUDA graph, with the Triton backend: what is left without Python."""
    geometry = run.model.geometry
    plan = StepPlan(spans)
    ends = torch.tensor([len(span.token_ids) for span in spans]).cumsum(0) - 1
    moved = [tensor.to(run.model.device) for tensor in (plan.token_ids, plan.positions, ends)]
    context = TritonAttention(run.arena, geometry.layers, geometry.heads).begin(plan)
    return timed(lambda: run.model.forward_logits(*moved, context), 10, run.model.device)


if __name__ == "__main__":
    main()
