"""Options of what runs on this machine. No imports beyond the standard library."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """A gateway and its workers on this machine.

    Args:
        model: Local folder, GGUF file, hub id, or "default".
        dtype: "auto", "float32" or "bfloat16".
        prefill: Number of prefill workers.
        decode: Number of decode workers.
        host: Address that the gateway serves on; workers stay on loopback.
        port: The gateway's port. 0 takes a free one.
        threads: torch threads of each worker. None shares the cores evenly.
        log_level: "debug", "info", "warning" or "error".
        json_logs: Log JSON lines instead of text.
        store: Folder in which prefill workers keep blocks and records over restarts. None: on no disk.
        start_seconds: Longest time from the first process to the last one ready.
        grace_seconds: Time that the gateway, and then the workers, have between SIGTERM and SIGKILL.
    """

    model: str = "default"
    dtype: str = "auto"
    prefill: int = 1
    decode: int = 1
    host: str = "127.0.0.1"
    port: int = 7700
    threads: int | None = None
    log_level: str = "info"
    json_logs: bool = False
    store: Path | None = None
    start_seconds: float = 300.0
    grace_seconds: float = 10.0

    @property
    def threads_per_worker(self) -> int:
        """Number of torch threads that each worker gets."""
        return self.threads or max(1, (os.cpu_count() or 1) // max(1, self.prefill + self.decode))


@dataclass(frozen=True, slots=True)
class GateOptions:
    """A check of served answers against the reference.

    Args:
        model: As in `ServeOptions`. None means its default.
        prompts: Prompts to compare.
        questions: JSON Lines file of prompts. None takes built-in ones.
        dtypes: Types to run in, each "float32" or "bfloat16".
        max_new_tokens: Tokens to generate for each prompt.
        json: Report as one JSON object on stdout.
        attention: Kinds to compare: "block", "full".
    """

    model: str | None = None
    prompts: int = 50
    questions: Path | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    max_new_tokens: int = 64
    json: bool = False
    attention: tuple[Literal["block", "full"], ...] = ("block",)
