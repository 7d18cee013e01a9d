"""When a call that may be repeated is repeated, and after which wait."""

from __future__ import annotations

import random
from dataclasses import dataclass

from drystone._exceptions import ConnectError, DrystoneError, OverloadedError, UnavailableError


@dataclass(frozen=True, slots=True)
class Retries:
    """Exponential waits that never fall below what the server asked for.

    Args:
        most: Repeats in a row without any progress between them.
        first_seconds: First wait; each further one is twice as long.
        longest_seconds: Where the doubling ends.
    """

    most: int = 7
    first_seconds: float = 0.25
    longest_seconds: float = 30.0

    def wait_seconds(self, error: DrystoneError, failures: int, *, heard: bool) -> float | None:
        """Seconds to wait before a repeat; None when there is to be none.

        Args:
            error: How the call failed.
            failures: Calls that had failed in a row before this one.
            heard: True when the server has answered before: an address where nobody ever was is not tried again.
        """
        if failures >= self.most or not _may_pass(error, heard=heard):
            return None
        wait = min(self.first_seconds * 2.0**failures, self.longest_seconds)
        # Clients that were refused together must not come back together.
        return max(wait, error.retry_after or 0.0) * random.uniform(1.0, 1.25)  # noqa: S311 - not a secret


def _may_pass(error: DrystoneError, *, heard: bool) -> bool:
    if isinstance(error, OverloadedError):
        return error.retry_after is not None
    if isinstance(error, ConnectError):
        return heard or error.reason != "NO_SERVER"
    return isinstance(error, UnavailableError)
