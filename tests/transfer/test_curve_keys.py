"""Key files: made, read by other tools, refused where they cannot be trusted, and never shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import structlog
import zmq
import zmq.auth
from hypothesis import given
from hypothesis import strategies as st

from shared.transfer.keys import (
    AllowedKeys,
    KeyFileError,
    KeyPair,
    is_key,
    load_key_pair,
    load_public_key,
    make_key_file,
    public_file,
)


def write(file: Path, text: str, mode: int = 0o600) -> Path:
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)
    return file


def public() -> str:
    """A key that may stand in a file of allowed keys."""
    while True:
        key = zmq.curve_keypair()[0].decode()
        if not key.startswith("#"):
            return key


def test_a_new_pair_is_read_back_by_us_and_by_zeromqs_own_tools(tmp_path: Path) -> None:
    file = tmp_path / "prefill-0.key"
    pair = make_key_file(file, "prefill-0")
    assert load_key_pair(file) == pair
    assert (file.stat().st_mode & 0o777, pair.name) == (0o600, "prefill-0")
    assert zmq.auth.load_certificate(file) == (pair.public.encode(), pair.secret.encode())
    assert zmq.auth.load_certificate(public_file(file)) == (pair.public.encode(), None)
    assert pair.secret not in public_file(file).read_text()
    assert load_public_key(file) == load_public_key(public_file(file))


def test_a_mask_that_hides_nothing_does_not_open_the_secret(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        make_key_file(tmp_path / "w.key")
    finally:
        os.umask(mask)
    assert (tmp_path / "w.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("there", ["w.key", "w.key.pub"])
def test_keys_are_never_written_over(there: str, tmp_path: Path) -> None:
    write(tmp_path / there, "mine")
    with pytest.raises(KeyFileError, match="never written over"):
        make_key_file(tmp_path / "w.key")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(there, "mine")]


def test_a_public_half_that_cannot_be_written_leaves_no_secret_behind(tmp_path: Path) -> None:
    file = tmp_path / "w.key"
    public_file(file).symlink_to(tmp_path / "nowhere" / "w")  # exists() follows it and sees nothing
    with pytest.raises(OSError, match="exists"):
        make_key_file(file)
    assert not file.exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o677])
def test_a_secret_that_others_can_reach_is_refused(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "w.key"
    pair = make_key_file(file)
    file.chmod(mode)
    with pytest.raises(KeyFileError, match=f"mode {mode:04o} .*chmod 600 {file}") as caught:
        load_key_pair(file)
    assert pair.secret not in str(caught.value)


GOOD = f'public-key = "{public()}"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no public-key"),
        ("# nothing\n", "no public-key"),
        (GOOD, "no secret-key: name the file that"),
        (f'{GOOD}secret-key = "short-and-secret"\n', "line 2: secret-key is no key"),
        (f'{GOOD}secret-key = "{"é" * 40}"\n', "line 2: secret-key is no key"),
        (f'public-key = "{"x" * 39}"\n', "line 1: public-key is no key"),
        (f"{GOOD}curve\nwhat is this\n", "line 3: no `name = value`"),
        (f'{GOOD}secret-key = "{zmq.curve_keypair()[1].decode()}"\n', "does not belong to secret-key"),
    ],
)
def test_what_is_wrong_is_said_by_line_and_without_the_secret(text: str, said: str, tmp_path: Path) -> None:
    file = write(tmp_path / "w.key", text)
    with pytest.raises(KeyFileError, match=said) as caught:
        load_key_pair(file)
    assert str(file) in str(caught.value)
    secrets = [line.split('"')[1] for line in text.splitlines() if line.startswith("secret-key")]
    assert not any(secret in str(caught.value) for secret in secrets)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        load_key_pair(tmp_path / "none")
    with pytest.raises(KeyFileError, match="Is a directory"):
        AllowedKeys(tmp_path)
    (tmp_path / "raw").write_bytes(b"\xff\xfe")
    (tmp_path / "raw").chmod(0o600)
    with pytest.raises(KeyFileError, match="not UTF-8"):
        load_key_pair(tmp_path / "raw")
    write(tmp_path / "big", "#" * (2 << 20))
    with pytest.raises(KeyFileError, match="larger than"):
        load_key_pair(tmp_path / "big")


@given(raw=st.binary(max_size=300))
def test_no_bytes_are_a_key_file_by_chance(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.key"
    file.write_bytes(raw)
    file.chmod(0o600)
    for load in (load_key_pair, load_public_key, AllowedKeys):
        with pytest.raises(KeyFileError):
            load(file)


def test_a_secret_is_in_no_repr() -> None:
    assert "hidden" not in repr(KeyPair("open", "hidden"))


def test_allowed_keys_have_names_and_comments(tmp_path: Path) -> None:
    one, other = public(), public()
    allowed = AllowedKeys(write(tmp_path / "allowed", f"# who may\n\n{one}\tprefill 0\n  {other}  \n"))
    assert (allowed.name(one), allowed.name(other), allowed.name(public())) == ("prefill 0", "", None)
    assert len(allowed) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [("# nobody\n", "allows nobody"), (f"{'x' * 41} w\n", "line 1: no public key"), (f"#\n\n{GOOD}", "line 3")],
)
def test_a_file_that_allows_nobody_or_has_no_keys_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=said):
        AllowedKeys(write(tmp_path / "allowed", text))


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_says_nothing_about_trust(mode: int, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="chmod go-w"):
        AllowedKeys(write(tmp_path / "allowed", f"{public()}\n", mode))


def test_a_file_that_changes_is_read_anew_and_a_broken_one_is_not(tmp_path: Path) -> None:
    one, other = public(), public()
    file = write(tmp_path / "allowed", f"{one} first\n")
    allowed = AllowedKeys(file)
    with structlog.testing.capture_logs() as lines:
        write(file, f"{one} first\n{other} second\n")
        assert (allowed.name(one), allowed.name(other)) == ("first", "second")
        write(file, f"{other} second\n")
        assert (allowed.name(one), allowed.name(other)) == (None, "second")
        write(file, "rubbish\n")
        assert (allowed.name(one), allowed.name(other)) == (None, "second")
        file.unlink()
        assert allowed.name(other) == "second"
        assert allowed.name(other) == "second"
    wrong = [line for line in lines if line["log_level"] == "error"]
    assert [line["event"] for line in wrong] == ["allowed_keys_unchanged"] * 2  # once a version
    write(file, f"{one}\n")
    assert (allowed.name(one), allowed.name(other)) == ("", None)


def test_what_is_drawn_is_a_key() -> None:
    assert all(is_key(part.decode()) for part in zmq.curve_keypair())
    assert not is_key("x" * 39 + "\n")
