"""Tables in docs say what the code says."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from runpy import run_path

import pytest

from shared.errors import REASONS, Reason
from shared.status import FIGURES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TABLES = run_path(str(DOCS / "tables.py"))
PROJECTS = {"drystone-server": ROOT / "pyproject.toml", "drystone": ROOT / "client" / "pyproject.toml"}


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_tables_are_fresh(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert TABLES["rewritten"](text, TABLES["tables"]()) == text, f"docs/{page} is stale; run `make docs`"


def test_every_table_stands_in_a_page() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    marked = re.findall(r"<!-- table ([a-z-]+) -->", pages)
    assert sorted(marked) == sorted(TABLES["tables"]())


def test_tables_have_a_row_for_every_reason_and_figure() -> None:
    tables = TABLES["tables"]()
    assert re.findall(r"^\| `([A-Z0-9_]+)`", tables["errors"], re.MULTILINE) == [str(reason) for reason in Reason]
    assert set(REASONS) == set(Reason)
    assert re.findall(r"^\| `([a-z_]+)`", tables["status"], re.MULTILINE) == list(FIGURES)


def test_a_stale_table_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "status.md").write_text("<!-- table status -->\nold\n<!-- end -->\n", encoding="utf-8")
    fresh = run_path(str(DOCS / "tables.py"))
    monkeypatch.setitem(fresh["main"].__globals__, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert fresh["main"]() == 1
    assert "stale: docs/status.md" in capsys.readouterr().err
    assert "old" in (tmp_path / "status.md").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    assert fresh["main"]() == 0
    assert "`num_requests_running`" in (tmp_path / "status.md").read_text(encoding="utf-8")


def test_every_dependency_has_its_reason() -> None:
    wanted = set()
    for path in PROJECTS.values():
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        groups = [project["dependencies"], *project.get("optional-dependencies", {}).values()]
        wanted |= {re.split(r"[\[<>=;! ]", requirement)[0] for group in groups for requirement in group}
    page = (DOCS / "dependencies.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == wanted
