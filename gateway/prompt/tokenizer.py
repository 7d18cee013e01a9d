"""The model's tokenizer, as prompts need it: blocks alone, and texts that may not speak for the template."""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from gateway.prompt.token_cache import TokenCache
from shared.errors import DrystoneError, Reason

Message = Mapping[str, str]

_CACHED_TOKENS = 1 << 20


class TokenOffsets(NamedTuple):
    """Tokens of a text, and where in it each one lies: its characters [start, end).

    White space before a token may be in no token, and several tokens may share one character.
    """

    ids: Sequence[int]
    starts: Sequence[int]
    ends: Sequence[int]


class PromptTokenizer:
    """A tokenizer loaded from a local folder. Safe for many threads.

    Control tokens are the tokenizer's special tokens and those added tokens that its chat template writes
    (such as `<tool_call>`). Two backends are made once and never changed: one knows control tokens, the other
    reads their spelling as ordinary text.

    Args:
        folder: Folder with `tokenizer.json` and `tokenizer_config.json`.
        cached_tokens: Most tokens to keep of texts tokenised lately.

    Raises:
        ValueError: The folder holds no fast tokenizer.
    """

    def __init__(self, folder: Path, *, cached_tokens: int = _CACHED_TOKENS) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{folder}: no fast tokenizer (tokenizer.json); convert it first")
        self._tokenizer: Any = tokenizer
        self._template_source: str = tokenizer.get_chat_template() if tokenizer.chat_template else ""
        self.control_tokens = _control_tokens(tokenizer.backend_tokenizer, self._template_source)
        self._with_special = _backend(tokenizer.backend_tokenizer, frozenset())
        self._without_special = _backend(tokenizer.backend_tokenizer, self.control_tokens)
        self._control = _any_of(self.control_tokens)
        self._control_ids = frozenset(map(self._with_special.token_to_id, self.control_tokens))
        self._cache = TokenCache(cached_tokens)
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.adds_bos = self.bos_token_id is not None and _adds(self._with_special, self.bos_token_id)
        self.reserved_template_kwargs = _reserved(tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """True when the model brings its own chat template."""
        return bool(self._template_source)

    def encode(self, text: str, *, allow_special: bool) -> tuple[int, ...]:
        """Token ids of a text alone, without added special tokens.

        Args:
            text: The text.
            allow_special: False reads the spelling of a control token, such as `<|im_end|>`, as ordinary text.
        """
        key = TokenCache.key(text, allow_special=allow_special)
        if (ids := self._cache.get(key)) is not None:
            return ids
        ids = _ids(self._with_special, text) if allow_special else self._ids_as_text(text)
        self._cache.put(key, ids)
        return ids

    def _ids_as_text(self, text: str) -> tuple[int, ...]:
        ids = _ids(self._without_special, text)
        if self._control_ids.isdisjoint(ids):
            return ids
        return tuple(chain.from_iterable(_ids(self._without_special, piece) for piece in self._pieces_as_text(text)))

    def _pieces_as_text(self, text: str) -> list[str]:
        # Unigram models know control tokens as ordinary pieces too: cut their spelling after its first character.
        runs = enumerate(self._control.split(text))
        pieces = chain.from_iterable((run[:1], run[1:]) if index % 2 else (run,) for index, run in runs)
        return [piece for piece in pieces if piece]

    def encode_with_offsets(self, text: str, *, allow_special: bool) -> TokenOffsets:
        """The same ids as `encode`, and where in the text each token lies. Not remembered: it is for long texts."""
        if allow_special:
            return _ids_with_offsets(self._with_special, text)
        whole = _ids_with_offsets(self._without_special, text)
        if self._control_ids.isdisjoint(whole.ids):
            return whole
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        at = 0
        for piece in self._pieces_as_text(text):
            part = _ids_with_offsets(self._without_special, piece)
            ids += part.ids
            starts += (at + start for start in part.starts)
            ends += (at + end for end in part.ends)
            at += len(piece)
        return TokenOffsets(ids, starts, ends)

    def encode_together(self, parts: Sequence[tuple[str, bool]]) -> tuple[int, ...]:
        """Token ids of joined texts, each with its own `allow_special`.

        Equal to the ids of the joined text, unless a part that may not speak for the template spells a control
        token: the text is then cut at that spelling, which is read as ordinary text.
        """
        runs = [""]
        for text, allow_special in parts:
            plain_and_control = [text] if allow_special else self._control.split(text)
            runs[-1] += plain_and_control[0]
            runs += plain_and_control[1:]
        # Even runs are text as it came, odd ones the spelling of a control token.
        encoded = (self.encode(run, allow_special=index % 2 == 0) for index, run in enumerate(runs) if run)
        return tuple(chain.from_iterable(encoded))

    def render_chat(self, messages: Sequence[Message], **kwargs: object) -> str:
        """A conversation in the model's own chat template, ready for the answer.

        Args:
            messages: Turns with `role` and `content`.
            kwargs: Keywords for the template; none of `reserved_template_kwargs`.

        Raises:
            DrystoneError: INVALID_TEMPLATE, with the template's own message.
        """
        import jinja2

        if not self.has_chat_template:
            raise DrystoneError(Reason.INVALID_TEMPLATE, "this model has no chat template; name another template")
        turns = [dict(message) for message in messages]
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **kwargs
            )
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DrystoneError(
                Reason.INVALID_TEMPLATE, f"the model's chat template cannot render this: {error}"
            ) from error
        return rendered


def _control_tokens(backend: Any, template_source: str) -> frozenset[str]:
    # Runs of white space are added tokens of some models and ordinary text in their templates.
    return frozenset(
        token.content
        for token in backend.get_added_tokens_decoder().values()
        if token.special or (token.content in template_source and not token.content.isspace())
    )


def _backend(source: Any, as_text: frozenset[str]) -> Any:
    """A copy that neither cuts nor pads, and that reads the given added tokens as ordinary text."""
    from tokenizers import Tokenizer

    description = json.loads(source.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["special"] or token["content"] in as_text
    backend = Tokenizer.from_str(json.dumps(description))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(as_text)
    return backend


def _ids(backend: Any, text: str) -> tuple[int, ...]:
    return tuple(backend.encode(text, add_special_tokens=False).ids)


def _ids_with_offsets(backend: Any, text: str) -> TokenOffsets:
    encoding = backend.encode(text, add_special_tokens=False)
    offsets = encoding.offsets
    return TokenOffsets(encoding.ids, [start for start, _ in offsets], [end for _, end in offsets])


def _any_of(tokens: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def _adds(backend: Any, token_id: int) -> bool:
    ids = backend.encode("a", add_special_tokens=True).ids
    return len(ids) > len(backend.encode("a", add_special_tokens=False).ids) and ids[0] == token_id


def _reserved(tokenizer: Any) -> frozenset[str]:
    parameters = inspect.signature(tokenizer.apply_chat_template).parameters.values()
    named = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    return frozenset({"messages", *named, *tokenizer.special_tokens_map})
