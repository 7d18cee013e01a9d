"""A process's life: ready file, signals, parent watch, and tasks that break."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from shared import runtime
from shared.runtime import cancelled, run_app, write_ready_file
from shared.settings import ProcessSettings
from tests.support.stacks import until


class FakeApp:
    """Serves nothing; remembers what was asked of it."""

    def __init__(self, *works: Any, ready_file: Path | None = None) -> None:
        self.tasks: list[asyncio.Task[None]] = []
        self.stopped: list[float] = []
        self.released = False
        self.ready_while_stopping: bool | None = None
        self._works = works
        self._ready_file = ready_file

    async def start(self) -> dict[str, str]:
        self.tasks = [asyncio.create_task(work()) for work in self._works]
        return {"grpc_address": "127.0.0.1:1"}

    async def stop(self, grace_seconds: float) -> None:
        self.stopped.append(grace_seconds)
        self.ready_while_stopping = self._ready_file is not None and self._ready_file.exists()
        for task in self.tasks:
            await cancelled(task)
        self.released = True


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def forever() -> None:
    await asyncio.Event().wait()


async def breaks() -> None:
    raise RuntimeError("a stone fell")


async def returns() -> None:
    """Ends, which no task of an app may do."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_within_the_grace_and_the_ready_file_goes_first(tmp_path: Path, number: int) -> None:
    ready = tmp_path / "ready.json"
    app = FakeApp(forever, ready_file=ready)
    running = asyncio.create_task(run_app(app, ProcessSettings(ready_file=ready, drain_seconds=3.5)))
    await until(ready.exists)
    assert json.loads(ready.read_text()) == {"grpc_address": "127.0.0.1:1", "pid": os.getpid()}
    assert names_in(tmp_path) == {ready.name}
    os.kill(os.getpid(), number)
    await asyncio.wait_for(running, 5.0)
    assert app.stopped == [3.5]
    assert app.released
    assert app.ready_while_stopping is False
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("work", [breaks, returns])
async def test_a_task_that_ends_is_a_broken_process(tmp_path: Path, work: Any) -> None:
    ready = tmp_path / "ready.json"
    app = FakeApp(forever, work, forever)
    with pytest.raises(SystemExit) as caught:
        await run_app(app, ProcessSettings(ready_file=ready))
    assert caught.value.code == 1
    assert app.released, "what broke must not keep the rest from being released"
    assert all(task.done() for task in app.tasks)
    assert not ready.exists()


async def test_an_app_that_cannot_start_is_stopped_and_exits_with_1() -> None:
    class Bound(FakeApp):
        async def start(self) -> dict[str, str]:
            raise OSError("port 1 is taken")

    app = Bound()
    with pytest.raises(SystemExit) as caught:
        await run_app(app, ProcessSettings())
    assert caught.value.code == 1
    assert app.released


async def test_a_parent_that_is_gone_stops_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_PARENT_POLL_SECONDS", 0.01)
    app = FakeApp(forever)
    running = asyncio.create_task(run_app(app, ProcessSettings(exit_with_parent=os.getppid())))
    await asyncio.sleep(0.1)
    assert not running.done()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    await asyncio.wait_for(running, 5.0)
    assert app.released


async def test_a_parent_that_was_never_ours_stops_at_once() -> None:
    app = FakeApp(forever)
    await asyncio.wait_for(run_app(app, ProcessSettings(exit_with_parent=os.getpid())), 5.0)
    assert app.released


async def test_no_parent_to_watch_and_no_file_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_PARENT_POLL_SECONDS", 0.01)
    app = FakeApp(forever)
    running = asyncio.create_task(run_app(app, ProcessSettings()))
    await asyncio.sleep(0.1)
    assert not running.done()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 5.0)


def test_a_ready_file_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    path.write_text("left by another process, and much longer than what comes now " * 9)
    write_ready_file(path, {"a": "b"})
    assert json.loads(path.read_text()) == {"a": "b", "pid": os.getpid()}
    write_ready_file(None, {"a": "b"})
    with pytest.raises(OSError, match="nowhere"):
        write_ready_file(tmp_path / "nowhere" / "ready.json", {})


async def test_cancelling_what_broke_raises_nothing() -> None:
    for work in (breaks, returns, forever):
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        await cancelled(task)
        assert task.done()


async def test_cancelling_waits_for_the_end_and_can_itself_be_cancelled() -> None:
    cleaned = asyncio.Event()

    async def slow_to_go() -> None:
        try:
            await forever()
        finally:
            await asyncio.sleep(0.05)
            cleaned.set()

    task = asyncio.create_task(slow_to_go())
    await asyncio.sleep(0)
    await cancelled(task)
    assert cleaned.is_set()

    async def deaf() -> None:
        for _ in range(2):
            try:
                await asyncio.sleep(0.2)
            except asyncio.CancelledError:
                continue

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(cancelled(task), 0.05)
    await asyncio.wait([task])
