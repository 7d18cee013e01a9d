"""The reference itself: its mask is used, and without documents it is ordinary generation."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import DynamicCache

from drystone.local.reference import Reference, Stop, block_mask
from tests.support.tiny_models import KINDS_SERVED, SLIDING_WINDOW, VOCAB_SIZE, make_tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Load = Callable[..., Reference]

WINDOWED = ("mistral-sliding", "qwen3-mixed-window")


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def make(kind: str, dtype: torch.dtype = torch.float32, eos_scale: float = 0.3) -> Reference:
        return Reference(make_tiny(kind, tmp_path / kind, eos_scale=eos_scale), dtype)

    return make


def _tokens(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def _keys_values(reference: Reference, blocks: list[list[int]], question: list[int]) -> list[torch.Tensor]:
    """Keys and values of every layer, each [heads, tokens, head_dim]."""
    cache = DynamicCache()
    mask = block_mask([len(block) for block in blocks], len(question), reference.device)
    with torch.inference_mode():
        reference._forward(list(itertools.chain(*blocks, question)), 0, mask, cache, rows=1)
    return [part[0] for layer in cache.layers for part in (layer.keys, layer.values)]


def test_the_mask_is_drawn_as_defined() -> None:
    drawn = ["".join("x" if cell else "." for cell in row) for row in block_mask([3, 2], 2, torch.device("cpu"))]
    assert drawn == ["x......", "xx.....", "xxx....", "...x...", "...xx..", "xxxxxx.", "xxxxxxx"]


@pytest.mark.parametrize("kind", KINDS_SERVED)
def test_a_document_does_not_see_another(load: Load, kind: str) -> None:
    reference = load(kind)
    first, second, question = _tokens(30, 25, 10)
    other = [*first[:7], first[7] % (VOCAB_SIZE - 3) + 3, *first[8:]]
    before = _keys_values(reference, [first, second], question)
    after = _keys_values(reference, [other, second], question)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :7], b[:, :7])
        assert torch.equal(a[:, 30:55], b[:, 30:55])
    # From the second layer on the question has seen the change, and so have later tokens of the changed document.
    assert not torch.allclose(before[-1][:, 55:], after[-1][:, 55:], atol=1e-3)
    assert not torch.allclose(before[-1][:, 8:30], after[-1][:, 8:30], atol=1e-3)


@pytest.mark.parametrize("kind", ["llama-default", "llama-gqa-tied", "qwen3"])
def test_a_document_alone_has_the_same_values(load: Load, kind: str) -> None:
    reference = load(kind)
    first, second, question = _tokens(30, 25, 10)
    values = _keys_values(reference, [first, second], question)[1::2]
    alone = _keys_values(reference, [], second)[1::2]
    for a, b in zip(values, alone, strict=True):
        assert torch.allclose(a[:, 30:55], b, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS_SERVED)
def test_without_documents_it_is_ordinary_generation(load: Load, kind: str) -> None:
    reference = load(kind)
    (prompt,) = _tokens(90)
    block = reference.block_generate([], prompt, 40)
    full = reference.full_generate(prompt, 40)
    assert block.token_ids == full.token_ids
    assert block.stop == full.stop
    assert torch.allclose(block.logits_first, full.logits_first, atol=1e-4)
    assert block.step_top2_gaps == pytest.approx(full.step_top2_gaps, abs=1e-3)
    assert len(set(block.token_ids)) > 10


@pytest.mark.parametrize("kind", KINDS_SERVED)
def test_one_document_and_a_question_is_ordinary_generation(load: Load, kind: str) -> None:
    reference = load(kind)
    (prompt,) = _tokens(90)
    split = reference.block_generate([prompt[:-1]], prompt[-1:], 20)
    assert split.token_ids == reference.full_generate(prompt, 20).token_ids


def test_two_documents_are_not_ordinary_generation(load: Load) -> None:
    reference = load("llama-default")
    first, second, question = _tokens(40, 40, 12)
    block = reference.block_generate([first, second], question, 8)
    full = reference.full_generate([*first, *second, *question], 8)
    assert (block.logits_first - full.logits_first).abs().max() > 0.1


@pytest.mark.parametrize("kind", WINDOWED)
def test_windowed_layers_cut_the_block_mask(load: Load, kind: str) -> None:
    reference = load(kind)
    assert SLIDING_WINDOW in reference.windows.values()
    first, second, question = _tokens(80, 60, 70)
    other = [first[0] % (VOCAB_SIZE - 3) + 3, *first[1:]]
    before = _keys_values(reference, [first, second], question)
    after = _keys_values(reference, [other, second], question)
    # A layer's output reaches a window further than its input: keys of layer 1 show what layer 0 attended to.
    windowed_at_0 = kind == "mistral-sliding"
    beyond = before[2][:, SLIDING_WINDOW:80], after[2][:, SLIDING_WINDOW:80]
    assert torch.equal(*beyond) == windowed_at_0
    assert not torch.equal(before[2][:, 1:SLIDING_WINDOW], after[2][:, 1:SLIDING_WINDOW])


def test_a_window_spans_blocks_by_distance(load: Load) -> None:
    reference = load("mistral-sliding")
    far, near, question = _tokens(200, 10, 12)
    (changed,) = _tokens(200, seed=1)
    reach = SLIDING_WINDOW * len(reference.model.model.layers)
    kept = [*changed[: 200 - reach], *far[200 - reach :]]
    first = reference.block_generate([far, near], question, 30)
    assert reference.block_generate([kept, near], question, 30).token_ids == first.token_ids
    seen = reference.block_generate([changed, near], question, 1)
    assert not torch.allclose(seen.logits_first, first.logits_first, atol=1e-2)


@pytest.mark.parametrize("kind", ["llama-yarn", *WINDOWED])
def test_teacher_forcing_with_its_own_answer_changes_nothing(load: Load, kind: str) -> None:
    reference = load(kind)
    *blocks, question = _tokens(40, 40, 12)
    free = reference.block_generate(blocks, question, 30)
    forced = reference.block_generate(blocks, question, 30, forced=free.token_ids)
    assert forced.token_ids == free.token_ids
    assert forced.step_top2_gaps == free.step_top2_gaps
    assert forced.step_forced_gaps == [0.0] * 30


def test_teacher_forcing_measures_another_answer(load: Load) -> None:
    reference = load("llama-default")
    *blocks, question = _tokens(40, 40, 12)
    free = reference.block_generate(blocks, question, 6)
    other = [*free.token_ids[:2], (free.token_ids[2] + 1) % VOCAB_SIZE, 7, 8]
    forced = reference.block_generate(blocks, question, 6, forced=other)
    assert forced.token_ids[:3] == free.token_ids[:3]
    assert len(forced.token_ids) == len(other)
    assert forced.step_forced_gaps[:2] == [0.0, 0.0]
    assert forced.step_forced_gaps[2] >= forced.step_top2_gaps[2] > 0


def test_eos_ends_an_answer_and_is_not_in_it(load: Load) -> None:
    reference = load("llama-default", eos_scale=2.0)
    runs = [reference.block_generate([a], q, 64) for a, q in (_tokens(20, 15, seed=seed) for seed in range(6))]
    ended = [run for run in runs if run.stop is Stop.EOS]
    assert ended
    for run in ended:
        assert not reference.eos_ids & set(run.token_ids)
        assert len(run.step_top2_gaps) == len(run.token_ids) + 1
    (prompt,) = _tokens(20)
    full, block = reference.full_generate(prompt, 64), reference.block_generate([], prompt, 64)
    assert (full.token_ids, full.stop) == (block.token_ids, block.stop)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_question_logits_have_a_row_per_question_token(load: Load, dtype: torch.dtype) -> None:
    reference = load("qwen2", dtype)
    *blocks, question = _tokens(40, 12)
    run = reference.block_generate(blocks, question, 1, keep_question_logits=True)
    assert run.question_logits is not None
    assert run.question_logits.shape == (12, VOCAB_SIZE)
    assert run.question_logits.dtype == run.logits_first.dtype == torch.float32
    assert torch.equal(run.question_logits[-1], run.logits_first)
    assert reference.block_generate(blocks, question, 1).question_logits is None
