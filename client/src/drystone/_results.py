"""What a caller gets: an answer, what it cost, and where its blocks came from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sample ended."""

    UNSPECIFIED = "unspecified"
    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"


class BlockRole(StrEnum):
    """What a block is in its prompt."""

    UNSPECIFIED = "unspecified"
    PREAMBLE = "preamble"
    PASSAGE = "passage"
    QUESTION = "question"
    FULL = "full"


class BlockSource(StrEnum):
    """Where a block's KV came from."""

    UNSPECIFIED = "unspecified"
    RESIDENT = "resident"
    SHARED_FETCH = "shared_fetch"
    PREFILL_RAM = "prefill_ram"
    PREFILL_DISK = "prefill_disk"
    OBJECT_STORE = "object_store"
    ENCODED = "encoded"
    ENCODED_ON_DECODE = "encoded_on_decode"
    PEER = "peer"


@dataclass(frozen=True, slots=True)
class BlockStats:
    """One block of a prompt as it was served.

    `offset` and `tokens` count tokens, `shipped_bytes` bytes of KV that travelled for this request, `encode_ms`
    and `ship_ms` milliseconds. `document_index` is the document's place in the request, None for other blocks.
    """

    key: str
    role: BlockRole
    tokens: int
    offset: int
    source: BlockSource
    shipped_bytes: int = 0
    encode_ms: float = 0.0
    ship_ms: float = 0.0
    document_index: int | None = None
    worker_id: str = ""
    failed_attempts: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Role, size, place and source in one line."""
        return f"BlockStats({self.role} {self.key[:12]}…, {self.tokens} tokens at {self.offset}, {self.source})"


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of one request, in tokens, bytes and blocks."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    encoded_tokens: int = 0
    shipped_bytes: int = 0
    blocks_reused: int = 0
    blocks_encoded: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, each in milliseconds on one process's own clock (statistics.proto says which)."""

    plan_ms: float = 0.0
    queue_ms: float = 0.0
    fetch_ms: float = 0.0
    first_step_ms: float = 0.0
    ttft_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Routing:
    """Who served a request, and what had to be done again."""

    decode_worker_id: str = ""
    decode_failovers: int = 0
    fetch_retries: int = 0


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One alternative token; `token` may be an incomplete UTF-8 sequence."""

    token_id: int
    logprob: float
    token: bytes


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log probabilities at one generated position, before temperature and filters."""

    token_id: int
    logprob: float
    token: bytes
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One of the `n` answers drawn from the same prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    matched_stop: str = ""
    matched_stop_token_id: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer. `text`, `token_ids` and `finish_reason` are the first sample's."""

    samples: tuple[Sample, ...]
    usage: Usage
    timings: Timings
    blocks: tuple[BlockStats, ...]
    routing: Routing
    request_id: str
    model: str
    model_fingerprint: str
    seed: int
    attention: str
    truncated_tokens: int = 0
    dropped_documents: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first sample."""
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first sample ended."""
        return self.samples[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Log probabilities of the first sample; empty unless asked for."""
        return self.samples[0].logprobs

    def __repr__(self) -> str:
        """Beginning of the text and the counts that matter."""
        shown = self.text if len(self.text) <= 60 else f"{self.text[:59]}…"  # noqa: PLR2004 - width of a line
        return (
            f"Answer({shown!r}, {self.finish_reason}, {self.usage.completion_tokens} tokens, "
            f"{self.usage.cached_tokens} of {self.usage.prompt_tokens} prompt tokens cached)"
        )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a model is and what it takes; `context_tokens` bounds prompt and answer together."""

    name: str
    fingerprint: str
    dtype: str
    context_tokens: int
    kv_bytes_per_token: int
    template: str
    aliases: tuple[str, ...] = ()
    sliding_window_layers: int = 0
