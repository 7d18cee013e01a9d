"""Prompts of the comparison: ten passages, laid in many orders, each order with another question."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from drystone.local.gate_prompts import read_prompts
from gateway.prompt.chat_template import ChatTemplate
from gateway.prompt.templates import passage_text
from gateway.prompt.tokenizer import PromptTokenizer

PASSAGES: Final = 10
PROMPT_TOKENS: Final = 1770
_MOST_READ: Final = 1000


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, as each server takes it.

    Args:
        blocks: Preamble, passages, question; the `blocks` form of Drystone's prompts.
        ids: Token ids of the blocks, each tokenised alone, joined.
    """

    blocks: tuple[str, ...]
    ids: tuple[int, ...]

    @property
    def text(self) -> str:
        """The blocks joined."""
        return "".join(self.blocks)


class Workload:
    """Sets of ten passages out of a file of questions, those first whose prompts come nearest to 1,770 tokens.

    Order 0 of a set is the file's; every other number is another shuffle of the same passages.

    Args:
        questions: JSON Lines of `question` and `documents` (`title`, `text`).
        model: Folder of the model, for its tokenizer and chat template.

    Raises:
        ValueError: A line of another form, or no question with ten passages.
    """

    def __init__(self, questions: Path, model: Path) -> None:
        self._tokenizer = PromptTokenizer(model)
        self._template = ChatTemplate(self._tokenizer, {})
        self._ids: dict[str, tuple[int, ...]] = {}
        rows = [row for row in read_prompts(questions, _MOST_READ) if len(row.documents) == PASSAGES]
        if not rows:
            raise ValueError(f"{questions}: no question with {PASSAGES} passages")
        self._questions = [row.question for row in rows]
        sets = [tuple(passage_text(each.title, str(each.text)) for each in row.documents) for row in rows]
        self._sets = sorted(sets, key=lambda passages: abs(self._tokens(passages) - PROMPT_TOKENS))

    def prompt(self, passages: int, order: int, question: int) -> Prompt:
        """A prompt by the numbers of its passages, their order and its question; all count from 0 and wrap around."""
        laid = list(self._sets[passages % len(self._sets)])
        if order:
            random.Random(f"{passages}/{order}").shuffle(laid)
        frame = self._template.rag(None, self._questions[question % len(self._questions)])
        blocks = (frame.preamble, *laid, frame.question)
        return Prompt(blocks, tuple(token for block in blocks for token in self._encoded(block)))

    def _tokens(self, passages: tuple[str, ...]) -> int:
        frame = self._template.rag(None, self._questions[0])
        return sum(len(self._encoded(text)) for text in (frame.preamble, *passages, frame.question))

    def _encoded(self, text: str) -> tuple[int, ...]:
        if text not in self._ids:
            self._ids[text] = self._tokenizer.encode(text, allow_special=True)
        return self._ids[text]
