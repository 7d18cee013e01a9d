"""`drystone warm` against a canned gateway: inputs, fates of documents, interruption, what is shown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from typer.testing import CliRunner, Result

from drystone import _warm_batches as batches
from drystone.cli import build_app
from drystone.cli.warm_feed import WarmFeed
from drystone.cli.warm_input import FilesInput, LinesInput, count_lines
from tests.client.canned_blocks import Fault
from tests.client.canned_gateway import failure

if TYPE_CHECKING:
    from pathlib import Path

    from tests.client.canned_gateway import CannedGateway


def run(gateway: CannedGateway, *arguments: object, said: str | bytes | None = None) -> Result:
    command = ["warm", *map(str, arguments), "--server", gateway.address]
    return CliRunner().invoke(build_app(), command, input=said)


def report(gateway: CannedGateway, *arguments: object, said: str | bytes | None = None, code: int = 0) -> Any:
    done = run(gateway, *arguments, "--json", said=said)
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def sent(gateway: CannedGateway) -> list[tuple[str, str]]:
    return [(document.title, document.text) for request in gateway.warmed.requests for document in request.documents]


def lines(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def keys_in(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "handbook"
    for name, text in {
        "b.md": "# Bees\n\nThey hum.",
        "a.txt": "Apples fall.",
        "deep/c.md": "Clay and sand bind.",
        "deep/d.rst": "Not by default.",
        ".git/e.txt": "Hidden folder.",
        "deep/.f.txt": "Hidden file.",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_folders_are_read_in_order_of_names(gateway: CannedGateway, folder: Path) -> None:
    done = run(gateway, folder, "--tag", "one", "--tag", "two", "--ttl", "7d", "--pin", "--tenant", "acme")
    assert done.exit_code == 0, done.output
    assert sent(gateway) == [("a", "Apples fall."), ("Bees", "They hum."), ("c", "Clay and sand bind.")]
    request = gateway.warmed.requests[0]
    assert list(request.tags) == ["one", "two"]
    assert (request.ttl_seconds, request.pin, request.tenant) == (604_800, True, "acme")
    assert not request.HasField("chunking")
    table = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert {"already there 0", "encoded 3", "failed 0", "all 3", "blocks 3, of which 3 encoded"} <= table
    assert {"tokens 8, of which 8 encoded", "KV encoded 800 B", "prefill-0 prefill disk 800 B"} <= table
    assert done.stderr == ""
    again = run(gateway, folder, "--tenant", "acme")
    assert {"already there 3", "encoded 0"} <= {" ".join(line.split()) for line in again.stdout.splitlines()}


def test_globs_choose_and_files_are_taken_as_they_are(gateway: CannedGateway, folder: Path) -> None:
    assert run(gateway, folder, folder / "b.md", "--glob", "deep/*.md", "--glob", "*.rst").exit_code == 0
    assert [title for title, _ in sent(gateway)] == ["c", "d", "Bees"]


def test_chunks_are_asked_for(gateway: CannedGateway, folder: Path) -> None:
    assert run(gateway, folder, "--chunk-tokens", 512, "--overlap", 64, "--template", "card").exit_code == 0
    assert run(gateway, folder, "--chunk-tokens", 9, "--no-at-paragraphs").exit_code == 0
    first, second = (request.chunking for request in gateway.warmed.requests)
    assert (first.max_tokens, first.overlap_tokens, first.at_paragraphs) == (512, 64, True)
    assert (second.max_tokens, second.overlap_tokens, second.at_paragraphs) == (9, 0, False)
    assert gateway.warmed.requests[0].template.name == "card"


def test_lines_are_documents_or_hold_them(gateway: CannedGateway, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    question = {"question": "Why?", "documents": [{"title": "Walls", "text": "Dry stone."}, {"text": "Mortar."}]}
    path.write_text("\ufeff" + lines({"title": "Lime", "text": "Burnt."}) + "\n" + lines(question))
    told = report(gateway, "--jsonl", path)
    assert sent(gateway) == [("Lime", "Burnt."), ("Walls", "Dry stone."), ("", "Mortar.")]
    assert (told["documents"], told["encoded"], told["tokens"], told["complete"]) == (3, 3, 4, True)
    assert told["stored"] == [{"place": "prefill-0", "source": "prefill_disk", "bytes": 400}]


def test_stdin_is_lines(gateway: CannedGateway) -> None:
    assert report(gateway, "--stdin", said=lines({"title": "T", "text": "One."}, {"text": "Two."}))["encoded"] == 2
    assert sent(gateway) == [("T", "One."), ("", "Two.")]


def test_what_is_unusable_is_named_and_the_rest_is_done(gateway: CannedGateway, tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    bad = [
        "{",
        "[1]",
        '{"title": "T"}',
        '{"text": " "}',
        '{"text": "x", "title": 5}',
        '{"documents": "x"}',
        '{"documents": [{"text": "Good."}, {"text": 7}]}',
        '{"text": "\\ud800"}',
    ]
    path.write_bytes("\n".join(bad).encode() + b'\n{"text": "caf\xe9"}\n{"text": "Fine."}')
    done = run(gateway, "--jsonl", path)
    assert done.exit_code == 1
    assert sent(gateway) == [("", "Good."), ("", "Fine.")]
    told = done.stderr.splitlines()
    assert len(told) == 9
    for number, said in {
        1: "not JSON",
        2: "not a JSON object",
        3: "no text",
        4: "no text",
        5: '"title" is not a string',
        6: '"documents" is not a list',
        9: "not JSON",
    }.items():
        assert any(line.startswith(f"{path}:{number}: {said}") for line in told)
    assert any(line.startswith(f"{path}:7 documents[1]: no text") for line in told)
    assert any(line.startswith(f"{path}:8: ") and line.endswith("[INVALID_UTF8]") for line in told)


def test_files_that_cannot_be_read_are_documents_that_failed(gateway: CannedGateway, folder: Path) -> None:
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.md").write_text("# Only a title\n")
    told = report(gateway, folder, code=1)
    assert (told["encoded"], told["failed"]) == (3, 2)
    assert {error["source"] for error in told["errors"]} == {str(folder / "latin.txt"), str(folder / "empty.md")}


def test_the_servers_errors_have_their_source(gateway: CannedGateway) -> None:
    gateway.warmed.errors["Two."] = "PROMPT_TOO_LONG"
    done = run(gateway, "--stdin", said=lines({"text": "One."}, {"text": "Two."}, {"text": "Three."}))
    assert done.exit_code == 1
    assert done.stderr == "stdin:2: refused [PROMPT_TOO_LONG]\n"
    assert "encoded 2" in " ".join(done.stdout.split())


def test_only_the_first_errors_are_listed(gateway: CannedGateway) -> None:
    done = run(gateway, "--stdin", said="x\n" * 25 + lines({"text": "One."}))
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 21
    assert done.stderr.endswith("and 5 more that failed\n")


def test_equal_documents_are_sent_once(gateway: CannedGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_BATCH_DOCUMENTS", 2)
    texts = [{"text": "One."}, {"text": "Two."}, {"text": "One."}, {"title": "T", "text": "One."}, {"text": "Two."}]
    told = report(gateway, "--stdin", said=lines(*texts))
    assert (told["documents"], told["encoded"], told["equal"], told["already_warm"]) == (5, 3, 2, 0)
    assert sent(gateway) == [("", "One."), ("", "Two."), ("T", "One.")]


def test_titles_and_texts_do_not_run_together(gateway: CannedGateway) -> None:
    texts = [{"title": "ab", "text": "c"}, {"title": "a", "text": "bc"}]
    assert report(gateway, "--stdin", said=lines(*texts))["encoded"] == 2


def test_keys_are_added_for_each_document(gateway: CannedGateway, tmp_path: Path) -> None:
    keys = tmp_path / "keys.jsonl"
    said = lines({"title": "Ä", "text": "One two."}, {"documents": [{"text": ""}, {"text": "Three."}]})
    for _ in range(2):
        assert run(gateway, "--stdin", "--keys", keys, said=said).exit_code == 1
    added = keys_in(keys)
    assert added[:2] == added[2:]
    assert sorted((line["source"], line["title"], line["tokens"]) for line in added[:2]) == [
        ("stdin:1", "Ä", 2),
        ("stdin:2 documents[1]", "", 1),
    ]
    assert {key for line in added for key in line["keys"]} == gateway.stored.keys()


def test_a_failure_in_the_middle_says_what_is_done(gateway: CannedGateway, tmp_path: Path) -> None:
    keys = tmp_path / "keys.jsonl"
    gateway.warmed.faults.append(Fault(1, failure(grpc.StatusCode.INTERNAL, "INTERNAL", message="a defect")))
    texts = [{"text": f"Text {number}"} for number in range(3)]
    done = run(gateway, "--stdin", "--keys", keys, said=lines(*texts))
    assert done.exit_code == 1
    assert "drystone: a defect [INTERNAL]" in done.stderr
    assert "encoded 1" in " ".join(done.stdout.split())
    assert len(keys_in(keys)) == 1


def test_interrupted_and_run_again_encodes_nothing_twice(gateway: CannedGateway, tmp_path: Path) -> None:
    path, keys = tmp_path / "corpus.jsonl", tmp_path / "keys.jsonl"
    path.write_text(lines(*({"text": f"Text {number}"} for number in range(10))))
    gateway.warmed.faults.append(Fault(4))
    command = [sys.executable, "-m", "drystone.cli", "warm", "-s", gateway.address, "--keys", str(keys)]
    command += ["--jsonl", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert gateway.warmed.reached.wait(20)
            _until_lines(keys, 4)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "encoded 4" in " ".join(out.split())
    assert err == "drystone: interrupted, 4 documents are done; run it again to go on: what is there is skipped\n"
    assert gateway.warmed.left.wait(5)
    told = report(gateway, "--jsonl", path, "--keys", keys)
    assert (told["already_warm"], told["encoded"]) == (4, 6)
    assert len(gateway.warmed.encoded) == len(set(gateway.warmed.encoded)) == 10
    assert {line["source"] for line in keys_in(keys)} == {f"{path}:{number}" for number in range(1, 11)}


def _until_lines(path: Path, count: int) -> None:
    """Waits until the command has read what the server sent: until then an interrupt may come before it."""
    for _ in range(400):
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never had {count} lines")


def test_a_terminal_gets_a_bar_and_json_does_not(gateway: CannedGateway, folder: Path) -> None:
    for extra, bar in (([], True), (["--json"], False)):
        ours, theirs = os.openpty()
        command = [sys.executable, "-m", "drystone.cli", "warm", "-s", gateway.address, str(folder), *extra]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=False, env=environment)
        os.close(theirs)
        shown = _read_all(ours)
        assert done.returncode == 0, shown
        assert ("3/3" in shown and "tokens/s" in shown) is bar
        assert (shown == "") is not bar


def _read_all(terminal: int) -> str:
    pieces = []
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other side has closed
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(terminal)
    return b"".join(pieces).decode()


def test_the_number_of_documents_is_foreseen(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text(lines(*({"documents": [{"text": f"{line} {place}"} for place in "ab"]} for line in range(4))))
    assert count_lines(path) == 4
    with path.open("rb") as opened:
        feed = WarmFeed(LinesInput("two", opened, 4))
        assert feed.expected is None
        reader = iter(feed)
        for _ in range(3):
            next(reader)
        assert feed.expected == 12  # the first line has two, the second one so far
        assert len(list(reader)) == 5
        assert feed.expected == 8
    assert FilesInput([folder, folder / "a.txt"], ["*.txt", "*.md"]).units_total == 4
    assert count_lines(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of PATHS"),
        (["{folder}", "--stdin"], "one of PATHS"),
        (["{folder}/none.md"], "no such file or folder"),
        (["--jsonl", "{folder}/none.jsonl"], "none.jsonl: No such file"),
        (["--jsonl", "{folder}"], "Is a directory"),
        (["{folder}", "--glob", "*.pdf"], "no documents in the input"),
        (["--stdin"], "no documents in the input"),
        (["--stdin", "--glob", "*.md"], "goes with PATHS"),
        (["{folder}", "--ttl", "soon"], "--ttl: soon is not a time"),
        (["{folder}", "--overlap", "5"], "needs --chunk-tokens"),
        (["{folder}", "--keys", "{folder}/none/keys.jsonl"], "keys.jsonl: No such file"),
    ],
)
def test_wrong_usage_exits_with_2(gateway: CannedGateway, folder: Path, arguments: list[str], said: str) -> None:
    done = run(gateway, *(argument.format(folder=folder) for argument in arguments))
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr
    assert not gateway.warmed.requests


def test_no_server_exits_with_4(closed_port: int, folder: Path) -> None:
    done = CliRunner().invoke(build_app(), ["warm", str(folder), "-s", f"127.0.0.1:{closed_port}"])
    assert (done.exit_code, done.stdout) == (4, "")
    assert "drystone serve" in done.stderr


def test_a_full_disk_for_keys_is_said(gateway: CannedGateway, folder: Path) -> None:
    done = run(gateway, folder, "--keys", "/dev/full")
    assert done.exit_code == 1
    assert "No space left" in done.stderr


def test_help_has_examples_and_exit_codes(gateway: CannedGateway) -> None:
    said = run(gateway, "--help").output
    assert "Examples:" in said
    assert "130 interrupted" in said
    assert "drystone warm handbook/" in said
