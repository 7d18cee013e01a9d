"""How far a model is loaded: bytes read of its files, told to whoever waits and to the log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shared import logs

Progress = Callable[[float], None]
# Of the whole: reading takes most where it is slow at all. The rest is building and proving.
_READING = 0.9
_BUFFER_BYTES = 16 << 20
_LOG_SECONDS = 2.0


def read_ahead(files: Sequence[Path], progress: Progress | None = None) -> int:
    """Brings files into the page cache, from where weights are mapped and hashed afterwards.

    Args:
        files: Files to read, in order.
        progress: Called with the fraction of the whole loading that is done, rising to 0.9.

    Returns:
        Bytes read.

    Raises:
        OSError: A file cannot be read.
    """
    log = logs.get("model")
    total, done = sum(file.stat().st_size for file in files), 0
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    began = told = time.monotonic()
    for file in files:
        with file.open("rb", buffering=0) as content:
            while count := content.readinto(buffer):
                done += count
                if progress is not None:
                    progress(_READING * done / total)
                now = time.monotonic()
                if now - told >= _LOG_SECONDS:
                    told = now
                    seconds = round(now - began, 1)
                    log.info(
                        "loading_model", bytes=done, of_bytes=total, fraction=round(done / total, 3), seconds=seconds
                    )
    return done
