"""What is measured of a stream of tokens, and the figures of one stream and of several at once.

    sent      first token                                 last token
     │ ─ TTFT ─ │ gap │ gap │ …                              │
     └────────────────── whole: tokens / this ───────────────┘

Several at once: `whole_rate` counts from the first request sent to the last token of all; `decode_rate` counts only
while all of them decode, from the last first token to the first last token.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """One event of a stream that brought tokens.

    Args:
        at: When it came, in seconds of the client's monotonic clock.
        tokens: Tokens so far, this event's with them.
    """

    at: float
    tokens: int


@dataclass(frozen=True, slots=True)
class TokenStream:
    """One request as the client saw it.

    Args:
        sent: When it was sent, in seconds of the client's monotonic clock.
        arrivals: Its events, in order; not empty.
        prompt_tokens: Tokens of the prompt as the server counted them.
        cached_tokens: Those whose KV the server had; None where it does not say.
    """

    sent: float
    arrivals: tuple[Arrival, ...]
    prompt_tokens: int
    cached_tokens: int | None = None

    @property
    def ttft(self) -> float:
        """Seconds from the request to its first token."""
        return self.arrivals[0].at - self.sent

    @property
    def ended(self) -> float:
        """When its last token came."""
        return self.arrivals[-1].at

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self.arrivals[-1].tokens

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens; an event with several tokens shares its gap among them."""
        gaps: list[float] = []
        for before, after in zip(self.arrivals, self.arrivals[1:], strict=False):
            brought = after.tokens - before.tokens
            gaps += [(after.at - before.at) / brought] * brought
        return gaps

    def tokens_at(self, moment: float) -> int:
        """Tokens that had come by a moment."""
        return max((arrival.tokens for arrival in self.arrivals if arrival.at <= moment), default=0)


def whole_rate(streams: Sequence[TokenStream]) -> float:
    """Tokens a second of several streams, prefill included."""
    began = min(stream.sent for stream in streams)
    ended = max(stream.ended for stream in streams)
    return sum(stream.tokens for stream in streams) / (ended - began)


def decode_rate(streams: Sequence[TokenStream]) -> float | None:
    """Tokens a second while all streams decode; None when one ended before another began."""
    began = max(stream.arrivals[0].at for stream in streams)
    ended = min(stream.ended for stream in streams)
    if ended <= began:
        return None
    return sum(stream.tokens_at(ended) - stream.tokens_at(began) for stream in streams) / (ended - began)


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing: median and the middle half. `values` is not empty."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, interpolated between measurements; both the value where there is one."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third
