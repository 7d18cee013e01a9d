"""A tokenizer with a small vocabulary, and samples made in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer

from decode_worker.sampling import Grammars, Sampler, SampleState
from drystone.v1.sampling_pb2 import SamplingParams
from tests.conftest import MakeFolder

# More columns than the tokenizer has tokens, as models have that round their vocabulary up.
WIDTH = 410
END_IDS = frozenset({0, 2})

MakeState = Callable[..., SampleState]


@pytest.fixture(scope="package", autouse=True)
def alone(one_thread: None) -> None:
    """Every test here works on tiny tensors."""


@pytest.fixture(scope="session")
def tokenizer(tiny_folder: MakeFolder) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_folder() / "tokenizer.json"))


@pytest.fixture(scope="session")
def sampler(tokenizer: Tokenizer) -> Sampler:
    return Sampler(tokenizer, WIDTH)


@pytest.fixture(scope="session")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, WIDTH, END_IDS)


def params(**values: Any) -> SamplingParams:
    """Sampling as the gateway fills it in."""
    filled = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "min_new_tokens": 0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_new_tokens": 100,
        "seed": 5,
    }
    return SamplingParams(**{**filled, **values})


def state(
    *, sample_index: int = 0, prompt: Any = (), stops: Any = END_IDS, grammar: Any = None, past: Any = (), **values: Any
) -> SampleState:
    """A sample that has come as far as `past`."""
    made = SampleState(
        params(**values), sample_index=sample_index, prompt_ids=prompt, stop_ids=frozenset(stops), grammar=grammar
    )
    for token_id in past:
        made.accept(token_id)
    return made
