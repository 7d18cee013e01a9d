"""What a caller gives: documents, blocks, messages, and the options of one request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

AttentionName = Literal["block", "full"]
TruncationName = Literal["refuse", "left", "right"]
PriorityName = Literal["low", "normal", "high"]


@dataclass(frozen=True, slots=True)
class Document:
    """One passage: its text, or the key of a block that the server already has.

    Args:
        title: Title shown to the model. May be empty; must be with `key`.
        text: The passage, as text or as UTF-8 bytes.
        key: 64 hexadecimal digits of a block key that the server returned earlier.

    Raises:
        ValueError: When both `text` and `key` are given.
    """

    title: str = ""
    text: str | bytes = ""
    key: str = ""

    def __post_init__(self) -> None:
        """Refuses what the wire could not carry."""
        _refuse_both("Document", self.text, self.key)

    def __repr__(self) -> str:
        """Title and size, or key."""
        return _repr("Document", self.text, self.key, self.title)


@dataclass(frozen=True, slots=True)
class Block:
    """One exact block of a prompt: its text, or the key of a block that the server already has.

    Args:
        text: Exact text, as text or as UTF-8 bytes; no special tokens are added.
        key: 64 hexadecimal digits of a block key that the server returned earlier.

    Raises:
        ValueError: When both are given.
    """

    text: str | bytes = ""
    key: str = ""

    def __post_init__(self) -> None:
        """Refuses what the wire could not carry."""
        _refuse_both("Block", self.text, self.key)

    def __repr__(self) -> str:
        """Size or key."""
        return _repr("Block", self.text, self.key)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is "system", "user", "assistant" or what the model's template knows."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Truncation:
    """What to do with a prompt that is too long.

    Args:
        side: "refuse" answers with an error, "left" and "right" drop passages (block) or tokens (full).
        max_prompt_tokens: Longest prompt in tokens. None: the model's context less max_new_tokens.
    """

    side: TruncationName = "refuse"
    max_prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Template:
    """How text becomes a prompt. None everywhere means the model's own default.

    Args:
        name: "chat", "tulu", "card" or "plain".
        chat_template_kwargs: Keywords for the model's chat template; JSON values.
        enable_thinking: Thinking switch, for templates that have one.
        block_attention_prefix: Prepend "[Block-Attention]" to the first block.
        add_bos: Prepend the tokenizer's BOS token to the first block.
    """

    name: str | None = None
    chat_template_kwargs: Mapping[str, object] | None = None
    enable_thinking: bool | None = None
    block_attention_prefix: bool | None = None
    add_bos: bool | None = None


class GenerateOptions(TypedDict, total=False):
    """Keywords of `generate` and `stream`. An absent one takes the server's default.

    The prompt is one of: `question` with `documents` (and `instructions`), `blocks`, or `messages`
    (with or without `documents`).
    """

    documents: Sequence[Document | str]
    instructions: str | None
    blocks: Sequence[Block | str] | None
    messages: Sequence[Message | Mapping[str, str]] | None
    model: str
    attention: AttentionName | None
    truncation: Truncation | TruncationName | None
    template: Template | str | None
    n: int | None
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: Sequence[str] | str
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_new_tokens: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    # The shape of the answer, at most one: JSON Schema as a mapping or as JSON text, a regular expression that the
    # whole answer matches, strings of which it is one, or a grammar in EBNF.
    json_schema: Mapping[str, object] | str | None
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | None
    # Keep the KV of question and answer, so that a follow-up runs only its new tokens.
    keep_tail: bool
    # Who goes first when there is more work than room: "low", "normal" or "high".
    priority: PriorityName | None
    # Tenant on whose behalf a trusted caller asks. Empty: the tenant of the caller's own credential.
    tenant: str
    request_id: str
    # Seconds for the whole answer; None leaves it to the server. Absent: the client's `Timeouts.generate`.
    timeout: float | None


def _refuse_both(kind: str, text: str | bytes, key: str) -> None:
    if text and key:
        raise ValueError(f"a {kind} has either text or a key, not both")


def _repr(kind: str, text: str | bytes, key: str, title: str = "") -> str:
    content = f"key='{key[:12]}…'" if key else f"{len(text)} {'bytes' if isinstance(text, bytes) else 'characters'}"
    return f"{kind}({title!r}, {content})" if title else f"{kind}({content})"
