"""Names of models, and folders that are refused with a reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shared.model import ModelError
from shared.model.catalog import DEFAULT, cache_dir, check_folder, display_name, resolve_model
from tests.support.tiny_models import make_tiny


def test_display_names_hold_no_server_path(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert display_name(DEFAULT) == "SmolLM2-135M-Instruct"
    assert display_name(str(folder)) == "my-model"
    assert display_name(f"{folder}/") == "my-model"
    assert display_name("/models/Qwen3-0.6B-Q8_0.gguf") == "Qwen3-0.6B-Q8_0"
    assert display_name("hxia7/Qwen3-8B-block-FT") == "hxia7/Qwen3-8B-block-FT"


def test_cache_dir_prefers_its_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRYSTONE_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("DRYSTONE_CACHE")
    assert cache_dir() == Path("/b/drystone")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "drystone"


def test_a_whole_folder_is_itself(tmp_path: Path) -> None:
    folder = make_tiny("llama-default", tmp_path / "m")
    assert resolve_model(str(folder), print) == folder


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_something_is_refused(tmp_path: Path, absent: str) -> None:
    for name in {"config.json", "model.safetensors", "tokenizer.json"} - {absent}:
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=absent.removesuffix(".json").split(".")[-1]):
        check_folder(tmp_path)


def test_pickled_weights_are_named_as_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="pickles"):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "~/no/model", "a/b/c", "no such model"])
def test_a_path_that_is_not_there_is_not_sought_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="No model folder"):
        resolve_model(name, print)


def test_a_gguf_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match="No GGUF file"):
        resolve_model("/nowhere/model.gguf", print)


def test_a_hub_model_offline_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "import sys; from shared.model.catalog import ModelError, resolve_model\n"
        "try: resolve_model('nobody/nothing', print)\n"
        "except ModelError as error: sys.exit(f'refused: {error}')\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ".", "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert "refused: nobody/nothing is no local folder" in run.stderr
    assert "--model" in run.stderr


def test_importing_the_catalog_loads_no_model_library() -> None:
    code = "import sys, shared.model.catalog; sys.exit(bool({'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
