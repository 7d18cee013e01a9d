"""Opens the place that a setting names: a folder, or a bucket of S3, Google Cloud Storage or Azure."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Config

_REMOTE = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss")
_LOCK = ".lock"
_PRIVATE = 0o700
# Options of the HTTP client. obstore takes them apart from the store's own, which it reads in the same spelling.
_CLIENT_OPTIONS = frozenset(
    {
        "allow_http",
        "allow_invalid_certificates",
        "http1_only",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_ca_certificate",
        "proxy_excludes",
        "proxy_url",
        "randomize_addresses",
        "root_certificate",
        "user_agent",
    }
)
_NO_OPTIONS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Patience:
    """How long operations on a store may take, in seconds, and how often a request is repeated within that time."""

    connect_seconds: float = 3.0
    look_seconds: float = 2.0
    read_seconds: float = 10.0
    write_seconds: float = 60.0
    delete_seconds: float = 10.0
    list_seconds: float = 30.0
    retries: int = 2


def open_location(
    place: str,
    options: Mapping[str, str] = _NO_OPTIONS,
    *,
    patience: Patience | None = None,
    setting: str = "location",
) -> ObjectStore:
    """A store of objects. Nothing remote is asked yet; a local folder is made if it is not there.

    Credentials come from `options` or from where each cloud's tools look for them (AWS_ACCESS_KEY_ID and its like,
    profiles of instances, mounted tokens). They are in no message.

    Args:
        place: A folder's path, file:///folder, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix.
        options: What obstore takes for this kind of store, such as `region` and `endpoint`, or for its HTTP client,
            such as `allow_http`.
        patience: Limits of time.
        setting: Name of the setting that gave `place`, for messages.

    Raises:
        ValueError: The place or an option cannot be used.
    """
    kept = patience or Patience()
    scheme = urlsplit(place).scheme.lower() if "://" in place else ""
    if scheme in ("", "file"):
        return _open_folder(place, options, setting)
    if scheme not in _REMOTE:
        raise ValueError(f"{setting}: {scheme}:// is none of a folder's path, file, s3, gs and az")
    client = {name: value for name, value in options.items() if name.lower() in _CLIENT_OPTIONS}
    config = {name: value for name, value in options.items() if name not in client}
    try:
        return from_url(
            place,
            config=cast("S3Config", config),
            client_options=_client_options(client, kept),
            retry_config=_retries(kept),
        )
    except (BaseError, ValueError, TypeError) as error:
        # The cause has the URL and options in its text, and they may hold credentials: it goes no further.
        raise ValueError(f"{setting}: {_said(error, place, options)}") from None


class FolderLock:
    """Exclusive use of a folder, for as long as it is held or its holder lives.

    The system frees it when the process exits in whatever way. The lock's file stays.
    """

    def __init__(self, folder: Path, setting: str) -> None:
        self._path = folder / _LOCK
        self._setting = setting
        self._handle: int | None = None

    def take(self) -> None:
        """Takes the lock.

        Raises:
            OSError: Another holds it, or the folder cannot be written to.
        """
        folder, handle = self._path.parent, None
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if handle is not None:
                os.close(handle)
            why = (
                "is in use by another worker; each needs a folder of its own"
                if isinstance(error, BlockingIOError)
                else f"cannot be used: {error.strerror}"
            )
            raise OSError(f"{self._setting}: {folder} {why}") from error
        self._handle = handle

    def free(self) -> None:
        """Frees the lock; harmless when it is not held."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


def folder_of(store: ObjectStore) -> Path | None:
    """The folder of a local store; None for a remote one."""
    return Path(store.prefix) if isinstance(store, LocalStore) and store.prefix is not None else None


def _open_folder(place: str, options: Mapping[str, str], setting: str) -> LocalStore:
    if options:
        raise ValueError(f"{setting}: a folder takes no options; given: {', '.join(sorted(options))}")
    parts = urlsplit(place) if "://" in place else None
    if parts is not None and parts.netloc:
        raise ValueError(f"{setting}: a file URL has three slashes before the path")
    folder = Path(unquote(parts.path) if parts is not None else place).expanduser()
    if not place or not folder.name:
        raise ValueError(f"{setting}: name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=_PRIVATE)
        # KV gives away texts. Files below get the umask's mode; nobody else comes that far.
        with contextlib.suppress(PermissionError):  # made by another user for us: its mode is theirs to choose
            folder.chmod(_PRIVATE)
        return LocalStore(folder.resolve())
    except (OSError, BaseError) as error:
        raise ValueError(f"{setting}: {folder} cannot be used: {error}") from error


def _client_options(given: Mapping[str, str], patience: Patience) -> ClientConfig:
    # The longest operation bounds every request; shorter limits are kept by who asks.
    options: dict[str, Any] = {name.lower(): value for name, value in given.items()}
    options["connect_timeout"] = timedelta(seconds=patience.connect_seconds)
    options["timeout"] = timedelta(seconds=max(patience.write_seconds, patience.read_seconds))
    return cast("ClientConfig", options)


def _retries(patience: Patience) -> RetryConfig:
    return {
        "max_retries": patience.retries,
        "retry_timeout": timedelta(seconds=patience.read_seconds),
        "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=1), "base": 2},
    }


def _said(error: Exception, place: str, options: Mapping[str, str]) -> str:
    text = str(error).partition("\n")[0].replace(place, "this URL")
    for value in sorted(options.values(), key=len, reverse=True):
        text = text.replace(value, "...") if value else text
    return text
