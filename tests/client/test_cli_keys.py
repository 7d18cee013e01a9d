"""`drystone keys`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from drystone.cli import build_app
from drystone.cli.console import ExitCode
from shared.transfer.keys import AllowedKeys, load_key_pair

RUNNER = CliRunner()


def run(*arguments: object) -> Result:
    return RUNNER.invoke(build_app(), ["keys", *map(str, arguments)])


def test_keys_are_made_and_their_line_is_one_of_allowed_keys(tmp_path: Path) -> None:
    file, allowed = tmp_path / "prefill-0.key", tmp_path / "allowed.keys"
    made = run("new", file)
    pair = load_key_pair(file)
    assert (made.exit_code, made.stdout) == (0, f"{pair.public} prefill-0\n")
    assert "mode 0600" in made.stderr
    assert pair.secret not in made.output
    for one in (file, f"{file}.pub"):
        shown = run("show", one)
        assert shown.stdout == made.stdout
        assert pair.secret not in shown.output
    allowed.write_text(made.stdout)
    allowed.chmod(0o644)
    assert AllowedKeys(allowed).name(pair.public) == "prefill-0"


def test_json_has_the_public_key_and_the_name(tmp_path: Path) -> None:
    file = tmp_path / "w.key"
    made = json.loads(run("new", file, "--name", "prefill 0", "--json").stdout)
    pair = load_key_pair(file)
    assert made == {"file": str(file), "public_key": pair.public, "name": "prefill 0"}
    assert json.loads(run("show", file, "--json").stdout) == made


def test_what_cannot_be_is_told_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "w.key"
    run("new", file)
    before = file.read_bytes()
    for arguments, said in (
        (("new", file), "never written over"),
        (("new", tmp_path / "none" / "w.key"), "No such file"),
        (("new", tmp_path / "x.key", "--name", "a\nb"), "one line"),
        (("show", tmp_path / "none"), "No such file"),
    ):
        done = run(*arguments)
        assert done.exit_code == ExitCode.FAILED
        assert done.stderr.count("\n") == 1
        assert said in done.stderr
    assert file.read_bytes() == before
    file.chmod(0o644)
    assert "chmod 600" in run("show", file).stderr


def test_without_the_worker_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "zmq" else object())
    done = run("new", tmp_path / "w.key")
    assert done.exit_code == ExitCode.NOT_INSTALLED
    assert "zmq cannot be found; install them with: pip install 'drystone-server[worker]'" in done.stderr
    assert not list(tmp_path.iterdir())
