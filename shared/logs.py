"""Logs: structlog, one JSON object a line on stdout, with what is bound to the running request.

Fields that every line of a request carries: `request_id` and `trace_id` (W3C trace context). Prompt
and answer texts are never logged.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO, cast

import structlog

Logger = structlog.stdlib.BoundLogger


class _Output:
    """Standard output. Whoever read it may be gone: the process must go on, if only to stop in order."""

    def write(self, text: str) -> None:
        """Writes, or finds out that nobody reads any more."""
        try:
            sys.stdout.write(text)
        except BrokenPipeError:
            _to_nowhere()

    def flush(self) -> None:
        """Flushes, likewise."""
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _to_nowhere()


def _to_nowhere() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def configure(level: str, form: str, **process: str) -> None:
    """Sets up logging of this process; `process` is bound to every line (role, worker_id)."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if form == "json" else structlog.dev.ConsoleRenderer(colors=False)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _Output())),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**process)


def get(name: str) -> Logger:
    """Logger of a module."""
    logger: Logger = structlog.get_logger(component=name)
    return logger


@contextmanager
def request_scope(request_id: str, traceparent: str) -> Iterator[None]:
    """Binds a request to every line logged within."""
    with structlog.contextvars.bound_contextvars(request_id=request_id, trace_id=trace_id(traceparent)):
        yield


def new_traceparent() -> str:
    """A fresh W3C trace context (https://www.w3.org/TR/trace-context/) of which nobody records spans."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"


def trace_id(traceparent: str) -> str:
    """Trace id in a W3C trace context; empty when it holds none."""
    parts = traceparent.split("-")
    return parts[1] if len(parts) == 4 and len(parts[1]) == 32 else ""  # noqa: PLR2004 - the format's own numbers
