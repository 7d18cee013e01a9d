"""The demonstration: three questions, each asked in four ways.

    cold       passages in the given order     blocks are encoded, shipped and laid
    warm       the same again                  nothing is encoded or shipped; the answer is the same, token for token
    shuffled   the passages in another order   nothing is encoded or shipped either
    full       ordinary attention              the whole prompt is encoded as one block

The two lines in the middle are the promise, and `problems` holds every run to it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from drystone import Answer, BlockRole, Document

Attention = Literal["block", "full"]
Ask = Callable[[str, list[Document], Attention], Answer]

SHUFFLE_SEED: Final = 7
MAX_NEW_TOKENS: Final = 48
_DATA: Final = Path("docs/demo")
_QUESTIONS: Final = "questions.json"


class DemoDataError(Exception):
    """The demo's corpus is missing or does not fit its questions; the message says what to do."""


class RunKind(StrEnum):
    """The ways in which a question is asked."""

    COLD = "cold"
    WARM = "warm"
    SHUFFLED = "shuffled"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Question:
    """One question over passages of the corpus.

    Args:
        text: The question.
        passages: Name of each passage and its document, in the order of the cold run.
        expected: Strings of which a right answer has one.
    """

    text: str
    passages: tuple[tuple[str, Document], ...]
    expected: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One answer, and the passages in the order in which they were laid."""

    kind: RunKind
    passages: tuple[str, ...]
    answer: Answer

    @property
    def blocks(self) -> int:
        """Blocks of the prompt, the question not counted."""
        return sum(block.role is not BlockRole.QUESTION for block in self.answer.blocks)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with its runs, in the order of `RunKind`."""

    question: Question
    runs: tuple[Run, ...]

    def found(self, run: Run) -> bool:
        """True when an answer has what was expected in it."""
        said = run.answer.text.casefold()
        return any(wanted.casefold() in said for wanted in self.question.expected)


def find_data() -> Path:
    """The folder docs/demo of the checkout that this package runs from, or that we stand in.

    Raises:
        DemoDataError: There is none.
    """
    here = Path.cwd()
    for root in (*Path(__file__).resolve().parents, here, *here.parents):
        if (root / _DATA / _QUESTIONS).is_file():
            return root / _DATA
    raise DemoDataError(
        f"the demo's passages are in {_DATA} of a checkout, and no checkout was found around this package or around "
        f"{here}; run `make demo` in a checkout, or name the folder with --data"
    )


def load_questions(folder: Path, read_document: Callable[[Path], Document]) -> tuple[Question, ...]:
    """Questions with their passages.

    Args:
        folder: Folder with questions.json and corpus/.
        read_document: Reads one passage.

    Raises:
        DemoDataError: A file is missing or not as it should be.
    """
    file = folder / _QUESTIONS
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["questions"]
        questions = tuple(
            Question(
                text=entry["question"],
                passages=tuple(
                    (Path(name).stem, read_document(folder / "corpus" / name)) for name in entry["passages"]
                ),
                expected=tuple(entry["expected"]),
            )
            for entry in entries
        )
    except (OSError, ValueError) as error:
        raise DemoDataError(f"{file}: {error}") from error
    except (KeyError, TypeError) as error:
        raise DemoDataError(f"{file}: an entry lacks or misspells {error}") from error
    if not questions:
        raise DemoDataError(f"{file}: no question in it")
    return questions


def run_all(ask: Ask, questions: tuple[Question, ...], *, seed: int = SHUFFLE_SEED) -> Iterator[Asked]:
    """Asks every question in every way; yields each question when its runs are done."""
    order = random.Random(seed)  # noqa: S311 - an order to show, not a secret
    for question in questions:
        shuffled = _shuffled(question.passages, order)
        plan: tuple[tuple[RunKind, tuple[tuple[str, Document], ...], Attention], ...] = (
            (RunKind.COLD, question.passages, "block"),
            (RunKind.WARM, question.passages, "block"),
            (RunKind.SHUFFLED, shuffled, "block"),
            (RunKind.FULL, question.passages, "full"),
        )
        yield Asked(
            question,
            tuple(
                Run(
                    kind,
                    tuple(name for name, _ in passages),
                    ask(question.text, [document for _, document in passages], attention),
                )
                for kind, passages, attention in plan
            ),
        )


def problems(asked: list[Asked]) -> list[str]:
    """What is not as promised, one line each; empty when all is."""
    found = []
    for number, entry in enumerate(asked, 1):
        cold = entry.runs[0]
        for run in entry.runs:
            found += [f"question {number}, {run.kind}: {wrong}" for wrong in _wrong(run, cold, first=number == 1)]
    return found


def _wrong(run: Run, cold: Run, *, first: bool) -> Iterator[str]:
    usage = run.answer.usage
    if not run.answer.token_ids:
        yield "no token was generated"
    if run is cold and first and usage.blocks_encoded != run.blocks:
        yield f"{usage.blocks_encoded} of {run.blocks} blocks encoded; fresh workers hold none"
    if run.kind in (RunKind.WARM, RunKind.SHUFFLED):
        if usage.blocks_encoded or usage.blocks_reused != run.blocks:
            yield f"{usage.blocks_encoded} of {run.blocks} blocks encoded; expected 0"
        if usage.shipped_bytes:
            yield f"{usage.shipped_bytes} bytes of KV shipped; expected 0"
    if run.kind is RunKind.WARM and run.answer.token_ids != cold.answer.token_ids:
        yield "the answer differs from the cold one"


def as_dict(asked: list[Asked]) -> list[dict[str, object]]:
    """The figures of every run, as JSON values."""
    return [
        {
            "question": entry.question.text,
            "expected": list(entry.question.expected),
            "runs": [
                {
                    "run": str(run.kind),
                    "passages": list(run.passages),
                    "text": run.answer.text,
                    "found": entry.found(run),
                    "prompt_tokens": run.answer.usage.prompt_tokens,
                    "completion_tokens": run.answer.usage.completion_tokens,
                    "blocks_encoded": run.answer.usage.blocks_encoded,
                    "blocks_reused": run.answer.usage.blocks_reused,
                    "shipped_bytes": run.answer.usage.shipped_bytes,
                    "ttft_ms": run.answer.timings.ttft_ms,
                    "total_ms": run.answer.timings.total_ms,
                }
                for run in entry.runs
            ],
        }
        for entry in asked
    ]


def _shuffled(passages: tuple[tuple[str, Document], ...], order: random.Random) -> tuple[tuple[str, Document], ...]:
    """Another order of the same passages; the same one only where there is no other."""
    shuffled = list(passages)
    while len(passages) > 1 and tuple(shuffled) == passages:
        order.shuffle(shuffled)
    return tuple(shuffled)
