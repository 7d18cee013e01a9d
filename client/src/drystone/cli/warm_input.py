"""What `drystone warm` reads: files, folders, and JSON Lines, one document after another.

Nothing is kept but where a document came from: a corpus may be larger than memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Protocol

from drystone import Document
from drystone.cli.documents import DocumentFileError, read_document

DEFAULT_GLOBS: Final = ("*.txt", "*.md")


@dataclass(frozen=True, slots=True)
class Found:
    """One document of the input, or why there is none; `source` is a file, or a file and a line."""

    source: str
    document: Document | None = None
    error: str = ""


class WarmInput(Protocol):
    """Documents to warm. `units_total` counts files or lines where that can be known before they are read."""

    units_total: int | None

    def units(self) -> Iterator[Iterable[Found]]:
        """The documents of each file or line, in order. Iterate once."""


class FilesInput:
    """Files as they are, and the files of folders, at any depth, whose names match one of the patterns.

    Hidden files and folders are left out. The order is that of names, so that it is the same every time.
    """

    def __init__(self, paths: Iterable[Path], globs: Iterable[str]) -> None:
        self._paths = tuple(paths)
        self._globs = tuple(globs)
        self.units_total: int | None = sum(1 for _ in self._files())

    def units(self) -> Iterator[Iterable[Found]]:
        """One document, or one error, for each file."""
        for path in self._files():
            try:
                yield (Found(str(path), read_document(path)),)
            except DocumentFileError as error:
                yield (Found(str(path), error=str(error).removeprefix(f"{path}: ")),)

    def _files(self) -> Iterator[Path]:
        for path in self._paths:
            if path.is_dir():
                yield from _below(path, self._globs)
            else:
                yield path


class LinesInput:
    """JSON Lines, each {"title", "text"} or {"documents": [{"title", "text"}, …]} with anything beside them.

    Args:
        name: What to call it in sources: "name:line".
        lines: The lines as bytes, read once. The caller closes it.
        units_total: How many there are, when that is known.
    """

    def __init__(self, name: str, lines: IO[bytes], units_total: int | None = None) -> None:
        self._name = name
        self._lines = lines
        self.units_total = units_total

    def units(self) -> Iterator[Iterable[Found]]:
        """The documents of each line; a line that cannot be used is one error."""
        for number, line in enumerate(self._lines, start=1):
            if line.strip():
                yield _on_line(f"{self._name}:{number}", line)
            else:
                yield ()


def count_lines(path: Path) -> int | None:
    """Lines of a regular file; None for a pipe, which can be read only once."""
    if not path.is_file():
        return None
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


def _below(folder: Path, globs: tuple[str, ...]) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        # In place: this is where the walk goes on, and in which order.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(where, name)
            if not name.startswith(".") and any(path.relative_to(folder).match(glob) for glob in globs):
                yield path


def _on_line(source: str, line: bytes) -> list[Found]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return [Found(source, error=f"not JSON: {error}")]
    if not isinstance(value, dict):
        return [Found(source, error="not a JSON object")]
    documents = value.get("documents")
    if documents is None:
        return [_document(source, value)]
    if not isinstance(documents, list):
        return [Found(source, error='"documents" is not a list')]
    return [_document(f"{source} documents[{index}]", document) for index, document in enumerate(documents)]


def _document(source: str, value: object) -> Found:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        return Found(source, error="not a JSON object")
    title, text = value.get("title") or "", value.get("text")
    if not isinstance(title, str):
        return Found(source, error='"title" is not a string')
    if not isinstance(text, str) or not text.strip():
        return Found(source, error='no text: "text" must be a string with something in it')
    return Found(source, Document(title, text))
