"""Files as documents: a Markdown title or the file's name, and the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drystone import Document

if TYPE_CHECKING:
    from pathlib import Path

_TITLE_MARK = "# "


class DocumentFileError(Exception):
    """A file cannot be used as a document; the message names the file and the reason."""


def read_document(path: Path) -> Document:
    """One file as a document.

    A first line that begins with "# " is the title and no part of the text; otherwise the title is the
    file's name without its ending.

    Raises:
        DocumentFileError: When it is missing, a directory, unreadable, not UTF-8, or without content.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DocumentFileError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise DocumentFileError(f"{path}: is a directory; give files, each with -d") from error
    except OSError as error:
        raise DocumentFileError(f"{path}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentFileError(f"{path}: not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x})") from error
    first, _, rest = text.partition("\n")
    if first.startswith(_TITLE_MARK):
        title, text, nothing = first.removeprefix(_TITLE_MARK).strip(), rest.strip(), "a title and no text"
    else:
        title, text, nothing = path.stem, text.strip(), "no text in it"
    if not text:
        raise DocumentFileError(f"{path}: {nothing}")
    return Document(title=title, text=text)
