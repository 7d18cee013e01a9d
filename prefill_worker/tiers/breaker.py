"""Keeps requests from waiting for a store that does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable

from shared import logs

_log = logs.get("tiers")

FAILURES_IN_A_ROW = 3
FIRST_REST_SECONDS = 1.0
LONGEST_REST_SECONDS = 60.0


class Breaker:
    """Counts failures in a row; after some of them the store rests, twice as long each time.

        closed ── 3 failures ──► resting ── rest is over: one try ──► success ──► closed
                                    ▲                                   │
                                    └──── twice as long ◄── failure ◄───┘

    Logs the first failure of a burst and its end, not each of thousands.

    Args:
        tier: For the log.
        work: "reading" or "writing", for the log.
        clock: Seconds, monotonic.
    """

    def __init__(self, tier: str, work: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._tier = tier
        self._work = work
        self._clock = clock
        self._in_a_row = 0
        self._burst = 0
        self._rest_seconds = FIRST_REST_SECONDS
        self._next_try = 0.0

    @property
    def resting(self) -> bool:
        """It has failed too often in a row and not worked since."""
        return self._in_a_row >= FAILURES_IN_A_ROW

    @property
    def failing(self) -> bool:
        """The last attempt failed."""
        return self._burst > 0

    def allows(self) -> bool:
        """Whether to try now. While it rests that is one try a rest, and asking takes it."""
        if not self.resting:
            return True
        now = self._clock()
        if now < self._next_try:
            return False
        # Whoever asks next waits another rest: a try that never reports back must not let all others through.
        self._next_try = now + self._rest_seconds
        return True

    def succeeded(self) -> None:
        """The store has answered."""
        if self._burst:
            _log.info("tier_works_again", tier=self._tier, work=self._work, failures=self._burst)
        self._in_a_row = self._burst = 0
        self._rest_seconds = FIRST_REST_SECONDS

    def failed(self, error: Exception, *, counts: bool = True) -> None:
        """The store has not; a failure that does not count is logged alone, such as a full disk."""
        self._burst += 1
        if self._burst == 1:
            _log.warning("tier_failed", tier=self._tier, work=self._work, error=str(error))
        if not counts:
            return
        was_resting = self.resting
        self._in_a_row += 1
        if was_resting:
            self._rest_seconds = min(2 * self._rest_seconds, LONGEST_REST_SECONDS)
        elif self.resting:
            _log.warning("tier_rests", tier=self._tier, work=self._work, error=str(error))
        self._next_try = self._clock() + self._rest_seconds
