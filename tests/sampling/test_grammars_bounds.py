"""Compiled grammars: kept, bounded in time and number, safe on threads, whatever the library does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from tokenizers import Tokenizer

from decode_worker.sampling import Grammar, Grammars, Sampler
from decode_worker.sampling import grammars as module
from drystone.v1.sampling_pb2 import StructuredOutput
from shared.errors import DrystoneError, Reason
from tests.sampling.conftest import END_IDS, WIDTH, state
from tests.sampling.test_grammars import PERSON, allowed, answer, choice, schema


def test_compiled_grammars_are_kept_and_the_oldest_leave(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, WIDTH, END_IDS)
    first = grammars.compile(choice("0"))
    for number in range(1, 64):
        grammars.compile(choice(str(number)))
        assert grammars.compile(choice("0")) is first
    second = grammars.compile(choice("1"))
    for number in range(64, 66):
        grammars.compile(choice(str(number)))
    assert grammars.compile(choice("1")) is second
    assert grammars.compile(choice("2")) is not None
    assert len(grammars._cache) == 64


def test_threads_may_compile_at_once(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, WIDTH, END_IDS)
    results: list[Any] = []

    def compile_one(number: int) -> None:
        try:
            results.append(grammars.compile(choice(str(number % 3))))
        except DrystoneError as error:
            results.append(error)

    threads = [threading.Thread(target=compile_one, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16
    for result in results:
        assert isinstance(result, Grammar) or result.reason == Reason.TOO_MANY_REQUESTS
    assert any(isinstance(result, Grammar) for result in results)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Compiling does not end until the event is set."""
    go_on, inner = threading.Event(), module._matcher

    def slow(vocabulary: Any, structured: StructuredOutput) -> Any:
        go_on.wait(60)
        return inner(vocabulary, structured)

    monkeypatch.setattr(module, "_matcher", slow)
    monkeypatch.setattr(module, "_MAX_SECONDS", 0.01)
    yield go_on
    go_on.set()


def test_compiling_that_takes_too_long_is_given_up_and_bounded(tokenizer: Tokenizer, held: threading.Event) -> None:
    grammars = Grammars(tokenizer, WIDTH, END_IDS)
    before = set(threading.enumerate())
    for number in range(4):
        with pytest.raises(DrystoneError, match="too long to compile") as caught:
            grammars.compile(choice(str(number)))
        assert caught.value.reason == Reason.INVALID_STRUCTURED_OUTPUT
    with pytest.raises(DrystoneError) as full:
        grammars.compile(choice("5"))
    assert full.value.reason == Reason.TOO_MANY_REQUESTS
    assert full.value.retry_after_ms
    held.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    with contextlib.suppress(DrystoneError):  # there is room again, whether or not 10 ms are enough
        grammars.compile(choice("6"))


class _PanicError(BaseException):
    """As the library's panics come."""


@pytest.mark.parametrize("error", [_PanicError("index out of bounds"), ValueError("odd"), MemoryError()], ids=repr)
def test_whatever_the_library_raises_is_a_reason(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(module, "_matcher", mock.Mock(side_effect=error))
    grammars = Grammars(tokenizer, WIDTH, END_IDS)
    for _ in range(6):
        with pytest.raises(DrystoneError) as caught:
            grammars.compile(choice("yes"))
        assert caught.value.reason == Reason.INVALID_STRUCTURED_OUTPUT


def test_samples_of_one_grammar_do_not_touch_one_another(
    sampler: Sampler, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    grammar = grammars.compile(schema(PERSON))
    alone = [answer(sampler, tokenizer, state(grammar=grammar, sample_index=index), noise=index) for index in range(3)]
    first, second = state(grammar=grammar), state(grammar=grammar)
    for token_id in tokenizer.encode('{"name"', add_special_tokens=False).ids:
        first.accept(token_id)
    assert allowed(second) != allowed(first)
    again = [answer(sampler, tokenizer, state(grammar=grammar, sample_index=index), noise=index) for index in range(3)]
    assert alone == again
