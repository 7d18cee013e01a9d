"""A compiled grammar, and one sample's place in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from shared.errors import DrystoneError, Reason

Bits = npt.NDArray[np.uint8]
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Grammar:
    """A shape that answers must have, compiled for one tokenizer. Shared by samples, never changed.

    Attributes:
        matcher: At the start; only copied.
        end_ids: Tokens that end an answer. A position allows them exactly where the answer may end.
        end_bits: The same as a bitmap, least significant bit first.
    """

    matcher: LLMatcher
    end_ids: frozenset[int]
    end_bits: Bits

    def begin(self) -> GrammarPosition:
        """The start of a new answer."""
        return GrammarPosition(self.matcher.deep_copy(), self.end_bits)


class GrammarPosition:
    """How far one sample has come in its grammar. Owned by that sample.

    Args:
        matcher: This position's own.
        end_bits: Bitmap of the tokens that end an answer.
    """

    def __init__(self, matcher: LLMatcher, end_bits: Bits) -> None:
        self._matcher = matcher
        self._end_bits = end_bits
        # Bitmap of this place, worked out once; None until it is asked for.
        self._allowed: Bits | None = None

    def allowed(self) -> Bits:
        """Tokens that may come next, as a bitmap uint8 [ceil(vocabulary / 8)], least significant bit first.

        Raises:
            DrystoneError: INVALID_STRUCTURED_OUTPUT when working it out goes beyond the grammar's bounds.
        """
        if self._allowed is None:
            # The library may round its bitmap up further than ours.
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[: len(self._end_bits)]
            if self._matcher.is_error():
                raise too_complex(self._matcher)
            self._allowed = bits
        return self._allowed

    def accept(self, token_id: int) -> None:
        """Goes on by one token.

        Raises:
            DrystoneError: INTERNAL when the token is not allowed here; INVALID_STRUCTURED_OUTPUT when following
                it goes beyond the grammar's bounds.
        """
        if not self._allows(token_id):
            raise DrystoneError(Reason.INTERNAL, f"the structured output does not allow token {token_id} here")
        self._allowed = None
        if not self._matcher.consume_token(token_id):
            raise too_complex(self._matcher)

    def _allows(self, token_id: int) -> bool:
        byte, bit = divmod(token_id, 8)
        if not 0 <= byte < len(self._end_bits):
            return False  # an id out of its range would spoil the matcher
        if self._allowed is None:
            return self._matcher.validate_tokens([token_id]) == 1
        return bool(self._allowed[byte] >> bit & 1)

    @property
    def complete(self) -> bool:
        """True when nothing but an end may follow.

        False where that can no longer be found out; choosing a token then says why.
        """
        if self._matcher.is_stopped():
            return not self._matcher.is_error()
        try:
            allowed = self.allowed()
        except DrystoneError:
            return False
        return bool((allowed & self._end_bits).any()) and not (allowed & ~self._end_bits).any()


def too_complex(matcher: LLMatcher) -> DrystoneError:
    """Why a matcher that is in an error can do no more."""
    said = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())[:_SHOWN]
    return DrystoneError(
        Reason.INVALID_STRUCTURED_OUTPUT,
        f"structured_output: it cannot be followed further: {said}",
        field="structured_output",
    )
