"""A whole Drystone in one process for tests: started small, looked into, and found idle again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import drystone
from drystone.local.stack import InProcessStack
from drystone.v1.generation_pb2_grpc import GenerationStub
from shared.rpc.channel import open_channel
from tests.support.decode_parts import assert_all_free_after_eviction, assert_idle

POOL_BYTES = 32 << 20
RAM_BYTES = 32 << 20


@contextlib.asynccontextmanager
async def serving(folder: Path, **options: Any) -> AsyncIterator[Served]:
    """A started stack with small memories, and a client of it. It must be idle when the test is done."""
    options["decode_settings"] = {"pool_bytes": POOL_BYTES, **options.get("decode_settings", {})}
    options["prefill_settings"] = {"ram_bytes": RAM_BYTES, **options.get("prefill_settings", {})}
    options["gateway_settings"] = {"poll_seconds": 0.2, **options.get("gateway_settings", {})}
    timeouts = drystone.Timeouts(generate=30.0)
    async with (
        InProcessStack(folder, **options) as stack,
        drystone.AsyncClient(stack.address, timeouts=timeouts) as client,
    ):
        served = Served(stack, client)
        try:
            yield served
        finally:
            await served.close()
        await served.until_idle()
        for app in stack.decode_apps:
            assert_all_free_after_eviction(app.pool)


class Served:
    """A running stack and a client of it."""

    def __init__(self, stack: InProcessStack, client: drystone.AsyncClient) -> None:
        self.stack = stack
        self.client = client
        self._channel = open_channel(stack.address)
        self._stopped: list[object] = []

    @property
    def raw(self) -> GenerationStub:
        """The public service without the SDK, for requests that the SDK would not send."""
        return GenerationStub(self._channel)

    @property
    def channel(self) -> Any:
        """The channel itself, for bytes that are no request at all."""
        return self._channel

    async def close(self) -> None:
        """Closes the raw channel."""
        await self._channel.close()

    def stopped(self, app: object) -> bool:
        """True for a worker that the test itself stopped."""
        return app in self._stopped

    async def stop(self, app: Any) -> None:
        """Stops one worker, as a crash would: nothing under way on it ends well."""
        self._stopped.append(app)
        await app.stop(0.0)

    def evict_everywhere(self) -> None:
        """Empties every cache: the next request is cold."""
        for app in self.stack.decode_apps:
            while app.pool.blocks.evict_one():
                pass
        for worker in self.stack.prefill_apps:
            for key in sorted(worker.holdings.store.keys()):
                worker.holdings.store.ram.delete_now(key)

    async def until_idle(self, seconds: float = 5.0) -> None:
        """Waits until nothing runs anywhere, then holds the idle invariant of design §6 on every worker."""
        await until(lambda: not self._busy(), seconds, self._busy)
        for app in self.stack.decode_apps:
            assert_idle(app.pool)
            assert app.engine.lifecycle.holding == []
            assert app.engine.lifecycle._timers == {}
        for worker in self.stack.prefill_apps:
            if self.stopped(worker):
                continue
            await until(lambda: all(link.idle for link in worker.shipper.links()), seconds)  # noqa: B023 - awaited here

    def _busy(self) -> list[str]:
        """What is still under way, in words."""
        for process in (*self.stack.decode_apps, *self.stack.prefill_apps):
            for task in process.tasks:
                assert not task.done() or self.stopped(process), f"a worker's loop ended: {task}"
        gateway = self.stack.gateway_app
        found = [f"gateway runs {gateway.generation.running}"] if gateway and gateway.generation.running else []
        for app in self.stack.decode_apps:
            pool = app.pool
            held = (
                len(app.engine.lifecycle.running),
                len(app.engine.lifecycle.waiting),
                pool.blocks.pins,
                len(pool.fetches),
            )
            if any(held):
                found.append(f"decode worker: running, waiting, pins, fetches {held}")
        queues = [worker.encoder.queued for worker in self.stack.prefill_apps if not self.stopped(worker)]
        return [*found, *(f"prefill worker: {queued} queued" for queued in queues if queued)]


async def until(condition: Callable[[], bool], seconds: float = 5.0, why: Callable[[], object] = str) -> None:
    """Waits for something to become true; says what was missing when it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {why()}"
        await asyncio.sleep(0.005)
