"""Prompts that the exactness gate runs: from a file of questions with passages, or made up from a seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from drystone import Document

_PLACES = ("Aldmoor", "Brackwater", "Corrin", "Dunmere", "Eskholm", "Farrow", "Glaston", "Hathersey", "Inver", "Jarrow")
_NAMES = ("Ada Brenn", "Bo Castell", "Cyrus Dane", "Dora Ekman", "Emil Fass", "Freya Gant", "Gus Holm", "Hana Imre")
_THINGS = ("bridge", "lighthouse", "library", "mill", "observatory", "theatre", "harbour wall", "market hall")
_DETAILS = (
    "It was paid for by a tax on salt and took {n} months longer than promised.",
    "Visitors are shown a room with {n} clocks, none of which agree.",
    "A fire in {year} left only the cellars, and the town rebuilt it from memory.",
    "Every {n} years the council debates its colour and leaves it as it is.",
    "The archive keeps {n} letters about it, most of them complaints.",
)


@dataclass(frozen=True, slots=True)
class GatePrompt:
    """A question and its passages, in order."""

    question: str
    documents: tuple[Document, ...]


def read_prompts(path: Path | None, count: int) -> list[GatePrompt]:
    """The first `count` prompts of a JSON Lines file (`question`, `documents` of `title` and `text`), or made-up ones.

    Raises:
        ValueError: A line that does not have this form, by number.
    """
    if path is None:
        return [_made_up(seed) for seed in range(count)]
    prompts = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(islice(lines, count), start=1):
            try:
                row = json.loads(line)
                documents = tuple(Document(title=each["title"], text=each["text"]) for each in row["documents"])
                prompts.append(GatePrompt(row["question"], documents))
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                raise ValueError(f"{path}:{number}: not a question with documents: {error!r}") from error
    return prompts


def _made_up(seed: int) -> GatePrompt:
    """Passages about invented places; the last prompt's passages return in others, in another order."""
    draw = random.Random(seed)  # noqa: S311 - the same prompts every time, not secrets
    subjects = [(place, draw.choice(_THINGS)) for place in draw.sample(_PLACES, draw.randint(1, len(_PLACES)))]
    documents = tuple(
        Document(title=f"{thing.capitalize()} of {place}", text=_text(place, thing)) for place, thing in subjects
    )
    place, thing = draw.choice(subjects)
    return GatePrompt(f"Who built the {thing} of {place}, and when?", documents)


def _text(place: str, thing: str) -> str:
    draw = random.Random(place + thing)  # noqa: S311 - equal subjects give equal passages, hence equal blocks
    details = draw.sample(_DETAILS, draw.randint(1, len(_DETAILS)))
    opening = f"The {thing} of {place} was built in {draw.randint(1600, 1950)} by {draw.choice(_NAMES)}."
    return " ".join([opening, *(line.format(n=draw.randint(2, 90), year=draw.randint(1700, 1990)) for line in details)])
