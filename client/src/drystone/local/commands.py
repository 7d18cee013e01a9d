"""Command lines of the processes, and the model that they serve."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from drystone.local.options import ServeOptions

MODULES: Final[Mapping[str, str]] = {"prefill": "prefill_worker", "decode": "decode_worker", "gateway": "gateway"}

# A process must be done with its running work a little before the supervisor kills it.
_DRAIN_SHARE: Final = 0.8


class ModelUnavailableError(Exception):
    """The model cannot be had; the message says what to do."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model on this machine: its folder, and the name that clients ask for."""

    folder: Path
    name: str


def resolve_model(name: str, announce: Callable[[str], None]) -> ServedModel:
    """Obtains a model once, before any process needs it.

    Args:
        name: Local folder, GGUF file, hub id, or "default".
        announce: Called with one line for each slow step.

    Raises:
        ModelUnavailableError: When it cannot be had.
    """
    from shared.model import ModelError, catalog

    try:
        return ServedModel(catalog.resolve_model(name, announce), catalog.display_name(name))
    except ModelError as error:
        raise ModelUnavailableError(str(error)) from error


def program(role: str, index: int) -> list[str]:
    """How a process of a role is started: its package, never a folder of that name where we happen to be."""
    del index
    return [sys.executable, "-P", "-m", MODULES[role]]


def worker_flags(options: ServeOptions, model: ServedModel, name: str, ready_file: Path) -> list[str]:
    """Flags of a worker; it serves on loopback, on a free port."""
    return [
        *_common_flags(options, model, ready_file),
        *("--host", "127.0.0.1", "--port", "0"),
        *("--worker-id", name),
        *("--dtype", options.dtype),
        *("--threads", str(options.threads_per_worker)),
    ]


def gateway_flags(
    options: ServeOptions, model: ServedModel, workers: Mapping[str, Sequence[str]], ready_file: Path
) -> list[str]:
    """Flags of the gateway; `workers` has the addresses of each role."""
    return [
        *_common_flags(options, model, ready_file),
        *("--host", options.host, "--port", str(options.port)),
        *("--prefill-workers", ",".join(workers["prefill"])),
        *("--decode-workers", ",".join(workers["decode"])),
    ]


def _common_flags(options: ServeOptions, model: ServedModel, ready_file: Path) -> list[str]:
    return [
        *("--model", str(model.folder), "--model-name", model.name),
        *("--ready-file", str(ready_file)),
        *("--exit-with-parent", str(os.getpid())),
        *("--drain-seconds", f"{options.grace_seconds * _DRAIN_SHARE:g}"),
        *("--log-level", options.log_level),
        *("--log-format", "json" if options.json_logs else "console"),
    ]
