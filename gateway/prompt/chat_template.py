r"""The model's own chat template, cut where the passages stand.

The conversation is rendered once, with a private mark where the passages belong, and cut at the mark:

```
<|im_start|>system\nInstructions\n\n▲<|im_end|>\n<|im_start|>user\n…<|im_end|>\n<|im_start|>assistant\n
└───────────── preamble ───────────┘└────────────────────────── question block ───────────────────────┘
```

Passages are laid in at ▲ as they are. So preamble, passages and question block joined are the ordinary rendering
of the same turns; a template that trims its turns would also have taken the last passage's line end, which the
training data of block-attention models keeps.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.prompt.templates import QUESTION, Frame, lead_in, split_system
from gateway.prompt.tokenizer import Message, PromptTokenizer
from shared.errors import DrystoneError, Reason


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template of one model with one request's keywords.

    Args:
        tokenizer: Tokenizer that holds the template.
        kwargs: Keywords for the template.
    """

    tokenizer: PromptTokenizer
    kwargs: Mapping[str, object]

    @property
    def name(self) -> str:
        """Name that requests use."""
        return "chat"

    def rag(self, instructions: str | None, question: str) -> Frame:
        """Frame of a system turn with instructions and passages, and a user turn with the question."""
        return self._framed(lead_in(instructions), None, [_turn("user", QUESTION.format(question=question))])

    def chat(self, messages: Sequence[Message], *, documents: bool) -> Frame:
        """Frame of a conversation; passages stand at the end of the system turn."""
        if not documents:
            return Frame("", self.tokenizer.render_chat(messages, **self.kwargs))
        system, turns = split_system(messages)
        return self._framed(lead_in(system), messages[0]["role"] if system is not None else None, turns)

    def _framed(self, lead: str, system_role: str | None, turns: Sequence[Message]) -> Frame:
        """Frame around passages after `lead`: in a system turn or, where the template has none, in the first turn."""
        mark = secrets.token_hex(16)
        in_system = [_turn(system_role or "system", lead + mark), *turns]
        refusal: DrystoneError | None = None
        for messages in (in_system, _in_first_turn(lead + mark, turns)):
            try:
                rendered = self.tokenizer.render_chat(messages, **self.kwargs)
            except DrystoneError as error:
                refusal = error
                continue
            if (frame := _cut(rendered, mark, turns)) is not None:
                return frame
        raise refusal or DrystoneError(
            Reason.INVALID_TEMPLATE,
            "the model's chat template leaves passages out or repeats them; name another template",
        )


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _in_first_turn(lead: str, turns: Sequence[Message]) -> list[Message]:
    if turns and turns[0]["role"] == "user":
        return [_turn("user", f"{lead}\n\n{turns[0]['content']}"), *turns[1:]]
    return [_turn("user", lead), *turns]


def _cut(rendered: str, mark: str, turns: Sequence[Message]) -> Frame | None:
    """The two sides of the mark, or None where the template does not keep passages before the conversation."""
    if rendered.count(mark) != 1:
        return None
    preamble, question = rendered.split(mark)
    first = turns[0]["content"].strip() if turns else ""
    if first not in question and first in preamble:
        return None
    return Frame(preamble, question)
