"""Events of a stream, in the order in which they come: Started, TextDelta…, SampleFinished…, Completed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drystone._results import BlockStats, FinishReason, Routing, Timings, TokenLogprob, Usage


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted. `prompt_tokens` counts after truncation; `seed` is the one that is used."""

    request_id: str
    model: str
    model_fingerprint: str
    seed: int
    attention: str
    prompt_tokens: int
    truncated_tokens: int
    dropped_documents: tuple[int, ...]
    blocks: tuple[BlockStats, ...]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of one sample. `text` is whole characters; it may be empty while the server holds some back."""

    sample_index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class SampleFinished:
    """One sample ended; `completion_tokens` counts without the token that ended it."""

    sample_index: int
    finish_reason: FinishReason
    matched_stop: str
    matched_stop_token_id: int | None
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Completed:
    """The request ended well. Last event of its stream."""

    usage: Usage
    timings: Timings
    blocks: tuple[BlockStats, ...]
    routing: Routing


Event = Started | TextDelta | SampleFinished | Completed
