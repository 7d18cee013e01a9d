"""How fast the model encodes, as measured lately."""

from __future__ import annotations

# Weight of all that came before, against one forward more: about the last twenty count.
_DECAY = 0.95


class EncodeRate:
    """Seconds per token, a moving average in which each forward weighs as much as it has tokens.

    Weighing by tokens keeps a forward over a few tokens, which is all overhead, from looking like the rule.
    """

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0

    def record(self, tokens: int, seconds: float) -> None:
        """One forward over `tokens` tokens took `seconds`."""
        self._tokens = self._tokens * _DECAY + tokens
        self._seconds = self._seconds * _DECAY + seconds

    def seconds(self, tokens: int) -> float | None:
        """Time to encode `tokens` tokens; None before anything was measured."""
        return tokens * self._seconds / self._tokens if self._tokens else None
