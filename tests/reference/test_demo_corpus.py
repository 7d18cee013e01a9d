"""The demo's passages hold the answers to its questions."""

from __future__ import annotations

import json
from pathlib import Path

DEMO = Path(__file__).parents[2] / "docs" / "demo"


def test_every_question_has_its_answer_in_the_gold_passage_alone() -> None:
    passages = {file.name: file.read_text(encoding="utf-8") for file in (DEMO / "corpus").glob("*.md")}
    assert len(passages) >= 12
    assert all(text.startswith("# ") and 80 <= len(text.split()) <= 200 for text in passages.values())
    questions = json.loads((DEMO / "questions.json").read_text(encoding="utf-8"))["questions"]
    assert len(questions) == 3
    for question in questions:
        named = question["passages"]
        assert len(set(named)) == 6
        assert set(named) <= set(passages)
        for answer in question["expected"]:
            assert [name for name in named if answer in passages[name].replace("\n", " ")] == [question["gold"]]
