"""Everything that choosing one sample's next token depends on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from decode_worker.sampling.grammar import Grammar, GrammarPosition
from decode_worker.sampling.tally import Tally
from drystone.v1.sampling_pb2 import SamplingParams

# Below this temperature logits divided by it leave float32, and the largest takes everything anyway.
GREEDY_BELOW = 1e-5


class SampleState:
    """One sample's past and what it was asked for. Owned by that sample; not shared, not thread-safe.

    Args:
        params: Every default filled in.
        sample_index: Index of the sample, from 0: with seed and position it fixes every draw.
        prompt_ids: The whole prompt; the repetition penalty counts it as seen.
        stop_ids: Tokens that end the answer. Before min_new_tokens they cannot be chosen.
        grammar: Shape that the answer must have. None: any.
    """

    __slots__ = (
        "_bias_ids",
        "_bias_values",
        "_grammar",
        "_prompt_distinct",
        "_tally",
        "generated",
        "params",
        "position_in_grammar",
        "sample_index",
        "stop_ids",
    )

    def __init__(
        self,
        params: SamplingParams,
        *,
        sample_index: int,
        prompt_ids: Sequence[int],
        stop_ids: frozenset[int],
        grammar: Grammar | None,
    ) -> None:
        self.params = params
        self.sample_index = sample_index
        self.stop_ids = stop_ids
        self._bias_ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64)
        self._bias_values = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        seen = prompt_ids if self.repeats else ()
        self._prompt_distinct = np.unique(np.fromiter(seen, dtype=np.int64))
        self._begin(grammar)

    def _begin(self, grammar: Grammar | None) -> None:
        self.generated: list[int] = []
        self._tally = Tally()
        self._grammar = grammar
        self.position_in_grammar: GrammarPosition | None = None if grammar is None else grammar.begin()

    def fork(self, sample_index: int) -> SampleState:
        """Another sample of the same request, with nothing generated. What never changes is shared."""
        other = object.__new__(SampleState)
        other.params, other.stop_ids, other.sample_index = self.params, self.stop_ids, sample_index
        other._bias_ids, other._bias_values = self._bias_ids, self._bias_values
        other._prompt_distinct = self._prompt_distinct
        other._begin(self._grammar)
        return other

    def accept(self, token_id: int) -> None:
        """Goes on by one token of the answer.

        Raises:
            DrystoneError: INTERNAL when the grammar does not allow the token; INVALID_STRUCTURED_OUTPUT when
                following it goes beyond the grammar's bounds. Nothing has been accepted then.
        """
        if self.position_in_grammar is not None:
            self.position_in_grammar.accept(token_id)
        if self.repeats or self.counts:
            self._tally.add(token_id)
        self.generated.append(token_id)

    @property
    def complete(self) -> bool:
        """True when the grammar allows nothing more but an end, whatever ignore_eos and min_new_tokens say."""
        return self.position_in_grammar is not None and self.position_in_grammar.complete

    @property
    def greedy(self) -> bool:
        """True when no draw is made."""
        return self.params.temperature < GREEDY_BELOW or self.params.top_k == 1

    @property
    def repeats(self) -> bool:
        """True when the repetition penalty changes something."""
        return self.params.HasField("repetition_penalty") and self.params.repetition_penalty != 1

    @property
    def counts(self) -> bool:
        """True when the frequency or the presence penalty changes something."""
        return self.params.frequency_penalty != 0 or self.params.presence_penalty != 0

    @property
    def seen(self) -> npt.NDArray[np.int64]:
        """Tokens of prompt and answer, int64; one that is in both comes twice."""
        return np.concatenate((self._prompt_distinct, self._tally.ids))

    @property
    def tally(self) -> Tally:
        """The answer's tokens; empty when no penalty asks for them."""
        return self._tally

    @property
    def bias(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Tokens int64 and what is added to their logits, float32."""
        return self._bias_ids, self._bias_values

    @property
    def held_back(self) -> frozenset[int]:
        """Tokens that would end the answer and must not yet."""
        early = self.stop_ids if len(self.generated) < self.params.min_new_tokens else frozenset[int]()
        if self._grammar is not None and self.params.ignore_eos:
            return early | self._grammar.end_ids
        return early

    @property
    def adjusted(self) -> bool:
        """True when logits are changed before a choice; else they are used as they come."""
        return bool(self._grammar is not None or len(self._bias_ids) or self.repeats or self.counts or self.held_back)
