"""Tokens to text as they come: whole characters only, stop strings found even inside tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# In tokens: a character is at most four bytes, and a token at least one.
_LONGEST_CHARACTER = 4


class TextStream:
    """Text of one sample.

    Characters whose bytes are not complete are held back, and so is text that may yet become a stop
    string. An answer that ends inside a character leaves that character out; its token ids remain.

    Args:
        tokenizer: The `tokenizers.Tokenizer` of the model.
        prompt_ids: Tokens before the answer: decoders that look back see them.
        stop: Stop strings; the one that ends first wins, the longest of equals.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=_whole(tokenizer, prompt_ids), skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self.matched_stop = ""

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Text that is now certain to belong to the answer.

        Sets `matched_stop` when a stop string is complete; without `may_stop` none is looked for.
        """
        piece = self._stream.step(self._tokenizer, token_id)
        if not piece:
            return ""
        self._held += piece
        if not may_stop:
            return self.finish()
        found = _earliest(self._held, self._stop)
        if found is not None:
            start, self.matched_stop = found
            certain, self._held = self._held[:start], ""
            return certain
        keep = _possible_stop(self._held, self._stop)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    @property
    def held(self) -> str:
        """Text that may yet become a stop string."""
        return self._held

    def told(self, characters: int) -> None:
        """The caller has the first characters of what is held already."""
        self._held = self._held[characters:]

    def finish(self) -> str:
        """Text held back for a stop string that did not come."""
        rest, self._held = self._held, ""
        return rest


def _whole(tokenizer: Any, prompt_ids: Sequence[int]) -> list[int]:
    """The prompt's tokens; none when they end inside a character, which would come out as part of the answer."""
    last = tokenizer.decode(list(prompt_ids[-_LONGEST_CHARACTER:]), skip_special_tokens=True)
    return [] if last.endswith(_REPLACEMENT) else list(prompt_ids)


def _earliest(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    end, _, stop = min(found)
    return end - len(stop), stop


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which some stop string begins."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
