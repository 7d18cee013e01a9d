"""Loading a model: weights stay mapped to their file, and whoever waits hears how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.engine import served_model
from shared.engine.loading import read_ahead
from shared.engine.served_model import ServedModel
from shared.model import ModelError


def mapped_file(model: ServedModel) -> str:
    """The file that a weight's memory is mapped to; empty for memory of the process's own."""
    address = model.module.model.layers[0].mlp.up_proj.weight.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        run, _, rest = line.partition(" ")
        begin, end = (int(part, 16) for part in run.split("-"))
        if begin <= address < end:
            return rest[rest.index("/") :] if "/" in rest else ""
    raise AssertionError("no mapping holds the weight")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("dtype", "mapped"), [("float32", True), ("bfloat16", False)])
def test_weights_of_the_files_own_type_stay_in_the_page_cache(
    tiny_folder: Callable[..., Path], dtype: str, *, mapped: bool
) -> None:
    file = mapped_file(served_model.load(tiny_folder(), name="tiny", dtype=dtype))
    assert file.endswith(".safetensors") is mapped


def test_progress_rises_to_one(tiny_folder: Callable[..., Path]) -> None:
    heard: list[float] = []
    served_model.load(tiny_folder(), name="tiny", dtype="float32", progress=heard.append)
    assert heard == sorted(heard)
    assert heard[0] > 0
    assert heard[-1] == 1


def test_reading_ahead_counts_every_byte(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "empty")]
    for file, size in zip(files, (17 << 20, 3, 0), strict=True):
        file.write_bytes(bytes(size))
    heard: list[float] = []
    assert read_ahead(files, heard.append) == (17 << 20) + 3
    assert heard[-1] == pytest.approx(0.9)
    assert read_ahead([]) == 0


def test_weights_that_cannot_be_read_are_named(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    for file in tiny_folder().iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        served_model.load(tmp_path, name="tiny", dtype="float32")
