"""What asynchronous streams ask of their task."""

from __future__ import annotations

import asyncio


def task_is_cancelled() -> bool:
    """True when it is the running task that someone cancelled, and not only a call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
