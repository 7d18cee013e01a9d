"""`drystone blocks` against a canned gateway."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner, Result

from drystone.cli import blocks as blocks_command
from drystone.cli import build_app
from drystone.cli import ttl as times
from tests.client.canned_blocks import Stored

if TYPE_CHECKING:
    from tests.client.canned_gateway import CannedGateway

KEYS = ["aa" + "1" * 62, "aa" + "2" * 62, "b" * 64, "c" * 64]


@pytest.fixture
def stocked(gateway: CannedGateway) -> CannedGateway:
    for number, key in enumerate(KEYS):
        tags = ["[red]walls"] if number < 2 else ["roofs"]
        gateway.stored[key] = Stored(number + 1, "acme" if number == 3 else "", tags, 7200, pinned=number == 1)
    return gateway


def run(gateway: CannedGateway, *arguments: object, said: str | None = None) -> Result:
    command = ["blocks", *map(str, arguments), "--server", gateway.address]
    return CliRunner().invoke(build_app(), command, input=said)


def test_ls_is_a_table(stocked: CannedGateway) -> None:
    done = run(stocked, "ls")
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert lines[0].split() == ["key", "tokens", "bytes", "where", "hits", "idle", "pinned", "ttl", "tags", "tenant"]
    rows = [line.split() for line in lines[2:]]
    first = "aa1111111111… 1 100 B prefill-0 (disk) 2 1.51 m 2 h [red]walls"
    assert " ".join(rows[0]) == first
    assert "yes" in rows[1]
    assert rows[3][-1] == "acme"
    assert done.stderr == ""


def test_ls_chooses_and_says_when_there_is_more(stocked: CannedGateway) -> None:
    done = run(stocked, "ls", "AA", "--tag", "[red]walls", "--limit", 1)
    assert done.stdout.count("…") == 1
    assert "more than 1" in done.stderr
    sent = stocked.selectors[0]
    assert (sent.key_prefix, list(sent.tags)) == ("aa", ["[red]walls"])
    listed = json.loads(run(stocked, "ls", "--tenant", "acme", "--json").stdout)
    assert [block["key"] for block in listed["blocks"]] == KEYS[3:]
    assert listed["more"] is False
    block = listed["blocks"][0]
    assert (block["bytes"], block["ttl_seconds"], block["locations"][0]["source"]) == (400, 7200, "prefill_disk")
    assert len(json.loads(run(stocked, "ls", "--limit", 0, "--json").stdout)["blocks"]) == 4


def test_show_takes_a_beginning_that_is_unique(stocked: CannedGateway) -> None:
    done = run(stocked, "show", "aa1")
    assert done.exit_code == 0, done.output
    for said in (KEYS[0], "100 B", "[red]walls", "prefill-0, prefill disk", "stays valid"):
        assert said in done.stdout
    assert json.loads(run(stocked, "show", KEYS[2].upper(), "--json").stdout)["tokens"] == 3
    # As `ls` shows it.
    assert KEYS[2] in run(stocked, "show", "bbbbbbbbbbbb…").stdout


@pytest.mark.parametrize(
    ("key", "code", "said"),
    [
        ("aa", 2, "several keys, such as aa111"),
        ("d", 1, "no block whose key is or begins with d"),
        ("walls", 2, "hexadecimal"),
        ("a" * 65, 2, "at most 64"),
        ("", 2, "empty KEY"),
    ],
)
def test_keys_that_name_no_single_block(stocked: CannedGateway, key: str, code: int, said: str) -> None:
    for command in (["show"], ["pin"], ["rm", "--yes"]):
        done = run(stocked, *command, key)
        assert (done.exit_code, done.stdout) == (code, "")
        assert said in done.stderr
    assert len(stocked.stored) == 4


def test_an_empty_key_is_not_the_only_block(stocked: CannedGateway) -> None:
    del stocked.stored[KEYS[0]], stocked.stored[KEYS[1]], stocked.stored[KEYS[2]]
    assert run(stocked, "rm", "--yes", "").exit_code == 2
    assert len(stocked.stored) == 1


def test_pin_and_unpin_say_how_many_changed(stocked: CannedGateway) -> None:
    assert run(stocked, "pin", "--tag", "[red]walls").stdout == "pinned 1 block\n"
    assert run(stocked, "pin", "b", KEYS[3]).stdout == "pinned 2 blocks\n"
    assert list(stocked.selectors[-1].block_keys) == KEYS[2:]
    assert run(stocked, "unpin", "--prefix", "AA", "--json").stdout == '{"blocks_changed": 2}\n'
    assert [block.pinned for block in stocked.stored.values()] == [False, False, True, True]


def test_pinning_everything_is_a_slip(stocked: CannedGateway) -> None:
    for command in ("pin", "unpin"):
        done = run(stocked, command)
        assert done.exit_code == 2
        assert "say which blocks" in done.stderr
    assert not stocked.selectors


def test_rm_needs_yes_where_nobody_can_be_asked(stocked: CannedGateway) -> None:
    done = run(stocked, "rm", "--tag", "roofs")
    assert done.exit_code == 2
    assert "--yes" in done.stderr
    assert len(stocked.stored) == 4
    done = run(stocked, "rm", "--tag", "roofs", "-y")
    assert (done.exit_code, done.stdout) == (0, "deleted 2 blocks, 700 B freed\n")
    assert list(stocked.stored) == KEYS[:2]
    assert json.loads(run(stocked, "rm", "aa1", "--yes", "--json").stdout) == {"blocks": 1, "bytes_freed": 100}


def test_rm_asks_with_the_count(stocked: CannedGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_command, "_on_a_terminal", lambda: True)
    done = run(stocked, "rm", "--prefix", "aa", said="n\n")
    assert done.exit_code == 1
    assert "Delete 2 blocks?" in done.stderr
    assert "nothing was deleted" in done.stderr
    assert len(stocked.stored) == 4
    assert run(stocked, "rm", "--prefix", "aa", said="y\n").exit_code == 0
    assert list(stocked.stored) == KEYS[2:]


def test_rm_of_everything_is_the_servers_refusal(stocked: CannedGateway) -> None:
    done = run(stocked, "rm", "--yes")
    assert done.exit_code == 1
    assert "this selects every block [INVALID_FIELD]" in done.stderr
    assert len(stocked.stored) == 4


def test_no_server_exits_with_4(closed_port: int) -> None:
    for command in (["ls"], ["show", "aa"], ["pin", "aa"], ["rm", "--yes", "aa"]):
        done = CliRunner().invoke(build_app(), ["blocks", *command, "-s", f"127.0.0.1:{closed_port}"])
        assert done.exit_code == 4


@pytest.mark.parametrize("command", ["ls", "show", "pin", "unpin", "rm"])
def test_help_has_examples_and_exit_codes(gateway: CannedGateway, command: str) -> None:
    said = run(gateway, command, "-h").output
    assert "Examples:" in said
    assert "Exit codes:" in said
    assert f"drystone blocks {command}" in said


@pytest.mark.parametrize(
    ("text", "seconds"), [("45", 45), ("45s", 45), ("30m", 1800), ("12h", 43_200), (" 7d ", 604_800)]
)
def test_times_to_live(text: str, seconds: int) -> None:
    assert times.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0d", "-1", "7w", "1.5h", "d", "٣"])
def test_what_is_no_time_to_live(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time to live"):
        times.seconds(text)


def test_times_are_shown_in_the_largest_unit() -> None:
    assert [times.shown(count) for count in (0.5, 59, 90, 7200, 86_400 * 30)] == [
        "0.5 s",
        "59 s",
        "1.5 m",
        "2 h",
        "30 d",
    ]
