"""Settings: flag over environment over file over default, and bad ones said in one line each."""

from __future__ import annotations

from pathlib import Path

import pytest

from decode_worker.settings import DecodeSettings
from gateway.settings import GatewaySettings
from prefill_worker.settings import PrefillSettings
from shared.settings import CONFIG_ENVIRONMENT, ProcessSettings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that what a command line puts there is undone too.
    monkeypatch.setenv(CONFIG_ENVIRONMENT, "")
    monkeypatch.delenv(CONFIG_ENVIRONMENT)


def read(*flags: str) -> DecodeSettings:
    return DecodeSettings.from_command_line("decode", flags)


def test_flag_over_environment_over_file_over_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (read().port, read().max_waiting) == (0, 256)
    file = tmp_path / "decode.toml"
    file.write_text("port = 1\nmax_waiting = 2\npool_bytes = 3000000\n")
    monkeypatch.setenv(CONFIG_ENVIRONMENT, str(file))
    assert (read().port, read().max_waiting, read().pool_bytes) == (1, 2, 3_000_000)
    monkeypatch.setenv("DRYSTONE_PORT", "4")
    monkeypatch.setenv("DRYSTONE_MAX_WAITING", "5")
    assert (read().port, read().max_waiting, read().pool_bytes) == (4, 5, 3_000_000)
    settings = read("--port", "6")
    assert (settings.port, settings.max_waiting, settings.pool_bytes) == (6, 5, 3_000_000)


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_a_file_named_by_flag(tmp_path: Path, form: list[str]) -> None:
    file = tmp_path / "any.toml"
    file.write_text('worker_id = "w"\n')
    assert read(*(part.format(file) for part in form), "--port=9").worker_id == "w"


def test_lists_and_switches() -> None:
    settings = GatewaySettings.from_command_line(
        "gateway", ["--decode-workers", "a:1, b:2,", "--block-attention-prefix", "--prefill-workers="]
    )
    assert settings.decode_workers == ["a:1", "b:2"]
    assert settings.prefill_workers == []
    assert settings.block_attention_prefix
    assert not GatewaySettings.from_command_line("gateway", ["--no-block-attention-prefix"]).block_attention_prefix


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "x"], "--port: "),
        (["--port", "65536"], "--port: "),
        (["--pool-bytes", "5"], "--pool-bytes: "),
        (["--dtype", "int8"], "--dtype: "),
        (["--worker-id", ""], "--worker-id: "),
        (["--levitate"], "--levitate"),
        (["--config", "/nonexistent.toml"], "--config: no such file: /nonexistent.toml"),
        (["--config"], "--config"),
    ],
    ids=str,
)
def test_a_bad_flag_exits_with_2_and_says_which(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        read(*flags)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_every_bad_value_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRYSTONE_DRAIN_SECONDS", "-1")
    with pytest.raises(SystemExit):
        read("--port", "70000", "--threads", "-3")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert any("--drain-seconds" in line and "-1" in line for line in lines)


@pytest.mark.parametrize("content", ["porter = 1\n", "port = \n", "port = 'x'\n"])
def test_a_bad_file_exits_with_2(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(content)
    with pytest.raises(SystemExit) as caught:
        read("--config", str(file))
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("decode: ")


def test_the_environment_of_another_role_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRYSTONE_RAM_BYTES", "123")
    monkeypatch.setenv("DRYSTONE_POOL_BYTES", "2000000")
    assert PrefillSettings.from_command_line("prefill", []).ram_bytes == 123
    assert read().pool_bytes == 2_000_000
    assert GatewaySettings.from_command_line("gateway", []).port == 0


@pytest.mark.parametrize("settings", [ProcessSettings, DecodeSettings, PrefillSettings, GatewaySettings])
def test_every_setting_is_described_and_frozen(settings: type[ProcessSettings]) -> None:
    for name, field in settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
    made = settings()
    with pytest.raises(ValueError, match="frozen"):
        made.port = 5  # type: ignore[misc] # passed on as it came


@pytest.mark.parametrize("settings", [DecodeSettings, PrefillSettings, GatewaySettings])
def test_help_names_every_flag(settings: type[ProcessSettings], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        settings.from_command_line("python -m it", ["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for name in settings.model_fields:
        assert f"--{name.replace('_', '-')}" in said
