"""The package as users import and install it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import drystone

CLIENT = Path(__file__).parents[2] / "client"

EXPORTED = """
DEFAULT_ADDRESS Answer AsyncBlocks AsyncClient AsyncStream AsyncWarmStream Block BlockInfo BlockLocation BlockRole
BlockSelector BlockSource BlockStats Blocks CancelledError Chunking Client Completed ConnectError
DeadlineExceededError DeletedBlocks Document DrystoneError Event FinishReason GenerateOptions IncompatibleError
InternalError InvalidRequestError Message ModelInfo NotFoundError NotSupportedError OverloadedError PairStatus
ProcessStatus Routing Sample SampleFinished Started Stream Template TextDelta Timeouts Timings TokenLogprob TopLogprob
Truncation UnavailableError Usage WarmOptions WarmProgress WarmResult WarmStream WarmedDocument
"""


def test_exported_names_are_frozen() -> None:
    assert drystone.__all__ == EXPORTED.split()
    assert all(hasattr(drystone, name) for name in drystone.__all__)


def test_names_stand_in_order() -> None:
    assert drystone.__all__[1:] == sorted(drystone.__all__[1:])


def test_the_twins_have_the_same_verbs() -> None:
    def verbs(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert verbs(drystone.Client) == verbs(drystone.AsyncClient)
    assert verbs(drystone.Stream) - verbs(drystone.AsyncStream) == set()
    assert verbs(drystone.WarmStream) - verbs(drystone.AsyncWarmStream) == set()
    assert verbs(drystone.Blocks) == verbs(drystone.AsyncBlocks)


@pytest.mark.parametrize("module", ["drystone", "drystone.cli", "drystone.local.supervisor"])
def test_imports_bring_nothing_heavy(module: str) -> None:
    heavy = "torch transformers numpy gateway shared pydantic" + (" typer rich" if module == "drystone" else "")
    script = f"import sys, {module}; print(*(name for name in {heavy.split()} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_wheel_has_one_package_and_is_typed(tmp_path: Path) -> None:
    project = tomllib.loads((CLIENT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["src/drystone"]
    assert project["project"]["scripts"] == {"drystone": "drystone.cli:main"}
    assert (CLIENT / "src/drystone/py.typed").is_file()
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed: the wheel itself was not built")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=CLIENT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"drystone"}
    assert "drystone/py.typed" in names
