"""Locks between processes of one machine."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def exclusive(lock: Path, announce: Callable[[str], None], what: str) -> Iterator[None]:
    """Holds a file lock, which the system frees when its holder exits in whatever way.

    Args:
        lock: The file; it stays.
        announce: Told once when it must be waited for.
        what: What the holder does, in words.
    """
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            announce(f"waiting for another process that {what}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
