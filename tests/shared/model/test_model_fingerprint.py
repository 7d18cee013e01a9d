"""A fingerprint follows weights and config, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shared.model import ModelError
from shared.model.fingerprint import FINGERPRINT_BYTES, fingerprint
from tests.support.tiny_models import make_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny("llama-default", tmp_path / "model")


def _edit(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(dict(reversed({**config, **values}.items()))), encoding="utf-8")


def test_a_copy_elsewhere_has_the_same_fingerprint(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert len(fingerprint(folder)) == FINGERPRINT_BYTES
    assert fingerprint(copy) == fingerprint(folder)


def test_volatile_keys_and_key_order_do_not_matter(folder: Path) -> None:
    before = fingerprint(folder)
    _edit(folder, transformers_version="9.9", _name_or_path="/elsewhere", dtype="bfloat16", torch_dtype="float16")
    assert fingerprint(folder) == before


def test_a_config_value_matters(folder: Path) -> None:
    before = fingerprint(folder)
    _edit(folder, rope_parameters={"rope_type": "default", "rope_theta": 10001.0})
    assert fingerprint(folder) != before


def test_one_bit_of_the_weights_matters(folder: Path) -> None:
    before = fingerprint(folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint(folder) != before


def test_moving_bytes_between_files_matters(tmp_path: Path) -> None:
    digests = set()
    for parts in (("ab", "c"), ("a", "bc")):
        (tmp_path / "config.json").write_text("{}", encoding="utf-8")
        for name, content in zip("xy", parts, strict=True):
            (tmp_path / f"{name}.safetensors").write_text(content, encoding="utf-8")
        digests.add(fingerprint(tmp_path))
    assert len(digests) == 2


def test_a_folder_without_weights_or_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="not JSON"):
        fingerprint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        fingerprint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        fingerprint(folder)
