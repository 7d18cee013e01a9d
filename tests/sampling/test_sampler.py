"""One pass over a batch: each row as if it were alone, and one row's trouble its own."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from decode_worker.sampling import Choice, Grammars, Sampler, SampleState
from drystone.v1.sampling_pb2 import StructuredOutput
from shared.errors import DrystoneError, InvalidRequestError, Reason
from tests.sampling.conftest import END_IDS, WIDTH, params, state

SHAPES = (None, "regex", "schema")


def tokens(outcomes: list[Choice | DrystoneError]) -> list[int]:
    return [outcome.token_id for outcome in outcomes if isinstance(outcome, Choice)]


def one(sampler: Sampler, logits: torch.Tensor, sample: SampleState) -> int:
    outcome = sampler.choose(logits[None].clone(), [sample])[0]
    assert isinstance(outcome, Choice), outcome
    return outcome.token_id


def shown(outcome: Choice | DrystoneError) -> tuple[Any, ...]:
    if isinstance(outcome, DrystoneError):
        return (outcome.reason, outcome.message)
    return outcome.token_id, None if outcome.logprob is None else outcome.logprob.SerializeToString(deterministic=True)


_ids = st.integers(0, WIDTH - 1)
_rows = st.fixed_dictionaries(
    {
        "sample_index": st.integers(0, 3),
        "temperature": st.sampled_from([0.0, 1e-4, 0.7, 3.0]),
        "top_k": st.sampled_from([0, 0, 1, 3, 300]),
        "top_p": st.sampled_from([1.0, 1.0, 0.5, 0.95]),
        "min_p": st.sampled_from([0.0, 0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.4, -2.0]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "logit_bias": st.dictionaries(_ids, st.floats(-100, 100, width=32), max_size=3),
        "min_new_tokens": st.sampled_from([0, 50]),
        "seed": st.integers(0, 2**64 - 1),
        "prompt": st.lists(_ids, max_size=8),
        "shape": st.sampled_from(SHAPES),
        "past": st.lists(st.integers(3, 300), max_size=8),
    },
    optional={"logprobs": st.integers(0, 20), "ignore_eos": st.just(value=True)},
)


@settings(max_examples=120)
@given(
    rows=st.lists(_rows, min_size=2, max_size=6),
    noise=st.integers(0, 2**32),
    coarse=st.booleans(),
    poisoned=st.none() | st.integers(0, 5),
)
def test_a_row_in_a_batch_is_the_row_alone(
    sampler: Sampler, grammars: Grammars, rows: list[dict[str, Any]], noise: int, poisoned: int | None, *, coarse: bool
) -> None:
    shapes = {
        "regex": StructuredOutput(regex="[a-z ]{3,9}"),
        "schema": StructuredOutput(json_schema='{"type": "object"}'),
    }
    logits = torch.randn((len(rows), WIDTH), generator=torch.Generator().manual_seed(noise)) * 4
    if coarse:
        logits = logits.round()  # many ties
    if poisoned is not None and poisoned < len(rows):
        logits[poisoned, 7] = math.nan

    def made(row: dict[str, Any]) -> SampleState:
        values = dict(row)
        shape = values.pop("shape")
        if shape is None:
            return state(**values)
        return state(**{**values, "past": ()}, grammar=grammars.compile(shapes[shape]))

    together = sampler.choose(logits.clone(), [made(row) for row in rows])
    for index, row in enumerate(rows):
        assert shown(sampler.choose(logits[index : index + 1].clone(), [made(row)])[0]) == shown(together[index])


@pytest.mark.parametrize("values", [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.01}, {"logprobs": 5}], ids=str)
def test_a_wide_row_in_a_batch_is_the_row_alone(sampler: Sampler, values: dict[str, float]) -> None:
    # Wide enough for vectorised and divided work.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        logits = torch.randn((5, 50_257), generator=torch.Generator().manual_seed(1)) * 3
        samples = [state(sample_index=index, **values) for index in range(5)]
        together = sampler.choose(logits.clone(), samples)
        alone = [sampler.choose(logits[row : row + 1].clone(), [samples[row]])[0] for row in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert [shown(outcome) for outcome in alone] == [shown(outcome) for outcome in together]


def test_greedy_rows_take_the_largest_and_leave_the_logits_alone(sampler: Sampler) -> None:
    logits = torch.randn((4, WIDTH))
    before = logits.clone()
    samples = [state(temperature=0.0), state(temperature=9.0, top_k=1), state(temperature=1e-6), state(temperature=0.0)]
    assert tokens(sampler.choose(logits, samples)) == before.argmax(-1).tolist()
    assert torch.equal(logits, before)
    tied = torch.zeros((1, WIDTH))
    assert tokens(sampler.choose(tied, [state(temperature=0.0)])) == [0]


def test_greedy_rows_cost_one_operation_for_all(sampler: Sampler) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Wide(TorchDispatchMode):
        """Names the operations that read whole rows."""

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(isinstance(arg, torch.Tensor) and arg.shape[-1:] == (WIDTH,) for arg in args):
                self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Wide() as wide:
        sampler.choose(torch.randn((8, WIDTH)), [state(temperature=0.0) for _ in range(8)])
    assert wide.seen == ["aten.max.dim"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_fail_their_row_alone(sampler: Sampler, bad: float) -> None:
    logits = torch.randn((3, WIDTH))
    logits[1, 5] = bad
    first, second, third = sampler.choose(
        logits, [state(), state(logprobs=2, repetition_penalty=1.5, logit_bias={5: 1.0}), state(temperature=0.0)]
    )
    assert isinstance(first, Choice)
    assert isinstance(third, Choice)
    assert isinstance(second, DrystoneError)
    assert second.reason == Reason.INTERNAL


def test_a_row_in_which_nothing_is_possible_fails_alone(sampler: Sampler) -> None:
    logits = torch.full((2, WIDTH), -torch.inf)
    logits[1, 3] = 0.0
    lost, fine = sampler.choose(logits, [state(), state()])
    assert isinstance(lost, DrystoneError)
    assert isinstance(fine, Choice)
    assert fine.token_id == 3


def test_ends_are_held_back_until_there_are_enough_tokens(sampler: Sampler) -> None:
    logits = torch.zeros(WIDTH)
    logits[2], logits[7] = 9.0, 5.0
    early = state(temperature=0.0, min_new_tokens=2, past=[7])
    assert one(sampler, logits, early) == 7
    early.accept(7)
    assert one(sampler, logits, early) == 2
    # A stop token beyond the vocabulary harms nobody.
    assert one(sampler, logits, state(temperature=0.0, min_new_tokens=2, stops={2, 10**6})) == 7


def test_ends_alone_and_too_early_is_a_reason(sampler: Sampler) -> None:
    logits = torch.full((1, WIDTH), -torch.inf)
    logits[0, 2] = 1.0
    (outcome,) = sampler.choose(logits, [state(min_new_tokens=5)])
    assert isinstance(outcome, DrystoneError)
    assert outcome.reason == Reason.INVALID_SAMPLING


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
def test_tokens_that_the_model_does_not_have_are_refused(sampler: Sampler, field: str) -> None:
    value: Any = {WIDTH: 1.0} if field == "logit_bias" else [WIDTH]
    with pytest.raises(InvalidRequestError, match=field):
        sampler.check(params(**{field: value}))
    sampler.check(params(logit_bias={WIDTH - 1: 1.0}, stop_token_ids=[WIDTH - 1]))


def test_a_fork_begins_anew(sampler: Sampler, grammars: Grammars) -> None:
    grammar = grammars.compile(StructuredOutput(regex="[ab]{4}"))
    logits = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2))
    first = state(grammar=grammar, repetition_penalty=2.0, prompt=[1, 2, 3], logit_bias={70: 2.0})
    first.accept(one(sampler, logits, first))
    fork = first.fork(4)
    fresh = state(sample_index=4, grammar=grammar, repetition_penalty=2.0, prompt=[1, 2, 3], logit_bias={70: 2.0})
    assert fork.generated == []
    assert fork.sample_index == 4
    for _ in range(4):
        token = one(sampler, logits, fork)
        assert token == one(sampler, logits, fresh)
        fork.accept(token)
        fresh.accept(token)
        if fork.complete:
            break
    assert fork.complete
    assert len(first.generated) == 1
    assert END_IDS.isdisjoint(fork.generated)
