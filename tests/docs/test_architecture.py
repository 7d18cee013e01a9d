"""The borders between packages, and what product code never does."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "client" / "src" / "drystone"
SERVICES = ("gateway", "prefill_worker", "decode_worker")
UNPICKLERS = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"})
HEAVY = frozenset({"torch", "transformers", "numpy", "safetensors", "gguf"})


def _modules(package: Path) -> list[Path]:
    found = [path for path in package.rglob("*.py") if "_pb2" not in path.name]
    assert found, package
    return found


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, inside functions too."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def _imported_tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in _imports(path)}


PRODUCT = [path for package in (*SERVICES, "shared") for path in _modules(ROOT / package)] + _modules(CLIENT)


@pytest.mark.parametrize("service", SERVICES)
def test_services_do_not_import_each_other(service: str) -> None:
    others = set(SERVICES) - {service}
    for path in _modules(ROOT / service):
        assert not _imported_tops(path) & others, path


def test_shared_imports_no_service() -> None:
    for path in _modules(ROOT / "shared"):
        assert not _imported_tops(path) & set(SERVICES), path


def test_the_client_needs_the_server_only_in_local() -> None:
    servers = {*SERVICES, "shared"}
    for path in _modules(CLIENT):
        if "local" not in path.relative_to(CLIENT).parts:
            assert not _imported_tops(path) & (HEAVY | servers), path


def test_public_stubs_never_name_internal_ones() -> None:
    for path in (CLIENT / "v1").glob("*.py"):
        assert "drystone.internal" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    "module", ["drystone", "drystone.cli", "gateway.app", "gateway.__main__", "decode_worker.__main__"]
)
def test_import_leaves_torch_out(module: str) -> None:
    script = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False"]


def test_no_code_comes_from_data() -> None:
    for path in PRODUCT:
        assert not _imported_tops(path) & UNPICKLERS, path
        for node in ast.walk(_tree(path)):
            if not isinstance(node, ast.Call):
                continue
            where = f"{path}:{node.lineno}"
            assert not (isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec", "compile"}), where
            called = ast.unparse(node.func)
            assert called not in {"torch.load", "yaml.load", "os.system", "numpy.load"}, where
            assert not called.endswith("_pyobj"), where  # ZeroMQ's own pickles
            for keyword in node.keywords:
                assert keyword.arg not in {"trust_remote_code", "shell", "allow_pickle"}, where


def test_nothing_trusts_remote_code_by_name() -> None:
    for path in PRODUCT:
        assert "trust_remote_code" not in path.read_text(encoding="utf-8"), path


def test_product_code_does_not_assert() -> None:
    """`python -O` takes asserts away, so they check nothing that matters."""
    for path in PRODUCT:
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(_tree(path))), path
