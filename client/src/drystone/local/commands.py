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

# A process must be done with its running work well before the supervisor kills it: it has to release and exit too.
_DRAIN_SHARE: Final = 0.4

# Of the memory that is free, for the KV of all decode workers together. Set DRYSTONE_POOL_BYTES for a number of bytes.
_POOL_SHARE: Final = 0.5

# What the flags decide, or what is of one process and would be taken by all: no variable of the user's may say it too.
_OURS: Final = frozenset(
    f"DRYSTONE_{name}"
    for name in (
        *("CONFIG", "HOST", "PORT", "KV_PORT", "MODEL", "MODEL_NAME", "DTYPE", "THREADS", "WORKER_ID", "DISK_PATH"),
        *("PREFILL", "DECODE", "PREFILL_WORKERS", "DECODE_WORKERS", "POOL_SHARE"),
        *("READY_FILE", "EXIT_WITH_PARENT", "DRAIN_SECONDS", "LOG_LEVEL", "LOG_FORMAT"),
    )
)
_GATEWAYS: Final = frozenset({"DRYSTONE_METRICS_PORT"})


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


def environment(role: str, ours: Mapping[str, str]) -> dict[str, str]:
    """Environment of a process of a role: ours, without what its flags decide and what is another process's."""
    dropped = _OURS if role == "gateway" else _OURS | _GATEWAYS
    return {name: value for name, value in ours.items() if name not in dropped}


def worker_flags(options: ServeOptions, model: ServedModel, name: str, ready_file: Path) -> list[str]:
    """Flags of a worker; it serves on loopback, on a free port."""
    # Decode workers on one machine share its memory: each takes its part of what one alone would take.
    share = ["--pool-share", f"{_POOL_SHARE / max(options.decode, 1):g}"] if name.startswith("decode-") else []
    # Each worker has a folder of its own there: two would evict each other's blocks.
    disk = ["--disk-path", str(options.store / name)] if options.store and name.startswith("prefill-") else []
    return [
        *share,
        *disk,
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
