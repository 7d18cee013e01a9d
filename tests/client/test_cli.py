"""The `drystone` command against a canned gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc
import pytest
from typer.testing import CliRunner, Result

from drystone import Client, PairStatus, ProcessStatus
from drystone.cli import build_app
from drystone.cli import console as cli_console
from drystone.cli import serve as serve_command
from drystone.local import gate
from drystone.local import options as local_options
from drystone.v1 import prompt_pb2
from tests.client.canned_gateway import failure

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from drystone.local.supervisor import Supervisor
    from tests.client.canned_gateway import CannedGateway


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "walls.md"
    path.write_text("# Dry stone\n\nA wall without mortar.\n")
    return path


def run(*arguments: object, environment: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments], env=environment)


def test_ask_streams_and_sums_up(gateway: CannedGateway, document: Path, tmp_path: Path) -> None:
    plain = tmp_path / "mortar.txt"
    plain.write_bytes("\ufeffLime and sand.".encode())
    done = run(
        "ask", "-s", gateway.address, "-d", document, "-d", plain, "--seed", 9, "--temperature", 0.5, "What holds?"
    )
    assert done.exit_code == 0, done.output
    assert done.stdout == "Gravity holds it.\n"
    for said in ("resident", "prefill RAM", "question", "1.5 KiB", "first token 120 ms", "10.0 tokens/s", "stop"):
        assert said in done.stderr
    sent = gateway.requests[0]
    assert [(item.title, item.text) for item in sent.rag.documents] == [
        ("Dry stone", "A wall without mortar."),
        ("mortar", "Lime and sand."),
    ]
    assert sent.rag.question == "What holds?"
    assert sent.sampling.seed == 9
    assert not sent.sampling.HasField("max_new_tokens")
    assert sent.attention == 1


def test_ask_takes_keys_after_files_and_a_tenant(gateway: CannedGateway, document: Path) -> None:
    key = "ab" * 32
    done = run("ask", "-s", gateway.address, "-d", document, "-k", key, "--tenant", "acme", "What holds?")
    assert done.exit_code == 0, done.output
    sent = gateway.requests[0]
    assert [(item.title, item.block_key) for item in sent.rag.documents] == [("Dry stone", ""), ("", key)]
    assert sent.tenant == "acme"


def test_ask_json_is_one_object(gateway: CannedGateway, document: Path) -> None:
    done = run("ask", "--json", "-d", document, "Why?", environment={"DRYSTONE_SERVER": gateway.address})
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["text"] == "Gravity holds it."
    assert said["usage"]["shipped_bytes"] == 1536
    assert said["blocks"][1]["source"] == "prefill_ram"


def test_ask_without_documents_is_a_chat(gateway: CannedGateway) -> None:
    done = run("ask", "-s", gateway.address, "Why?")
    assert done.exit_code == 0, done.output
    assert "no documents" in done.stderr
    assert gateway.requests[0].chat.messages[0].content == "Why?"
    assert gateway.requests[0].attention == 2


def test_ask_block_attention_needs_documents(gateway: CannedGateway) -> None:
    done = run("ask", "-s", gateway.address, "--attention", "block", "Why?")
    assert done.exit_code == 2
    assert "-d FILE" in done.stderr


def test_unusable_files_are_one_line_each(gateway: CannedGateway, tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    for path, said in ((tmp_path / "none.md", "no such file"), (tmp_path, "is a directory"), (latin, "not UTF-8")):
        done = run("ask", "-s", gateway.address, "-d", path, "Why?")
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1
        assert said in done.stderr
        assert str(path) in done.stderr
    assert not gateway.requests


def test_no_server_exits_with_4(closed_port: int, document: Path) -> None:
    address = f"127.0.0.1:{closed_port}"
    for arguments in (["ask", "-d", document, "Why?"], ["status"]):
        done = run(*arguments, "--server", address)
        assert done.exit_code == 4
        assert f"no Drystone gateway at {address}; start one with `drystone serve`" in done.stderr
        assert done.stdout == ""


def test_a_refusal_names_its_reason(gateway: CannedGateway, document: Path) -> None:
    gateway.failure = failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_REQUESTS", message="full", retry_ms=2000)
    done = run("ask", "-s", gateway.address, "-d", document, "Why?")
    assert done.exit_code == 1
    assert "full [TOO_MANY_REQUESTS] (try again in 2.0 s)" in done.stderr


def test_status(gateway: CannedGateway) -> None:
    done = run("status", "-s", gateway.address)
    assert done.exit_code == 0, done.output
    for said in ("gateway", "decode-0", "ready", gateway.address, "[bold]tiny", "num_requests_running", "3.0 MiB"):
        assert said in done.stdout
    said = json.loads(run("status", "-s", gateway.address, "--json").stdout)
    assert [process["worker_id"] for process in said["processes"]] == ["gateway", "decode-0"]


def test_status_has_sizes_seconds_and_whole_counts(gateway: CannedGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"shipped_bytes_total": 3.0 * 2**20, "encode_seconds_total": 1.23456, "steps_total": 2.0, "ratio": 0.5}
    process = ProcessStatus("p", "prefill", "ready", "h:1", "m", "f", "1", 2.0, 1, values=values)
    monkeypatch.setattr(Client, "status", lambda _: (process,))
    said = run("status", "-s", gateway.address).stdout
    for shown in ("3.0 MiB", "1.235 ", " 2 "):
        assert shown in said
    said = run("status", "-s", gateway.address, "--json").stdout
    assert '"shipped_bytes_total": 3145728, "encode_seconds_total": 1.23456, "steps_total": 2, "ratio": 0.5' in said


def test_status_shows_pairs_only_where_there_are_any(gateway: CannedGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("status", "-s", gateway.address).stdout
    for shown in (
        "decode-0 ← [bold]prefill-0",
        "zmq-tcp, curve",
        "5.0 MiB",
        "2 refused",
        "15.0 MiB",
        "1 fallbacks; CHECKSUM: checksum does not match",
    ):
        assert shown in said
    pair = json.loads(run("status", "-s", gateway.address, "--json").stdout)["processes"][1]["pairs"][0]
    assert (pair["peer"], pair["state"], pair["bytes_total"]) == ("[bold]prefill-0", "open", 5 << 20)
    sender = PairStatus("d", "tcp://h:1", "send", "zmq-tcp", curve=False, state="idle", resent_total=4)
    process = ProcessStatus("p", "prefill", "ready", "h:1", "m", "f", "1", 2.0, 1, pairs=(sender,))
    monkeypatch.setattr(Client, "status", lambda _: (process,))
    assert "4 sent" in run("status", "-s", gateway.address).stdout
    monkeypatch.setattr(Client, "status", lambda _: (replace(process, pairs=()),))
    assert "round trip" not in run("status", "-s", gateway.address).stdout


def test_a_file_without_content_is_refused_before_any_request(gateway: CannedGateway, tmp_path: Path) -> None:
    for content in ("", " \n\n", "# Only a title\n\n"):
        empty = tmp_path / "empty.md"
        empty.write_text(content)
        done = run("ask", "-s", gateway.address, "-d", empty, "Why?")
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1
        assert str(empty) in done.stderr
        assert "no text" in done.stderr
    assert not gateway.requests


def test_truncation_is_sent_and_hinted_at(gateway: CannedGateway, document: Path) -> None:
    ask = ("ask", "-s", gateway.address, "-d", document, "Why?")
    assert run(*ask, "--truncation", "left").exit_code == 0
    assert gateway.requests[0].truncation.side == prompt_pb2.TRUNCATION_SIDE_LEFT
    gateway.failure = failure(grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG", message="long")
    done = run(*ask)
    assert done.exit_code == 1
    assert "use --truncation left or right" in done.stderr
    assert "use --truncation" not in run(*ask, "--truncation", "right").stderr


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:7700", "127.0.0.1", "host", ":7700", "host:", "host:0", "host:99999", "::1:7700", ""]
)
def test_what_is_no_address_is_wrong_usage(address: str) -> None:
    for command in (["ask", "Why?"], ["status"]):
        done = run(*command, f"--server={address}")
        assert done.exit_code == 2
        assert f"{address} is not HOST:PORT" in done.stderr


def test_ipv6_addresses_are_taken(closed_port: int) -> None:
    assert run("status", "-s", f"[::1]:{closed_port}").exit_code == 4


class Served(Exception):  # noqa: N818 - ends a command with the options it made
    pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., local_options.ServeOptions]:
    """Options that `drystone serve` would run with."""

    def served(supervisor: Supervisor) -> None:
        raise Served(supervisor._options)

    def options(*flags: object, **environment: str) -> local_options.ServeOptions:
        done = run("serve", *flags, environment={f"DRYSTONE_{name}": value for name, value in environment.items()})
        assert isinstance(done.exception, Served), done.output
        found = done.exception.args[0]
        assert isinstance(found, local_options.ServeOptions)
        return found

    monkeypatch.setattr(serve_command, "_run", served)
    return options


def test_serve_takes_flags_over_environment(serve: Callable[..., local_options.ServeOptions]) -> None:
    said = {"MODEL": "m", "DTYPE": "float32", "PREFILL": "2", "DECODE": "3", "PORT": "7", "THREADS": "5"}
    found = serve(**said, LOG_LEVEL="debug", HOST="::1")
    assert found == local_options.ServeOptions("m", "float32", 2, 3, "::1", 7, 5, "debug")
    found = serve("--port", 8, "--prefill", 0, **said)
    assert (found.port, found.prefill, found.decode, found.log_level) == (8, 0, 3, "info")


def test_serve_refuses_bad_environment_and_one_file_for_all() -> None:
    done = run("serve", environment={"DRYSTONE_PORT": "x"})
    assert done.exit_code == 2
    assert "DRYSTONE_PORT" in done.stderr
    done = run("serve", environment={"DRYSTONE_CONFIG": "any.toml"})
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "one file is of one process" in done.stderr


def test_check_tells_its_plan_and_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    options = local_options.GateOptions()
    assert gate._plan(options, "tiny", 50) == (
        "checking model tiny: 50 prompts in float32 block, bfloat16; about 25 minutes on two cores: "
        "roughly 15 s a prompt and type"
    )
    assert "about 1 minute on" in gate._plan(replace(options, dtypes=("float32",)), "tiny", 2)
    assert len(list(gate._progress(gate.read_prompts(None, 12), "float32"))) == 12
    assert capsys.readouterr().err.splitlines() == [f"float32: {done} of 12 prompts" for done in (5, 10, 12)]


@pytest.mark.parametrize("command", ["serve", "check"])
def test_missing_server_packages_exit_with_3(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(cli_console, "SERVER_PACKAGES", ("no_such_package.__main__",))
    done = run(command)
    assert done.exit_code == 3
    assert "pip install 'drystone-server[worker]'" in done.stderr


def test_version() -> None:
    done = run("--version")
    assert (done.exit_code, done.stdout.split()[0]) == (0, "drystone")


def test_wrong_usage_exits_with_2() -> None:
    assert run("ask").exit_code == 2
    assert run("serve", "--decode", 0).exit_code == 2
    assert run("nothing").exit_code == 2


@pytest.mark.parametrize("command", ["ask", "status", "serve", "check"])
def test_help_has_examples_and_exit_codes(command: str) -> None:
    said = run(command, "--help").output
    assert "Examples:" in said
    assert "Exit codes:" in said
    assert f"drystone {command}" in said


def test_threads_are_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert local_options.ServeOptions(prefill=1, decode=2).threads_per_worker == 2
    assert local_options.ServeOptions(prefill=8, decode=8).threads_per_worker == 1
    assert local_options.ServeOptions(threads=3).threads_per_worker == 3


def test_the_command_as_users_run_it(gateway: CannedGateway, document: Path) -> None:
    command = [sys.executable, "-m", "drystone.cli", "ask", "-s", gateway.address, "-d", str(document)]
    gateway.text = "Gravité "
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, "Why?"], capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, b"Gravit? holds it.\n")
    done = subprocess.run([*command, b"caf\xe9"], capture_output=True, check=False)
    assert done.returncode == 2
    assert b"not UTF-8" in done.stderr
