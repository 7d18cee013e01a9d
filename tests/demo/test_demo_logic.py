"""What the demo asks, and what it takes for a broken promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drystone import Document
from drystone.cli.documents import read_document
from drystone.local.demo import (
    Asked,
    DemoDataError,
    Question,
    RunKind,
    as_dict,
    find_data,
    load_questions,
    problems,
    run_all,
)
from tests.demo.fake_stack import FakeStack

NAMES = ("ash", "beech", "cedar", "dogwood")


def _question(text: str = "Which?", names: tuple[str, ...] = NAMES) -> Question:
    passages = tuple((name, Document(title=name, text=f"{name} is a tree")) for name in names)
    return Question(text, passages, ("ash",))


def _asked(stack: FakeStack, *questions: Question) -> list[Asked]:
    return list(run_all(stack.ask, questions or (_question(),)))


def test_each_question_is_asked_in_every_way() -> None:
    stack = FakeStack()
    (entry,) = _asked(stack)
    assert [run.kind for run in entry.runs] == list(RunKind)
    orders = [titles for _, titles, _ in stack.asked]
    assert orders[0] == orders[1] == orders[3] == NAMES
    assert sorted(orders[2]) == sorted(NAMES)
    assert orders[2] != NAMES
    assert [attention for _, _, attention in stack.asked] == ["block", "block", "block", "full"]
    assert [run.passages for run in entry.runs] == orders


def test_the_shuffle_is_the_same_each_time() -> None:
    first, second = FakeStack(), FakeStack()
    _asked(first)
    _asked(second)
    assert first.asked == second.asked


def test_a_single_passage_has_one_order() -> None:
    (entry,) = _asked(FakeStack(), _question(names=("ash",)))
    assert entry.runs[2].passages == ("ash",)


def test_reuse_is_as_promised() -> None:
    asked = _asked(FakeStack(), _question(), _question("And?", ("ash", "elm")))
    assert problems(asked) == []
    encoded = [[run.answer.usage.blocks_encoded for run in entry.runs] for entry in asked]
    assert encoded == [[5, 0, 0, 1], [1, 0, 0, 1]]


def test_encoding_again_is_a_problem() -> None:
    found = problems(_asked(FakeStack(forgetful=True)))
    assert found == [
        "question 1, warm: 5 of 5 blocks encoded; expected 0",
        "question 1, warm: 5120 bytes of KV shipped; expected 0",
        "question 1, shuffled: 5 of 5 blocks encoded; expected 0",
        "question 1, shuffled: 5120 bytes of KV shipped; expected 0",
    ]


def test_a_different_warm_answer_is_a_problem() -> None:
    assert problems(_asked(FakeStack(fickle=True))) == ["question 1, warm: the answer differs from the cold one"]


def test_a_first_run_that_encodes_nothing_proves_nothing() -> None:
    stack = FakeStack()
    stack.resident = {"preamble", *NAMES}
    assert problems(_asked(stack)) == ["question 1, cold: 0 of 5 blocks encoded; fresh workers hold none"]


def test_what_was_expected_is_found_in_any_case() -> None:
    asked = _asked(FakeStack(), Question("Which?", _question().passages, ("ASH",)))
    assert asked[0].found(asked[0].runs[0])
    assert not asked[0].found(asked[0].runs[2])


def test_figures_are_json() -> None:
    (entry,) = json.loads(json.dumps(as_dict(_asked(FakeStack()))))
    assert [run["run"] for run in entry["runs"]] == ["cold", "warm", "shuffled", "full"]
    assert entry["runs"][0]["shipped_bytes"] == 5 * 1024


def test_the_checkout_has_its_data() -> None:
    questions = load_questions(find_data(), read_document)
    assert len(questions) == 3
    for question in questions:
        texts = [document.text for _, document in question.passages]
        assert all(document.title for _, document in question.passages)
        for wanted in question.expected:
            # A gold passage must tell it; line breaks inside a name do not hide it.
            assert sum(wanted in " ".join(str(text).split()) for text in texts) == 1


def test_later_questions_meet_passages_again() -> None:
    first, *later = load_questions(find_data(), read_document)
    seen = {name for name, _ in first.passages}
    for question in later:
        names = {name for name, _ in question.passages}
        assert names & seen
        seen |= names


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"questions": []}', '{"questions": [{"question": "?"}]}'])
def test_unusable_questions_are_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "questions.json").write_text(content, encoding="utf-8")
    with pytest.raises(DemoDataError, match=r"questions\.json"):
        load_questions(tmp_path, read_document)


def test_no_checkout_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drystone.local.demo.__file__", str(tmp_path / "site-packages" / "demo.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DemoDataError, match="make demo"):
        find_data()
