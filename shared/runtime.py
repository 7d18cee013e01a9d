"""A process's life around its event loop: ready file, parent watch, SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from pathlib import Path
from typing import Protocol

from shared import logs
from shared.errors import DrystoneError
from shared.settings import ProcessSettings

_PARENT_POLL_SECONDS = 1.0


class App(Protocol):
    """A process's work, started once and stopped once.

    Attributes:
        tasks: Tasks that never end by themselves; when one does, the process is broken and exits.
    """

    tasks: list[asyncio.Task[None]]

    async def start(self) -> dict[str, str]:
        """Serves; returns addresses for the ready file."""
        ...

    async def stop(self, grace_seconds: float) -> None:
        """Refuses new work, lets running work end within the grace, releases everything."""
        ...


async def run_app(app: App, settings: ProcessSettings) -> None:
    """Runs `app` until SIGTERM, SIGINT or the parent's death; exits with 1 when one of its tasks breaks."""
    log = logs.get("runtime")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    watch = asyncio.create_task(_watch_parent(settings.exit_with_parent, stop))
    try:
        try:
            addresses = await app.start()
            write_ready_file(settings.ready_file, addresses)
        except (OSError, DrystoneError) as error:
            log.critical("cannot_start", reason=str(error))
            raise SystemExit(1) from error
        log.info("serving", **addresses)
        stopping = asyncio.create_task(stop.wait())
        ended, _ = await asyncio.wait([stopping, *app.tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in ended - {stopping}:
            log.critical("broken", task=task.get_name(), exc_info=task.exception())
            raise SystemExit(1)
        log.info("stopping", grace_seconds=settings.drain_seconds)
    finally:
        watch.cancel()
        if settings.ready_file is not None:
            settings.ready_file.unlink(missing_ok=True)
        await app.stop(settings.drain_seconds)
        log.info("stopped")


def write_ready_file(path: Path | None, addresses: dict[str, str]) -> None:
    """Writes addresses and process id as JSON, whole or not at all."""
    if path is None:
        return
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps({**addresses, "pid": os.getpid()}))
    scratch.replace(path)


async def _watch_parent(parent: int, stop: asyncio.Event) -> None:
    while parent and os.getppid() == parent:  # noqa: ASYNC110 - the kernel tells only who asks
        await asyncio.sleep(_PARENT_POLL_SECONDS)
    if parent:
        stop.set()
        logs.get("runtime").warning("parent_gone", parent=parent)


def host_name() -> str:
    """Name of this host."""
    return socket.gethostname()


async def cancelled(task: asyncio.Task[None]) -> None:
    """Cancels a task and waits until it has ended; its own errors have been logged by itself."""
    task.cancel()
    # Never raises what the task raised: the rest of a stop must still run.
    await asyncio.gather(task, return_exceptions=True)
