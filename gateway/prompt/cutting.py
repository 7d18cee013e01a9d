"""Where a long text may be cut, and where it is best cut.

    text     A wall holds.⏎⏎Each stone is cut once.
    edges    ^ ^    ^    ^ ^   ^     ^  ^   ^    ^ ^     0 … last

An edge is a place between two tokens of the text, tokenised once; the first edge is its beginning, the last its end.
All methods name places by their edge.
"""

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import count

from gateway.prompt.tokenizer import TokenOffsets

# Group 1 of each pattern is the gap: a cut anywhere in it leaves the same two texts. Possessive, and begun at one
# place of a run only: whatever the text, the time is linear.
_SPACE = re.compile(r"(\s+)")
_PARAGRAPH = re.compile(r"((?:\r\n?+|\n)[^\S\r\n]*+(?:\r\n?+|\n)\s*+)")
# Quotes and brackets may close after a sentence. Scripts without spaces need none behind it.
_SENTENCE = re.compile(
    r"(?:(?<![.!?…])[.!?…]++[\"'”’»)\]]*+(?=\s)|[。！？｡]++[」』”’）]*+)(\s*+)"  # noqa: RUF001 - these signs are meant
)
# Most tokens that may share characters without a place between them.
_MOST_TOGETHER = 8
# How far behind a window the end of a gap is looked for, in characters.
_LOOKAHEAD = 64
_JOINER = "\u200d"
# Longest way back to a place that is not inside a character.
_MOST_BACK = 16


class Cutter:
    """Cuts one text.

    Args:
        body: The text, without white space around it.
        offsets: Tokens of a text that holds it.
        begin: Where in that text it begins.
        room: Tokens that a chunk may have, as they are counted there.
        overlap: Tokens that a chunk repeats; at most half of the room.
        at_paragraphs: Look for the end of a paragraph or sentence in the second half of each chunk.
    """

    def __init__(
        self, body: str, offsets: TokenOffsets, begin: int, *, room: int, overlap: int, at_paragraphs: bool
    ) -> None:
        self._body = body
        self._places, self._tokens = _edges(body, offsets, begin)
        self._room = room
        self._overlap = overlap
        self._at_paragraphs = at_paragraphs

    @property
    def last(self) -> int:
        """The text's end."""
        return len(self._places) - 1

    def text(self, start: int, end: int) -> str:
        """What lies between two places, without white space around it."""
        return self._body[self._places[start] : self._places[end]].strip()

    def end_of(self, start: int, done: int, excess: Callable[[str], int]) -> int | None:
        """Where the chunk that begins at `start` ends, behind `done`; None when nothing behind it has room.

        Args:
            start: The chunk's beginning.
            done: The end of the text that earlier chunks hold; not before `start`.
            excess: Tokens that a chunk's text has too many.
        """
        furthest = max(self._within(start, self._room), done + 1)
        for attempt in count():
            end = self._best_cut(start, furthest, done)
            over = excess(self.text(start, end))
            if over <= 0:
                return end
            if end == done + 1:
                break
            # Tokens of a chunk alone differ from those counted by a few. Where they differ by many, larger steps.
            fewer = self._tokens[end] - self._tokens[start] - (over << attempt)
            furthest = max(min(self._within(start, fewer), end - 1), done + 1)
        return None

    def beyond_space(self, place: int) -> int:
        """The last place that nothing but white space parts from `place`."""
        char = self._places[place]
        while char < len(self._body) and self._body[char].isspace():
            char += 1
        return max(place, bisect_right(self._places, char) - 1)

    def start_before(self, end: int, after: int) -> int | None:
        """Where the chunk after one that ended at `end` begins, to repeat some of it.

        Args:
            end: Where the chunk before ended.
            after: Where it began; the next one begins behind it.

        Returns:
            The first word of the overlap if one begins in its first half, else its first token. None without overlap.
        """
        first = max(bisect_left(self._tokens, self._tokens[end] - self._overlap), after + 1)
        if not self._overlap or first >= end:
            return None
        if self._is_word_start(first):
            return first
        middle = self._places[first + (end - first) // 2]
        gap = _SPACE.search(self._body, self._places[first], middle)
        if gap is not None:
            word = bisect_right(self._places, gap.end()) - 1
            if first < word < end and self._places[word] >= gap.start():
                return word
        while first < end and _inside_character(self._body, self._places[first]):
            first += 1
        return first if first < end else None

    def _within(self, start: int, budget: int) -> int:
        return bisect_right(self._tokens, self._tokens[start] + budget) - 1

    def _best_cut(self, start: int, furthest: int, done: int) -> int:
        if furthest == self.last:
            return furthest
        tokens = self._tokens[furthest] - self._tokens[start]
        patterns = (_PARAGRAPH, _SENTENCE, _SPACE) if self._at_paragraphs else (_SPACE,)
        wanted = tokens // 2 if self._at_paragraphs else tokens - tokens // 8
        lowest = max(bisect_left(self._tokens, self._tokens[start] + wanted), done + 1)
        for pattern in patterns:
            if (cut := self._last_gap(pattern, lowest, furthest)) is not None:
                return cut
        for place in range(furthest, max(done, furthest - _MOST_BACK), -1):
            if not _inside_character(self._body, self._places[place]):
                return place
        return furthest

    def _last_gap(self, pattern: re.Pattern[str], lowest: int, furthest: int) -> int | None:
        """The last place from `lowest` to `furthest` that lies in a gap of a pattern."""
        limit = self._places[furthest]
        found = None
        for match in pattern.finditer(self._body, self._places[lowest], limit + _LOOKAHEAD):
            if match.start(1) > limit:
                break
            place = bisect_right(self._places, min(match.end(1), limit)) - 1
            if place >= lowest and self._places[place] >= match.start(1):
                found = place
        return found

    def _is_word_start(self, place: int) -> bool:
        char = self._places[place]
        return self._body[char].isspace() or self._body[char - 1 : char].isspace()


def _edges(body: str, offsets: TokenOffsets, begin: int) -> tuple[list[int], list[int]]:
    """Places between tokens, in characters of the body, and how many of its tokens lie before each.

    Tokens that share a character, as the bytes of an emoji do, have no place between them. Where many share many, as
    the bytes of a script that the tokenizer does not know, the characters part them evenly.
    """
    places, tokens = [0], [0]
    reach = seen = 0
    for start, end in zip(offsets.starts, offsets.ends, strict=True):
        if begin <= start < begin + len(body):
            place = start - begin
            if place >= reach and place > places[-1]:
                _part(places, tokens, place, seen)
            seen += 1
        reach = max(reach, end - begin)
    _part(places, tokens, len(body), seen)
    return places, tokens


def _part(places: list[int], tokens: list[int], place: int, seen: int) -> None:
    """Adds a place, and those within what lies before it where too many tokens have none between them."""
    last, before = places[-1], tokens[-1]
    if seen - before > _MOST_TOGETHER:
        chars = place - last
        places += range(last + 1, place)
        tokens += (before + (seen - before) * char // chars for char in range(1, chars))
    places.append(place)
    tokens.append(seen)


def _inside_character(text: str, place: int) -> bool:
    """True where a mark, a variation or a joined sign belongs to the character before."""
    if not 0 < place < len(text):
        return False
    joined = _JOINER in {text[place], text[place - 1]} or "\U0001f3fb" <= text[place] <= "\U0001f3ff"
    return joined or unicodedata.category(text[place]).startswith("M")
