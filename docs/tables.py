"""Writes the tables that docs share with the code: `make docs` (or `python docs/tables.py`).

A table stands between `<!-- table NAME -->` and `<!-- end -->` and is never edited by hand. `--check` writes nothing
and fails when a table differs from what the code says.
"""
# ruff: noqa: INP001, T201 - a command line script

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from decode_worker.settings import DecodeSettings
from gateway.settings import GatewaySettings
from prefill_worker.settings import PrefillSettings
from shared.errors import REASONS
from shared.metrics import COUNTERS, HISTOGRAMS, PREFIX
from shared.settings import ProcessSettings, WorkerSettings
from shared.status import FIGURES

DOCS = Path(__file__).resolve().parent
_MARKED = re.compile(r"(<!-- table (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_BINARY = {1 << 10: "KiB", 1 << 20: "MiB", 1 << 30: "GiB"}
_BOUNDS = {"ge": "at least {}", "gt": "more than {}", "le": "at most {}"}


def tables() -> dict[str, str]:
    """Every table by name, as Markdown."""
    return {
        "errors": _errors(),
        "status": _markdown(("figure", "meaning"), ([f"`{name}`", text] for name, text in FIGURES.items())),
        "metrics": _markdown(
            ("histogram", "meaning"), ([f"`{PREFIX}{name}`", text] for name, text in HISTOGRAMS.items())
        ),
        "counters": _markdown(
            ("counter", "meaning"),
            ([f"`{PREFIX}{name}_total{{{label}}}`", text] for name, (text, label) in COUNTERS.items()),
        ),
        "settings-process": _settings(ProcessSettings, None),
        "settings-worker": _settings(WorkerSettings, ProcessSettings),
        "settings-gateway": _settings(GatewaySettings, ProcessSettings),
        "settings-prefill": _settings(PrefillSettings, WorkerSettings),
        "settings-decode": _settings(DecodeSettings, WorkerSettings),
    }


def rewritten(text: str, by_name: Mapping[str, str]) -> str:
    """A page with its tables replaced.

    Raises:
        KeyError: The page marks a table that is not known.
    """
    return _MARKED.sub(lambda found: f"{found[1]}{by_name[found['name']]}{found[3]}", text)


def _errors() -> str:
    rows = (
        [f"`{reason}`", f"`{row.status.name}`", "yes" if row.retryable else "no", row.meaning]
        for reason, row in REASONS.items()
    )
    return _markdown(("reason", "gRPC status", "retryable", "meaning"), rows)


def _settings(settings: type[ProcessSettings], base: type[ProcessSettings] | None) -> str:
    """Settings that `settings` has beyond `base`."""
    inherited = base.model_fields if base is not None else {}
    own = {name: field for name, field in settings.model_fields.items() if name not in inherited}
    rows = (
        [
            _flag(name, field),
            f"`DRYSTONE_{name.upper()}`",
            _default(name, field),
            _values(field),
            _meaning(field),
        ]
        for name, field in own.items()
    )
    return _markdown(("flag", "environment", "default", "values", "meaning"), rows)


def _flag(name: str, field: FieldInfo) -> str:
    flag = name.replace("_", "-")
    return f"`--{flag}`, `--no-{flag}`" if field.annotation is bool else f"`--{flag}`"


def _default(name: str, field: FieldInfo) -> str:
    if name == "worker_id":
        return "the host's name"
    value = field.get_default(call_default_factory=True)
    if value in (None, "", []):
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if name.endswith("_bytes"):
        unit = max((size for size in _BINARY if value % size == 0), default=0)
        return f"{value} ({value // unit} {_BINARY[unit]})" if unit else str(value)
    return f"{value:g}" if isinstance(value, float) else f"`{value}`" if isinstance(value, str) else str(value)


def _values(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    bounds = [
        words.format(getattr(limit, name))
        for limit in field.metadata
        for name, words in _BOUNDS.items()
        if hasattr(limit, name)
    ]
    return ", ".join(bounds)


def _meaning(field: FieldInfo) -> str:
    return (field.description or "").replace("'[", "`[").replace("]'", "]`").replace("'*'", "`*`")


def _markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when a table is stale; write nothing")
    check: Any = parser.parse_args().check
    by_name, stale = tables(), []
    for page in sorted(DOCS.glob("*.md")):
        old = page.read_text(encoding="utf-8")
        new = rewritten(old, by_name)
        if new == old:
            continue
        stale.append(page.name)
        if not check:
            page.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"stale: docs/{name} (run `make docs`)" if check else f"wrote docs/{name}", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
