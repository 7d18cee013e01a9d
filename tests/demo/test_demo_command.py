"""`drystone demo` from its arguments to its exit code, over a fake stack."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from drystone import UnavailableError
from drystone.cli import build_app, demo
from drystone.local.supervisor import SupervisorError
from tests.demo.fake_stack import FakeClient, FakeStack, FakeSupervisor

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.setattr(demo, "require_server_packages", lambda: None)
    monkeypatch.setattr(demo, "Supervisor", FakeSupervisor)
    monkeypatch.setattr(FakeSupervisor, "stopped", 0)
    monkeypatch.setattr(FakeSupervisor, "error", None)

    def run(*arguments: str, stack: FakeStack | None = None) -> Result:
        client = FakeClient(stack or FakeStack())
        monkeypatch.setattr(demo, "Client", lambda _: client)
        return CliRunner().invoke(build_app(), ["demo", *arguments])

    return run


def test_it_prints_answers_figures_and_the_verdict(invoke: Invoke) -> None:
    result = invoke()
    assert result.exit_code == 0, result.output
    assert "1. Who found the Pellam comet?" in result.stdout
    assert "[It] was Pellam Town Library." in result.stdout
    assert "As promised: in all 3 questions" in result.stdout
    assert "SmolLM2-135M is not fine-tuned for block attention" in result.stdout
    assert FakeSupervisor.stopped == 1


def test_lines_of_the_processes_are_kept_back(invoke: Invoke) -> None:
    result = invoke()
    assert "downloading a model" in result.stderr
    assert "a line of its log" not in result.output


def test_another_model_is_not_called_untrained(invoke: Invoke) -> None:
    result = invoke("--model", "some-block-ft")
    assert result.exit_code == 0
    assert "not fine-tuned" not in result.stdout


def test_json_is_one_object(invoke: Invoke) -> None:
    result = invoke("--json")
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    assert values["ok"] is True
    assert values["problems"] == []
    assert len(values["questions"]) == 3


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_broken_promise_fails(invoke: Invoke, arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments, stack=FakeStack(forgetful=True))
    assert result.exit_code == 1
    assert "question 1, warm: 7 of 7 blocks encoded; expected 0" in result.stdout
    assert "As promised" not in result.stdout
    assert FakeSupervisor.stopped == 1


def test_a_process_that_dies_is_told(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeSupervisor, "error", SupervisorError("a process ended: prefill-0 exited with code 1"))
    result = invoke()
    assert result.exit_code == 1
    assert "prefill-0 exited with code 1" in result.stderr


def test_a_request_that_fails_brings_the_last_lines(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = FakeStack()

    def refuse(*_: object) -> None:
        raise UnavailableError("no decode worker is ready", reason="NO_DECODE_WORKER")

    monkeypatch.setattr(stack, "ask", refuse)
    result = invoke(stack=stack)
    assert result.exit_code == 1
    assert "[prefill-0] a line of its log" in result.stderr
    assert "no decode worker is ready [NO_DECODE_WORKER]" in result.stderr
    assert FakeSupervisor.stopped == 1


def test_unusable_data_is_wrong_usage(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "questions.json").write_text('{"questions": [{"question": "?", "passages": ["gone.md"]}]}')
    result = invoke("--data", str(tmp_path))
    assert result.exit_code == 2
    assert "gone.md: no such file" in result.stderr
