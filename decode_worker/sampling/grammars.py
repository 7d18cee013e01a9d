"""Compiles constraints for one tokenizer, within bounds, and keeps those used last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from decode_worker.sampling.grammar import Bits, Grammar, too_complex
from decode_worker.sampling.grammar_text import grammar_text, unusable
from drystone.v1.sampling_pb2 import StructuredOutput
from shared.errors import DrystoneError, Reason

# Work and memory of one grammar. A lexer state is 1 to 2 kB; 14 000 units of step fuel are about a millisecond.
_LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=300_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# The library recurses over chains of rules: the longest that 128 KiB can hold overflow 8 MiB and not 64. Address space,
# not memory: only what is used becomes resident.
_STACK_BYTES = 256 * 1024 * 1024
_MAX_CACHED = 64
_MAX_SECONDS = 5.0
_MAX_COMPILING = 4
_SHOWN = 500
_WORD_BITS = 32

_Key = tuple[str, bytes]


class Grammars:
    """Makes grammars for one tokenizer. Thread-safe; `compile` blocks and belongs off the event loop.

    Compiled grammars are kept, 64 of them, the one used longest ago leaving first. Compiling runs on a thread
    of its own whose stack is deep enough for the longest constraint, and is waited for 5 seconds; at most 4
    run at a time, those given up included.

    Args:
        tokenizer: The model's.
        vocabulary_size: Width of the logits; may be more or less than the tokenizer has tokens.
        eos_token_ids: Tokens that end an answer. Without any, nothing can be constrained.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        known = tokenizer.get_vocab_size(with_added_tokens=True)
        # Whole words of a bitmap: every bit of it is then a token id that the library takes.
        self._tokens = -(-max(vocabulary_size, known) // _WORD_BITS) * _WORD_BITS
        self._end_ids = frozenset(token for token in eos_token_ids if 0 <= token < known)
        self._lock = threading.Lock()
        self._cache: OrderedDict[_Key, Grammar] = OrderedDict()
        self._compiling = threading.BoundedSemaphore(_MAX_COMPILING)
        self._vocabulary_lock = threading.Lock()
        self._vocabulary: tuple[Any, Bits] | None = None

    def compile(self, structured: StructuredOutput) -> Grammar:
        """The constraint, compiled or from the cache.

        Raises:
            DrystoneError: INVALID_STRUCTURED_OUTPUT with what is wrong; TOO_MANY_REQUESTS when too many are being
                compiled; NOT_SUPPORTED when answers of this tokenizer cannot be constrained.
        """
        kind = structured.WhichOneof("constraint") or ""
        key = (kind, structured.SerializeToString(deterministic=True))
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        grammar = self._compile(kind, structured)
        with self._lock:
            self._cache[key] = grammar
            self._cache.move_to_end(key)
            if len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)
        return grammar

    def _compile(self, kind: str, structured: StructuredOutput) -> Grammar:
        vocabulary, end_bits = self._for_this_tokenizer()
        if not self._compiling.acquire(blocking=False):
            raise DrystoneError(
                Reason.TOO_MANY_REQUESTS,
                f"{_MAX_COMPILING} structured outputs are being compiled",
                retry_after_ms=1000,
            )
        compiled = Future[LLMatcher]()
        try:
            _start_deep(lambda: self._run(compiled, vocabulary, structured))
        except BaseException:
            self._compiling.release()
            raise
        try:
            matcher = compiled.result(_MAX_SECONDS)
        except TimeoutError:
            raise unusable(
                f"structured_output.{kind}", "takes too long to compile, in seconds", limit=_MAX_SECONDS
            ) from None
        return Grammar(matcher, self._end_ids, end_bits)

    def _run(self, compiled: Future[LLMatcher], vocabulary: Any, structured: StructuredOutput) -> None:
        # On the deep thread. Whatever happens, the caller is told and the place is free again.
        try:
            compiled.set_result(_matcher(vocabulary, structured))
        except DrystoneError as error:
            compiled.set_exception(error)
        except BaseException as error:  # noqa: BLE001 # the library's panics are no Exceptions; none may be lost
            kind = structured.WhichOneof("constraint")
            compiled.set_exception(unusable(f"structured_output.{kind}", f"cannot be used: {str(error)[:_SHOWN]}"))
        finally:
            self._compiling.release()

    def _for_this_tokenizer(self) -> tuple[Any, Bits]:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = self._read_tokenizer()
            return self._vocabulary

    def _read_tokenizer(self) -> tuple[Any, Bits]:
        if not self._end_ids:
            raise _not_possible("it has no token that ends an answer")
        plain = Tokenizer.from_str(self._tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        ends = sorted(self._end_ids)
        try:
            vocabulary = LLTokenizer(plain.to_str(), n_vocab=self._tokens, eos_token=ends)
        except ValueError as error:
            raise _not_possible(str(error)) from error
        flags = np.zeros(self._tokens, dtype=np.uint8)
        flags[ends] = 1
        return vocabulary, np.packbits(flags, bitorder="little")


def _not_possible(why: str) -> DrystoneError:
    return DrystoneError(
        Reason.NOT_SUPPORTED,
        f"structured_output: answers of this model's tokenizer cannot be constrained: {why}",
        field="structured_output",
    )


def _matcher(vocabulary: Any, structured: StructuredOutput) -> LLMatcher:
    kind = structured.WhichOneof("constraint")
    matcher = LLMatcher(vocabulary, grammar_text(structured), log_level=0, limits=_LIMITS)
    if matcher.is_error():
        said = " ".join(matcher.get_error().split())[:_SHOWN]
        raise unusable(f"structured_output.{kind}", f"cannot be used: {said}")
    # Also shows, before anything is generated, whether the first step is within bounds.
    matcher.compute_bitmask()
    if matcher.is_error():
        raise too_complex(matcher)
    return matcher


def _start_deep(run: Any) -> None:
    # The stack's size is a setting of the process, for threads started after it.
    with _STACK_SIZE:
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=run, name="compile-grammar", daemon=True).start()
        finally:
            threading.stack_size(before)


_STACK_SIZE = threading.Lock()
