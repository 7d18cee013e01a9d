"""Chooses the next token of every row of a batch, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from decode_worker.sampling.adjustments import adjust
from decode_worker.sampling.draws import draw
from decode_worker.sampling.logprobs import described
from decode_worker.sampling.state import SampleState
from decode_worker.sampling.token_bytes import TokenBytes
from drystone.v1.sampling_pb2 import SamplingParams, TokenLogprob
from shared.errors import DrystoneError, InvalidRequestError, Reason


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, and its log probabilities when they were asked for."""

    token_id: int
    logprob: TokenLogprob | None


class Sampler:
    """Chooses tokens for one model. Keeps nothing between calls but what it knows of the tokenizer.

    Args:
        tokenizer: The model's.
        vocabulary_size: Width of the logits.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size
        self._token_bytes = TokenBytes(tokenizer)

    def check(self, params: SamplingParams) -> None:
        """Refuse token ids that the model does not have, before anything is generated.

        Raises:
            InvalidRequestError: INVALID_SAMPLING, naming the field.
        """
        for field, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token_id in ids:
                if token_id >= self._vocabulary_size:
                    raise InvalidRequestError(
                        Reason.INVALID_SAMPLING,
                        f"sampling.{field}",
                        "names a token that the model does not have",
                        limit=f"< {self._vocabulary_size}",
                        value=token_id,
                    )

    def choose(self, logits: torch.Tensor, states: Sequence[SampleState]) -> list[Choice | DrystoneError]:
        """The next token of each row, or why that row alone has none.

        What a row gets does not depend on the other rows. Rows that are greedy and ask for nothing else cost one
        argmax for all of them.

        Args:
            logits: float32 [len(states), vocabulary]; changed where a row asks for it.
            states: One for each row; not changed.

        Returns:
            One outcome for each row. INTERNAL: the model's logits are not numbers. INVALID_STRUCTURED_OUTPUT or
            INVALID_SAMPLING: what the request asked for leaves no token that may come.
        """
        rows = range(len(states))
        tokens, failed = dict[int, int](), dict[int, DrystoneError]()
        for row, (peak, best) in enumerate(_peaks(logits)):
            if math.isfinite(peak):
                tokens[row] = best
            else:
                failed[row] = _not_numbers()
        spoken = [row for row in rows if row in tokens and states[row].params.HasField("logprobs")]
        raw = logits[spoken].log_softmax(dim=-1) if spoken else None
        adjusted = [row for row in rows if row in tokens and states[row].adjusted]
        if adjusted:
            failed |= adjust(logits, adjusted, [states[row] for row in adjusted])
            for row, (peak, best) in zip(adjusted, _peaks(logits[adjusted]), strict=True):
                tokens[row] = best
                if not math.isfinite(peak):
                    failed.setdefault(row, _nothing_left(states[row]))
        drawn = [row for row in rows if row not in failed and not states[row].greedy]
        if drawn:
            tokens.update(zip(drawn, draw(logits[drawn], [states[row] for row in drawn]), strict=True))
        told = dict[int, TokenLogprob | None]()
        if raw is not None:
            chosen = [tokens[row] for row in spoken]
            told.update(zip(spoken, self._described(raw, [states[row] for row in spoken], chosen), strict=True))
        return [failed[row] if row in failed else Choice(tokens[row], told.get(row)) for row in rows]

    def logprobs_of(
        self, logits: torch.Tensor, states: Sequence[SampleState], token_ids: Sequence[int]
    ) -> list[TokenLogprob | None]:
        """Log probabilities of tokens that are already known, for the rows that ask for them.

        Args:
            logits: float32 [len(states), vocabulary]: the row from which each token was chosen. Not changed.
            states: One for each row.
            token_ids: One for each row.
        """
        spoken = [row for row, state in enumerate(states) if state.params.HasField("logprobs")]
        if not spoken:
            return [None] * len(states)
        raw = logits[spoken].log_softmax(dim=-1)
        found = self._described(raw, [states[row] for row in spoken], [token_ids[row] for row in spoken])
        told = dict(zip(spoken, found, strict=True))
        return [told.get(row) for row in range(len(states))]

    def _described(
        self, raw: torch.Tensor, states: Sequence[SampleState], token_ids: Sequence[int]
    ) -> list[TokenLogprob]:
        return described(raw, token_ids, [state.params.logprobs for state in states], self._token_bytes)


def _peaks(logits: torch.Tensor) -> list[tuple[float, int]]:
    """Largest logit of each row and the lowest id that has it; nan where a row holds one."""
    values, ids = logits.max(dim=-1)
    # One transfer. Every token id is exact in a float64.
    pairs = torch.stack((values.to(torch.float64), ids.to(torch.float64)), dim=1).tolist()
    return [(value, int(best)) for value, best in pairs]


def _not_numbers() -> DrystoneError:
    return DrystoneError(Reason.INTERNAL, "the model's logits are not numbers; no token can be chosen from them")


def _nothing_left(state: SampleState) -> DrystoneError:
    at = f"after {len(state.generated)} tokens"
    if state.position_in_grammar is None:
        return DrystoneError(
            Reason.INVALID_SAMPLING,
            f"sampling.min_new_tokens: leaves no token that may come {at}",
            field="sampling.min_new_tokens",
        )
    return DrystoneError(
        Reason.INVALID_STRUCTURED_OUTPUT,
        f"structured_output: leaves no token that may come {at}",
        field="structured_output",
    )
