"""What a process says of a settings file that it cannot use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gateway.settings import GatewaySettings
from shared.settings import CONFIG_ENVIRONMENT

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that what a command line puts there is undone too.
    monkeypatch.setenv(CONFIG_ENVIRONMENT, "")


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as caught:
        GatewaySettings.from_command_line("gateway", flags)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"bogus = 1", "unknown setting 'bogus'"),
        (b"port = ", "not TOML: "),
        (b"\xff", "not TOML: "),
        (b"port = 70000", "port: Input should be less than or equal to 65535 (given: 70000)"),
    ],
)
def test_a_bad_file_is_named(content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gateway.toml"
    file.write_bytes(content)
    assert f"gateway: {file}: {said}" in refused(capsys, "--config", str(file))


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(capsys, "--config=/none.toml") == "gateway: --config: no such file: /none.toml\n"
    monkeypatch.setenv(CONFIG_ENVIRONMENT, "/none.toml")
    assert refused(capsys) == "gateway: DRYSTONE_CONFIG: no such file: /none.toml\n"


def test_help_has_config_and_no_noise(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        GatewaySettings.from_command_line("gateway", ["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "--config FILE" in said
    assert "factory" not in said
    assert "default: None" not in said
