"""Key files of workers, for the command. Needs the worker packages when it is used, not before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class KeysError(Exception):
    """A key file cannot be made or read; the message says why."""


@dataclass(frozen=True, slots=True)
class ShownKey:
    """What may be shown of a key file.

    Attributes:
        file: The file.
        public_file: Its public half.
        public_key: In Z85, 40 characters.
        name: For people; may be empty.
    """

    file: Path
    public_file: Path
    public_key: str
    name: str


def new(file: Path, name: str) -> ShownKey:
    """Makes a key file and its public half. Raises KeysError."""
    from shared.transfer.keys import KeyFileError, make_key_file, public_file

    try:
        pair = make_key_file(file, name)
    except KeyFileError as error:
        raise KeysError(str(error)) from error
    except OSError as error:
        raise KeysError(f"{error.filename or file}: {error.strerror}") from error
    return ShownKey(file, public_file(file), pair.public, pair.name)


def show(file: Path) -> ShownKey:
    """The public key of a key file, or of its public half. Raises KeysError."""
    from shared.transfer.keys import KeyFileError, load_public_key, public_file

    try:
        key = load_public_key(file)
    except KeyFileError as error:
        raise KeysError(str(error)) from error
    return ShownKey(file, public_file(file), key.key, key.name)
