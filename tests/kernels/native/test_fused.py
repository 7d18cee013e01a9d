"""The fused decoder equals transformers' forward through the seam; what it does not know it refuses, saying why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from decode_worker.attention.flash import FlashAttention
from decode_worker.fused import FusedDecoder
from decode_worker.step import StepPlan
from shared.engine import served_model
from shared.engine.encode import encode_block, new_extent
from shared.engine.native.agreement import distance
from shared.engine.native.builder import NativeKernel
from shared.engine.native.decoder import NativeDecoder, UnfusedError
from shared.engine.native.encoder import NativeEncoder
from shared.engine.served_model import ServedModel
from tests.kernels.native.ragged import Ragged

FUSED = (
    "llama-default",
    "llama-llama3rope",
    "llama-yarn",
    "llama-mha-untied",
    "llama-gqa-tied",
    "qwen2",
    "qwen3",
    "mistral",
)
UNFUSED = ("qwen3-mixed-window", "mistral-sliding")
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-2}
Load = Callable[..., ServedModel]


@pytest.fixture(scope="session")
def load(tiny_folder: Callable[..., Path]) -> Load:
    """A tiny model, loaded anew each time: a test may change it."""
    return lambda kind, dtype="float32": served_model.load(tiny_folder(kind), name=kind, dtype=dtype)


def fuse(model: ServedModel, arena: Any, kernel: NativeKernel) -> FusedDecoder:
    fused = FusedDecoder.prove(model, arena, kernel)
    assert fused is not None
    return fused


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", FUSED)
def test_equals_the_forward_through_the_seam(any_kernel: NativeKernel, load: Load, kind: str, dtype: str) -> None:
    model = load(kind, dtype)
    for seed, rows in enumerate(((1,), (1, 2, 1), (67, 1, 20), (110,))):
        ragged = Ragged(model.geometry.shape, rows, seed)
        arena, spans = ragged.build()
        plan = StepPlan(spans)
        keep = torch.tensor([sum(rows) - 1, 0])
        context = FlashAttention(arena, model.geometry.layers).begin(plan)
        wanted = model.forward_logits(plan.token_ids, plan.positions, keep, context)
        records, (arena, spans) = arena.records, ragged.build()
        fused = fuse(model, arena, any_kernel)
        plan = StepPlan(spans)
        assert fused.takes(plan)
        logits = fused.logits(plan, keep)
        assert logits.dtype == torch.float32
        assert distance(logits, wanted) < TOLERANCE[dtype]
        assert distance(arena.records, records) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["llama-gqa-tied", "qwen2", "qwen3"])
def test_bfloat16_is_nearer_to_float32_than_transformers_own(kernel: NativeKernel, load: Load, kind: str) -> None:
    exact, model = load(kind), load(kind, "bfloat16")
    logits = {}
    for name, of in (("exact", exact), ("own", model), ("fused", model)):
        arena, spans = Ragged(of.geometry.shape, (40, 1, 9)).build()
        arena.records.zero_()
        plan = StepPlan(spans)
        keep = torch.arange(50)
        if name == "fused":
            logits[name] = fuse(of, arena, kernel).logits(plan, keep)
        else:
            context = FlashAttention(arena, of.geometry.layers).begin(plan)
            logits[name] = of.forward_logits(plan.token_ids, plan.positions, keep, context)
    assert distance(logits["fused"], logits["exact"]) < distance(logits["own"], logits["exact"])


def test_no_row_kept_still_writes_the_kv(kernel: NativeKernel, load: Load) -> None:
    model, written = load("qwen3"), []
    for keep in (torch.tensor([2]), torch.empty(0, dtype=torch.int64)):
        arena, spans = Ragged(model.geometry.shape, (3, 1)).build()
        assert fuse(model, arena, kernel).logits(StepPlan(spans), keep).shape == (len(keep), model.vocabulary_size)
        written.append(arena.records)
    assert torch.equal(*written)


def test_sharing_off_changes_nothing(kernel: NativeKernel, load: Load) -> None:
    model, logits = load("llama-default"), []
    for share in (True, False):
        arena, spans = Ragged(model.geometry.shape, (1, 5, 1, 1)).build()
        plan = StepPlan(spans, share=share)
        logits.append(fuse(model, arena, kernel).logits(plan, torch.arange(len(plan.token_ids))))
    assert distance(*logits) < TOLERANCE["float32"]


def test_two_threads_change_nothing(kernel: NativeKernel, load: Load) -> None:
    model, logits, before = load("llama-gqa-tied"), [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            arena, spans = Ragged(model.geometry.shape, (1, 30)).build()
            logits.append(fuse(model, arena, kernel).logits(StepPlan(spans), torch.arange(31)))
    finally:
        torch.set_num_threads(before)
    assert distance(*logits) < TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama-yarn", "qwen2", "qwen3"])
def test_encodes_a_block_in_chunks_of_any_size(kernel: NativeKernel, load: Load, kind: str, dtype: str) -> None:
    model = load(kind, dtype)
    encoder = NativeEncoder.prove(model, kernel)
    assert encoder is not None
    ids = torch.arange(150) % model.vocabulary_size
    wanted = new_extent(model.geometry.shape, len(ids))
    encode_block(model, ids.tolist(), wanted)
    for chunk in (150, 64, 37):
        extent = torch.full_like(wanted, float("nan"))
        for start in range(0, len(ids), chunk):
            encoder.encode_chunk(ids[start : start + chunk], start, extent)
        assert distance(extent, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", UNFUSED)
def test_models_with_a_window_stay_on_the_seam(kernel: NativeKernel, load: Load, kind: str) -> None:
    with pytest.raises(UnfusedError, match="window"):
        NativeDecoder.read(load(kind), kernel)
    arena, _ = Ragged(load(kind).geometry.shape, (1,)).build()
    assert FusedDecoder.prove(load(kind), arena, kernel) is None
    assert NativeEncoder.prove(load(kind), kernel) is None


class Scaled(nn.Linear):
    """A linear layer of another class, as adapters and quantisation bring them."""


def _hook(module: Any) -> None:
    module.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def _activation(module: Any) -> None:
    module.model.layers[0].mlp.act_fn = nn.GELU()


def _other_linear(module: Any) -> None:
    module.model.layers[2].self_attn.o_proj.__class__ = Scaled


def _more(module: Any) -> None:
    module.model.layers[0].extra_norm = nn.Identity()


def _parameter(module: Any) -> None:
    module.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(6))


def _epsilon(module: Any) -> None:
    module.model.layers[1].input_layernorm.variance_epsilon = 1e-2


def _transposed(module: Any) -> None:
    weight = module.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T


def _soft_cap(module: Any) -> None:
    module.config.final_logit_softcapping = 30.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "has hooks"),
        (_activation, "GELU"),
        (_other_linear, "Scaled"),
        (_more, "extra_norm"),
        (_parameter, "sinks"),
        (_epsilon, "epsilon"),
        (_transposed, "strides"),
        (_soft_cap, "softcapping"),
    ],
)
def test_refuses_what_it_does_not_know(
    kernel: NativeKernel, load: Load, change: Callable[[Any], None], reason: str
) -> None:
    model = load("llama-default")
    change(model.module)
    with pytest.raises(UnfusedError, match=reason):
        NativeDecoder.read(model, kernel)


class SiLU(nn.Module):
    """Passes for the activation by its name, and is another function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_proof_refuses_what_the_structure_does_not_show(kernel: NativeKernel, load: Load, dtype: str) -> None:
    model = load("llama-default", dtype)
    model.module.model.layers[1].mlp.act_fn = SiLU()
    NativeDecoder.read(model, kernel)
    arena, _ = Ragged(model.geometry.shape, (1,)).build()
    assert FusedDecoder.prove(model, arena, kernel) is None
    assert NativeEncoder.prove(model, kernel) is None


def test_a_type_without_a_kernel_stays_on_the_seam(kernel: NativeKernel, load: Load) -> None:
    with pytest.raises(UnfusedError, match="no kernel for float16"):
        NativeDecoder.read(load("llama-default", "float16"), kernel)
