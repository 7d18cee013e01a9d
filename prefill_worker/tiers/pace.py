"""Whether reading a block back beats encoding it again, as measured."""

from __future__ import annotations

import time
from collections.abc import Callable

# Weight of what was known before, at each read.
_FADE = 0.9
# Reads before they are believed: the first ones open connections and fetch credentials.
_READS_TO_BELIEVE = 4
# Below this share of the mean size's square the sizes are as good as equal, and no line goes through them.
_LEAST_SPREAD = 1e-4


class Pace:
    """Seconds of a read as latency + bytes / rate, fitted to reads whose weight fades.

    Until both sides are measured reading is taken to pay. A tier that does not pay is off, but for one read every
    so often, by which it can come back.

    Args:
        token_bytes: Bytes of KV of one token.
        encode_seconds: Time to encode so many tokens; None while that is not known.
        retry_seconds: Time between reads while it is off.
        clock: Seconds, monotonic.

    Attributes:
        off: The last answer was that reading does not pay.
    """

    def __init__(
        self,
        token_bytes: int,
        encode_seconds: Callable[[int], float | None],
        *,
        retry_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.off = False
        self._token_bytes = token_bytes
        self._encode_seconds = encode_seconds
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._next_try: float | None = None
        self._reads = 0
        # Fading sums of 1, bytes, seconds, bytes², bytes·seconds.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)

    def measured(self, size: int, seconds: float) -> None:
        """A read of `size` bytes has taken so long."""
        self._reads += 1
        new = (1.0, float(size), seconds, float(size) * size, size * seconds)
        self._sums = (
            _FADE * self._sums[0] + new[0],
            _FADE * self._sums[1] + new[1],
            _FADE * self._sums[2] + new[2],
            _FADE * self._sums[3] + new[3],
            _FADE * self._sums[4] + new[4],
        )

    def read_seconds(self, size: int) -> float | None:
        """Time that a read of `size` bytes should take; None while that is not known."""
        if self._reads < _READS_TO_BELIEVE:
            return None
        weight, sizes, seconds, squares, products = self._sums
        size_mean, mean = sizes / weight, seconds / weight
        spread = squares / weight - size_mean * size_mean
        if spread <= _LEAST_SPREAD * size_mean * size_mean:
            # All of one size: half of the time is taken for latency, which is wrong by a factor of two at most for
            # blocks up to that size.
            slope = mean / (2 * size_mean) if size_mean else 0.0
        else:
            slope = (products / weight - size_mean * mean) / spread
        slope = min(max(slope, 0.0), mean / size_mean if size_mean else 0.0)  # neither part is below zero
        return mean - slope * size_mean + slope * size

    def pays(self, tokens: int) -> bool:
        """Whether to read a block of so many tokens now. While it is off, asking takes the one try."""
        reading, encoding = self.read_seconds(tokens * self._token_bytes), self._encode_seconds(tokens)
        self.off = reading is not None and encoding is not None and reading >= encoding
        if not self.off:
            return True
        now = self._clock()
        may_try = self._next_try is not None and now >= self._next_try
        if may_try or self._next_try is None:
            self._next_try = now + self._retry_seconds
        return may_try
