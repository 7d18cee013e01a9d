"""Draws: against the distribution worked out in numpy, and that they depend on nothing else."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from decode_worker.sampling import SampleState, uniform
from decode_worker.sampling.draws import draw
from decode_worker.sampling.filters import filtered
from drystone.v1.sampling_pb2 import SamplingParams
from tests.sampling.conftest import params

VOCAB = 40
GOLDEN = (0.5856547424004146, 0.6994603796001606)


def choose(logits: torch.Tensor, sampling: SamplingParams, *, position: int, sample_index: int = 0) -> int:
    state = at(sampling, position, sample_index)
    return int(logits.argmax()) if state.greedy else draw(logits[None], [state])[0]


def at(sampling: SamplingParams, position: int, sample_index: int = 0) -> SampleState:
    state = SampleState(sampling, sample_index=sample_index, prompt_ids=(), stop_ids=frozenset(), grammar=None)
    state.generated = _Long(position)
    return state


class _Long(list[int]):
    """An answer of any length, without its tokens."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def __len__(self) -> int:
        return self._length


def expected(
    logits: torch.Tensor, temperature: float = 1.0, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> np.ndarray:
    """The distribution: temperature, min_p, top_k, top_p, each over what the one before left, renormalised."""
    scaled = logits.numpy().astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    weights[weights < min_p * weights.max()] = 0.0
    order = np.argsort(-weights, kind="stable")
    if top_k:
        weights[order[top_k:]] = 0.0
    weights /= weights.sum()
    kept, total = [], 0.0
    for index in order:
        if weights[index] == 0.0 or total >= top_p:
            break
        kept.append(index)
        total += weights[index]
    result = np.zeros_like(weights)
    result[kept] = weights[kept] / weights[kept].sum()
    return result


def counts(logits: torch.Tensor, sampling: SamplingParams, draws: int) -> np.ndarray:
    drawn = draw(logits.expand(draws, -1), [at(sampling, position) for position in range(draws)])
    return np.bincount(drawn, minlength=len(logits))


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


FILTERS = (
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 6, "top_p": 0.7},
    {"min_p": 0.05, "top_k": 10, "top_p": 0.8, "temperature": 1.5},
)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_follow_the_distribution(logits: torch.Tensor, filters: dict[str, float]) -> None:
    draws = 4000
    probabilities = expected(logits, **filters)  # type: ignore[arg-type] # of the right kind, or wrong on purpose
    seen = counts(logits, params(**filters), draws)
    assert not seen[probabilities == 0].any(), "a token was drawn that the filters had taken out"
    kept = probabilities > 0
    chi_square = float((((seen - draws * probabilities) ** 2)[kept] / (draws * probabilities[kept])).sum())
    degrees = int(kept.sum()) - 1
    # Mean `degrees`, deviation sqrt(2 degrees); draws are fixed by the seed, so this never flickers.
    assert chi_square < degrees + 5 * (2 * max(degrees, 1)) ** 0.5


@settings(max_examples=150)
@given(
    raw=st.lists(st.integers(-80, 80).map(lambda eighths: eighths / 8), min_size=2, max_size=30),
    temperature=st.floats(0.05, 8.0),
    min_p=st.floats(0, 0.9),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1.0),
    position=st.integers(0, 2**32),
)
def test_only_tokens_of_the_distribution_are_drawn(
    raw: list[float], temperature: float, min_p: float, top_k: int, top_p: float, position: int
) -> None:
    logits = torch.tensor(raw, dtype=torch.float32)
    sampling = params(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    token = choose(logits, sampling, position=position)
    probabilities = expected(logits, temperature, min_p, top_k, top_p)
    # A token at the very edge of a filter may fall on either side: float32 here, float64 there.
    loose = expected(logits, temperature, max(0.0, min_p - 1e-4), top_k, min(1.0, top_p + 1e-4))
    tied = bool((np.asarray(raw)[loose > 0] == raw[token]).any())
    assert probabilities[token] > 0 or loose[token] > 0 or tied


def test_greedy_takes_the_largest() -> None:
    logits = torch.tensor([0.0, 3.0, -1.0, 3.0])
    for sampling in (params(temperature=0.0), params(top_k=1, temperature=9.0)):
        assert choose(logits, sampling, position=0) == 1


@pytest.mark.parametrize("filters", [{}, {"min_p": 0.5}, {"top_p": 0.9}, {"top_k": 2, "min_p": 0.1}], ids=str)
@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-9, 2e-5, 1e-3])
def test_a_temperature_near_zero_is_greedy(logits: torch.Tensor, temperature: float, filters: dict[str, float]) -> None:
    sampling = params(temperature=temperature, **filters)
    assert sampling.temperature > 0
    assert {choose(logits, sampling, position=position) for position in range(20)} == {int(logits.argmax())}


def test_a_huge_temperature_is_uniform(logits: torch.Tensor) -> None:
    seen = counts(logits, params(temperature=3e38), 4000)
    assert seen.min() > 50
    assert seen.max() < 160


def test_forbidden_tokens_are_never_drawn(logits: torch.Tensor) -> None:
    forbidden = logits.clone()
    forbidden[: VOCAB - 2] = float("-inf")
    assert {choose(forbidden, params(temperature=5.0), position=p) for p in range(50)} == {VOCAB - 2, VOCAB - 1}


def test_the_smallest_top_p_still_keeps_one(logits: torch.Tensor) -> None:
    assert choose(logits, params(top_p=1e-30), position=9) == int(logits.argmax())


def test_draws_depend_on_seed_sample_and_position_alone(logits: torch.Tensor) -> None:
    sampling = params(seed=2**64 - 1)
    alone = [choose(logits, sampling, position=position) for position in range(30)]
    torch.manual_seed(999)
    shuffled = {position: choose(logits, sampling, position=position) for position in reversed(range(30))}
    assert [shuffled[position] for position in range(30)] == alone
    assert len(set(alone)) > 5
    assert [choose(logits, params(seed=1), position=position) for position in range(30)] != alone
    other = [choose(logits, sampling, position=position, sample_index=1) for position in range(30)]
    assert other != alone


def test_draws_are_uniform_and_fixed_for_ever() -> None:
    # Another release, another machine and a replacement worker must draw the same number (design §6).
    assert uniform(0, 0, 0) == GOLDEN[0]
    assert uniform(2**64 - 1, 3, 7) == GOLDEN[1]
    drawn = np.array([uniform(42, 0, position) for position in range(20_000)])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    histogram = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert float(((histogram - 1000) ** 2 / 1000).sum()) < 19 + 5 * 38**0.5
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03


def test_a_flat_distribution_of_many_tokens_is_cut_exactly() -> None:
    # More tokens stay than the filters look at first; ties go to the lower ids.
    flat = torch.full((1, 3000), 1 / 3000)
    wider = torch.full((1, 9000), 1 / 9000)
    assert filtered(wider, [params(top_k=5000)]).nonzero()[:, 1].tolist() == list(range(5000))
    assert filtered(wider, [params(top_p=0.25)]).count_nonzero() in (2250, 2251)
    assert filtered(flat, [params(top_k=2000)]).nonzero()[:, 1].tolist() == list(range(2000))
    assert filtered(flat, [params(top_p=0.5)]).count_nonzero() in (1500, 1501)
    assert filtered(flat, [params(top_p=0.5, top_k=1000)]).nonzero()[:, 1].tolist() == list(range(500))
    assert filtered(flat, [params(top_p=0.5, min_p=0.5)]).count_nonzero() in (1500, 1501)
    assert filtered(flat, [params()]).count_nonzero() == 3000


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    vocabulary=st.sampled_from([3, 255, 256, 257, 4097, 6000]),
    spread=st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    top_k=st.sampled_from([0, 2, 256, 400]),
    top_p=st.sampled_from([1e-9, 0.5, 0.97, 1.0]),
)
def test_what_stays_is_what_a_full_sort_would_keep(
    seed: int, vocabulary: int, spread: float, min_p: float, top_k: int, top_p: float
) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    sampling = params(min_p=min_p, top_k=top_k, top_p=top_p)
    kept = filtered(logits.softmax(-1)[None], [sampling])[0].count_nonzero()
    least = np.count_nonzero(expected(logits, 1.0, min_p * 1.0001, top_k, max(1e-12, top_p - 1e-5)))
    most = np.count_nonzero(expected(logits, 1.0, min_p * 0.9999, top_k, top_p + 1e-5))
    # Probabilities that float32 rounds to nothing are never drawn and do not count.
    assert min(least, np.count_nonzero(logits.softmax(-1).numpy())) <= kept <= most
