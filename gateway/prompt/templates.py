r"""How a prompt's parts become text: the forms that models were trained on.

```
        preamble              passages                       question block
chat    <|system|>…\n\n       - Title: a\nText\n  xN         <|end|><|user|>…Question: q<|end|><|assistant|>
tulu    <|user|>\n…\n\n       - Title: a\nText\n  xN         \n\n…Question: q\n<|assistant|>\n
card    \n…\n\n               - Title: a\nText\n  xN         \n\n…Question: q\n\n\n
plain   …\n\n                 - Title: a\nText\n  xN         \n\n…Question: q\nAnswer:
```

The passage's form is the same everywhere, so that a passage encoded once serves every template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.prompt.tokenizer import Message
from shared.errors import DrystoneError, Reason

INSTRUCTIONS = (
    "You are an intelligent AI assistant. Please answer questions based on the user's instructions. "
    "Below are some reference documents that may help you in answering the user's question."
)
QUESTION = (
    "Please write a high-quality answer for the given question using only the provided search documents "
    "(some of which might be irrelevant).\nQuestion: {question}"
)
_CARD_QUESTION = (
    "Please write a high-quality answer for the given question using only the provided search documents.\n"
    "Question: {question}"
)
SYSTEM_ROLES = frozenset({"system", "developer"})


@dataclass(frozen=True, slots=True)
class Frame:
    """Text on both sides of the passages. Frame and passages joined are the whole prompt."""

    preamble: str
    question: str


class Template(Protocol):
    """A form of prompts."""

    @property
    def name(self) -> str:
        """Name that requests use."""

    def rag(self, instructions: str | None, question: str) -> Frame:
        """Frame of passages and a question. None as instructions means the template's own; empty means none."""

    def chat(self, messages: Sequence[Message], *, documents: bool) -> Frame:
        """Frame of a conversation. Without documents the preamble is empty."""


def passage_text(title: str, text: str) -> str:
    """One passage as the model reads it; without a title the text stands alone."""
    heading = f"- Title: {title}\n" if title.strip() else ""
    return f"{heading}{text.strip()}\n"


def lead_in(instructions: str | None) -> str:
    """Instructions as they stand before the passages."""
    said = INSTRUCTIONS if instructions is None else instructions.rstrip()
    return f"{said}\n\n" if said else ""


@dataclass(frozen=True, slots=True)
class TextTemplate:
    """A template whose headers are ordinary text.

    Args:
        name: Name that requests use.
        head: What opens the preamble.
        question: Question block, with `{question}` in it.
        turns: Form of a turn by role, with `{content}` in it. Empty: conversations are refused.
        answer: What opens the answer of a conversation.
    """

    name: str
    head: str
    question: str
    turns: Mapping[str, str]
    answer: str = ""

    def rag(self, instructions: str | None, question: str) -> Frame:
        """Frame of passages and a question."""
        return Frame(self.head + lead_in(instructions), self.question.format(question=question))

    def chat(self, messages: Sequence[Message], *, documents: bool) -> Frame:
        """Frame of a conversation; passages stand at the end of the system turn."""
        if not documents:
            return Frame("", self._rendered(messages))
        system, turns = split_system(messages)
        before, after = self._form("system").split("{content}")
        return Frame(before + lead_in(system), after + self._rendered(turns))

    def _rendered(self, messages: Sequence[Message]) -> str:
        said = (self._form(message["role"]).format(content=message["content"]) for message in messages)
        return "".join(said) + self.answer

    def _form(self, role: str) -> str:
        if not self.turns:
            raise DrystoneError(
                Reason.INVALID_TEMPLATE, f"template {self.name!r} has no form for conversations; ask with `rag`"
            )
        if role not in self.turns:
            known = ", ".join(self.turns)
            raise DrystoneError(
                Reason.INVALID_TEMPLATE, f"template {self.name!r} has no role {role!r}; it knows {known}"
            )
        return self.turns[role]


def split_system(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """The opening system turn's text, if there is one, and the turns after it."""
    if messages and messages[0]["role"] in SYSTEM_ROLES:
        return messages[0]["content"], messages[1:]
    return None, messages


TULU = TextTemplate(
    name="tulu",
    head="<|user|>\n",
    question=f"\n\n{QUESTION}\n<|assistant|>\n",
    turns={
        "system": "<|system|>\n{content}\n",
        "user": "<|user|>\n{content}\n",
        "assistant": "<|assistant|>\n{content}<|end_of_text|>\n",
    },
    answer="<|assistant|>\n",
)
CARD = TextTemplate(name="card", head="\n", question=f"\n\n{_CARD_QUESTION}\n\n\n", turns={})
PLAIN = TextTemplate(name="plain", head="", question=f"\n\n{QUESTION}\nAnswer:", turns={})
