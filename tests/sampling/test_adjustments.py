"""Penalties and bias against their definitions, written out token by token."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from decode_worker.sampling.adjustments import adjust
from decode_worker.sampling.tally import Tally
from tests.sampling.conftest import WIDTH, state


def defined(logits: torch.Tensor, prompt: list[int], past: list[int], values: dict[str, Any]) -> np.ndarray:
    """CTRL's penalty over prompt and answer, OpenAI's two over the answer, then bias."""
    result = logits.numpy().astype(np.float64).copy()
    penalty = values.get("repetition_penalty", 1.0)
    for token in set(prompt) | set(past):
        result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
    for token, count in Counter(past).items():
        result[token] -= values.get("frequency_penalty", 0.0) * count + values.get("presence_penalty", 0.0)
    for token, bias in values.get("logit_bias", {}).items():
        result[token] += bias
    return result


_ids = st.integers(0, WIDTH - 1)
_values = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.25, 1.5, 4.0]),
        "frequency_penalty": st.sampled_from([-2.0, 0.5]),
        "presence_penalty": st.sampled_from([-1.0, 2.0]),
        "logit_bias": st.dictionaries(_ids, st.integers(-100, 100).map(float), max_size=4),
    },
)


@settings(max_examples=80)
@given(
    values=_values,
    prompt=st.lists(_ids, max_size=30),
    past=st.lists(st.integers(3, 12), max_size=200),
    noise=st.integers(0, 2**32),
)
def test_penalties_and_bias_are_as_defined(
    values: dict[str, Any], prompt: list[int], past: list[int], noise: int
) -> None:
    logits = torch.randn((2, WIDTH), generator=torch.Generator().manual_seed(noise)) * 5
    original = logits.clone()
    sample = state(prompt=prompt, past=past, **values)
    assert not adjust(logits, [1], [sample])
    assert torch.equal(logits[0], original[0])
    np.testing.assert_allclose(logits[1].numpy(), defined(original[1], prompt, past, values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1e-45},
        {"repetition_penalty": 3e38},
        {"frequency_penalty": 3e38},
        {"presence_penalty": -3e38, "frequency_penalty": -3e38},
        {"logit_bias": {5: 3.4e38, 6: -3.4e38}},
    ],
    ids=str,
)
def test_absurd_values_leave_numbers(values: dict[str, Any]) -> None:
    logits = torch.randn((1, WIDTH))
    logits[0, 4] = -torch.inf
    adjust(logits, [0], [state(prompt=[3, 4, 5], past=[5, 5, 6], **values)])
    assert not logits.isnan().any()
    assert not logits.isposinf().any()
    assert logits[0, 4].isneginf(), "what the model rules out stays out"
    assert logits.isneginf().sum() == 1


def test_the_prompt_counts_for_repetition_alone() -> None:
    logits = torch.full((1, WIDTH), 2.0)
    adjust(logits, [0], [state(prompt=[9], frequency_penalty=1.0, presence_penalty=1.0)])
    assert logits[0, 9] == 2.0
    adjust(logits, [0], [state(prompt=[9], repetition_penalty=2.0)])
    assert logits[0, 9] == 1.0


def test_nothing_is_adjusted_that_nobody_asked_for() -> None:
    assert not state(past=[5]).adjusted
    assert not state(min_new_tokens=1, past=[5]).adjusted
    assert state(min_new_tokens=2, past=[5]).adjusted
    for values in ({"logit_bias": {1: 1.0}}, {"repetition_penalty": 1.1}, {"presence_penalty": 1.0}):
        assert state(**values).adjusted


def test_a_tally_counts() -> None:
    tally, expected = Tally(), Counter[int]()
    for number in range(1000):
        token = number * number % 331
        tally.add(token)
        expected[token] += 1
    assert dict(zip(tally.ids.tolist(), tally.counts.tolist(), strict=True)) == expected
