"""CURVE keys in files: a worker's own pair, and the public keys of those whom it trusts.

    prefill-0.key, mode 0600             prefill-0.key.pub                 allowed.keys
    # comments                           # comments                        # comments
    metadata                             metadata                          KEY prefill-0
        name = prefill-0                     name = prefill-0              KEY decode-0
    curve                                curve                             KEY
        public-key = "KEY"                   public-key = "KEY"
        secret-key = "KEY"

The first two are ZeroMQ certificates, as other tools read them. A key is 32 bytes in Z85: 40 characters. Nothing here
puts a secret into an error, a log or a `repr`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import zmq

from shared import logs

_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_MAX_FILE_BYTES = 1 << 20
_SECRET_MODE = 0o600
_SHOWN_CHARACTERS = 8


class KeyFileError(ValueError):
    """A key file that cannot be used; says which, where in it, and what to do. Never what a secret is."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A worker's own keys, in Z85."""

    public: str
    secret: str = field(repr=False)
    name: str = ""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Somebody's public key, in Z85."""

    key: str
    name: str = ""


def shown(key: str) -> str:
    """As much of a public key as logs have."""
    return key[:_SHOWN_CHARACTERS]


def is_key(text: str) -> bool:
    """True for 32 bytes in Z85."""
    return _Z85.fullmatch(text) is not None


def public_file(file: Path) -> Path:
    """Where the public half of a key file is."""
    return file.with_name(file.name + ".pub")


def make_key_file(file: Path, name: str = "") -> KeyPair:
    """Draws a pair; writes it to `file`, and its public half to `file`.pub.

    Raises:
        KeyFileError: One of them exists: a key in use is never written over; or the name has line breaks.
        OSError: They cannot be written.
    """
    if not name.isprintable():
        raise KeyFileError("a key's name is one line of printable characters")
    for one in (file, public_file(file)):
        if one.exists():
            raise KeyFileError(f"{one} exists; keys are never written over: choose another name, or remove it yourself")
    public, secret = zmq.curve_keypair()
    while public.startswith(b"#"):  # it would begin a comment in a file of allowed keys
        public, secret = zmq.curve_keypair()
    pair = KeyPair(public.decode(), secret.decode(), name)
    made = f"{datetime.now(UTC):%Y-%m-%d} by Drystone"
    head = f"metadata\n    name = {name}\ncurve\n" if name else "metadata\ncurve\n"
    head += f'    public-key = "{pair.public}"\n'
    private = f"# SECRET key of one worker, made {made}. For its eyes alone: keep the mode 0600, copy it nowhere.\n"
    public_text = f"# Public key of one worker, made {made}. Others list it in their files of allowed keys.\n{head}"
    _write_new(file, _SECRET_MODE, f'{private}{head}    secret-key = "{pair.secret}"\n')
    try:
        _write_new(public_file(file), 0o644, public_text)
    except BaseException:
        file.unlink()
        raise
    return pair


def load_key_pair(file: Path) -> KeyPair:
    """A worker's own keys.

    Raises:
        KeyFileError: It cannot be read, others can read it too, or it is no key file.
    """
    text, mode = _read(file)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise KeyFileError(
            f"{file} holds a secret key, and its mode {stat.S_IMODE(mode):04o} lets others at it: chmod 600 {file}"
        )
    values = _certificate(file, text)
    if "secret-key" not in values:
        raise KeyFileError(f"{file} has no secret-key: name the file that `drystone keys new` wrote, not its .pub")
    pair = KeyPair(values["public-key"], values["secret-key"], values.get("name", ""))
    if zmq.curve_public(pair.secret.encode()).decode() != pair.public:
        raise KeyFileError(f"{file}: public-key does not belong to secret-key")
    return pair


def load_public_key(file: Path) -> PublicKey:
    """The public half of a key file, be it the .pub or the secret one.

    Raises:
        KeyFileError: As `load_key_pair`.
    """
    text, _ = _read(file)
    if "secret-key" in text:
        pair = load_key_pair(file)
        return PublicKey(pair.public, pair.name)
    values = _certificate(file, text)
    return PublicKey(values["public-key"], values.get("name", ""))


class AllowedKeys:
    """Public keys of a file, read anew when it changes. For one thread.

    A version of the file that is broken changes nothing: those allowed before stay so, and the log says what is wrong.

    Args:
        file: One key a line, then perhaps a name; lines that begin with # are comments.

    Raises:
        KeyFileError: It cannot be read, or others may write it, or a line is no key, or there is none.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._version = _version(file)
        self._names = self._load()
        self._log = logs.get("keys")

    def __len__(self) -> int:
        return len(self._names)

    def name(self, key: str) -> str | None:
        """The name of an allowed key, perhaps empty; None when it is not allowed."""
        self._refresh()
        return self._names.get(key)

    def _refresh(self) -> None:
        version = _version(self.file)
        if version == self._version:
            return
        self._version = version
        try:
            names = self._load()
        except KeyFileError as error:
            self._log.error("allowed_keys_unchanged", detail=str(error), keys=len(self._names))
            return
        added, removed = len(names.keys() - self._names.keys()), len(self._names.keys() - names.keys())
        self._names = names
        self._log.info("allowed_keys_read", file=str(self.file), keys=len(names), added=added, removed=removed)

    def _load(self) -> Mapping[str, str]:
        text, mode = _read(self.file)
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise KeyFileError(f"{self.file} says who is trusted, and others may write it: chmod go-w {self.file}")
        names: dict[str, str] = {}
        for number, line in _lines(text):
            key, _, name = line.partition(" ")
            if not is_key(key):
                # Not what stands there: it may be a secret in the wrong file.
                raise KeyFileError(f"{self.file}, line {number}: no public key (40 characters of Z85)")
            names[key] = name.strip()
        if not names:
            raise KeyFileError(f"{self.file} allows nobody: put in the line that `drystone keys show` prints of each")
        return MappingProxyType(names)


def _certificate(file: Path, text: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for number, line in _lines(text):
        if line in ("metadata", "curve"):
            continue
        name, sign, value = (part.strip() for part in line.partition("="))
        value = value.strip("\"'")
        if not sign:
            raise KeyFileError(f"{file}, line {number}: no `name = value`")
        if name in ("public-key", "secret-key") and not is_key(value):
            raise KeyFileError(f"{file}, line {number}: {name} is no key (40 characters of Z85)")
        values[name] = value
    if "public-key" not in values:
        raise KeyFileError(f"{file} has no public-key: it is no key file; make one with `drystone keys new`")
    return values


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with something in them, and their numbers from 1."""
    for number, line in enumerate(text.splitlines(), 1):
        said = " ".join(line.split())
        if said and not said.startswith("#"):
            yield number, said


def _read(file: Path) -> tuple[str, int]:
    """A file's text, and the mode of that very file."""
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            raw = opened.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{file}: {error.strerror}") from error
    if len(raw) > _MAX_FILE_BYTES:
        raise KeyFileError(f"{file} is no file of keys: it is larger than {_MAX_FILE_BYTES} bytes")
    try:
        return raw.decode("utf-8"), mode
    except UnicodeDecodeError:  # its message would show bytes of the file
        raise KeyFileError(f"{file} is no file of keys: not UTF-8") from None


def _version(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _write_new(file: Path, mode: int, text: str) -> None:
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as opened:  # noqa: PTH123 - born with its mode
        opened.write(text)
