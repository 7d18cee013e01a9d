"""Prefill workers that die, stall, or were never there: the answer is the same, and says who encoded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, Callable
from typing import Any

import drystone
from drystone.local.stack import InProcessStack
from drystone.v1 import generation_pb2 as v1
from drystone.v1.prompt_pb2 import BlockInput, BlocksPrompt
from gateway.app import GatewayApp
from gateway.settings import GatewaySettings
from prefill_worker.app import PrefillApp
from prefill_worker.settings import PrefillSettings
from shared.errors import Reason
from shared.kv.birth import CHUNK_BYTES
from tests.conftest import MakeFolder
from tests.support.errors import failure_of
from tests.support.stacks import Served, serving, until

PROMPT: dict[str, Any] = {"blocks": ["A wall of dry stone.", "What is it?"], "max_new_tokens": 8}
LONG: dict[str, Any] = {"blocks": ["wall " * 3000, "What is it?"], "max_new_tokens": 8}


async def ask(served: Served, prompt: dict[str, Any] = PROMPT) -> drystone.Answer:
    return await served.client.generate(**prompt)


def hold_up(app: PrefillApp) -> threading.Event:
    """Makes a worker's encodings wait, on their own thread, until the event is set."""
    go, encode = threading.Event(), app.encoder._forward.run

    def held(*arguments: Any) -> Any:
        go.wait(20.0)
        return encode(*arguments)

    app.encoder._forward.run = held  # type: ignore[method-assign] # held up as a slow model would
    return go


async def busy_one(served: Served) -> PrefillApp:
    apps = served.stack.prefill_apps
    await until(lambda: any(app.encoder.queued for app in apps))
    return next(app for app in apps if app.encoder.queued)


async def test_without_any_prefill_worker(tiny_folder: MakeFolder) -> None:
    async with serving(tiny_folder()) as served:
        expected = await ask(served)
    async with serving(tiny_folder(), prefill=0) as served:
        answer = await ask(served)
        assert answer.token_ids == expected.token_ids
        assert answer.blocks[0].source == "encoded_on_decode"
        assert answer.blocks[0].encode_ms > 0
        assert (answer.usage.blocks_encoded, answer.usage.shipped_bytes) == (1, 0)
        assert (await ask(served)).blocks[0].source == "resident"
        answers = await asyncio.gather(*(served.client.generate(blocks=["shared", f"{n}"]) for n in range(4)))
        assert sum(one.usage.blocks_encoded for one in answers) == 1


async def test_a_worker_that_was_stopped_is_passed_over(tiny_folder: MakeFolder) -> None:
    async with serving(tiny_folder(), prefill=2) as served:
        expected = await ask(served)
        first = expected.blocks[0].worker_id
        gone = next(app for app in served.stack.prefill_apps if app.identity.worker_id == first)
        other = next(app for app in served.stack.prefill_apps if app is not gone)
        served.evict_everywhere()
        await served.stop(gone)
        # The gateway may not have noticed yet: then the first attempt fails and is told.
        answer = await ask(served)
        assert answer.token_ids == expected.token_ids
        assert (answer.blocks[0].source, answer.blocks[0].worker_id) == ("encoded", other.identity.worker_id)
        assert all(first in attempt for attempt in answer.blocks[0].failed_attempts)
        assert answer.routing.fetch_retries == len(answer.blocks[0].failed_attempts)
        cluster = served.stack.gateway_app.cluster  # type: ignore[union-attr] # it has been started
        await until(lambda: len(cluster.prefill_workers) == 1)
        states = {process.worker_id: process.state for process in await served.client.status()}
        assert states[first] == "unreachable"
        assert states[other.identity.worker_id] == "ready"


async def test_a_worker_that_stops_during_the_fetch_hands_over(tiny_folder: MakeFolder) -> None:
    async with serving(tiny_folder(), prefill=2) as served:
        expected = await ask(served)
        served.evict_everywhere()
        events = [hold_up(app) for app in served.stack.prefill_apps]
        answering = asyncio.create_task(ask(served))
        gone = await busy_one(served)
        for event in events:
            event.set()
        await served.stop(gone)
        answer = await answering
        assert answer.token_ids == expected.token_ids
        await served.until_idle()


async def stalled(served: Served, number: int) -> list[threading.Event]:
    served.evict_everywhere()
    return [hold_up(app) for app in served.stack.prefill_apps[:number]]


async def test_a_worker_that_stalls_is_given_up_and_the_next_one_encodes(tiny_folder: MakeFolder) -> None:
    async with serving(tiny_folder(), prefill=2, gateway_settings={"fetch_timeout_seconds": 0.3}) as served:
        expected = await ask(served)
        first = expected.blocks[0].worker_id
        served.evict_everywhere()
        slow = next(app for app in served.stack.prefill_apps if app.identity.worker_id == first)
        go = hold_up(slow)
        answer = await ask(served)
        assert answer.token_ids == expected.token_ids
        assert answer.blocks[0].source == "encoded"
        assert answer.blocks[0].worker_id != first
        assert answer.blocks[0].failed_attempts == (f"{first}: no answer in time",)
        assert answer.routing.fetch_retries == 1
        go.set()
        await served.until_idle()


async def test_when_every_prefill_worker_stalls_the_decode_worker_encodes(tiny_folder: MakeFolder) -> None:
    async with serving(tiny_folder(), prefill=2, gateway_settings={"fetch_timeout_seconds": 0.2}) as served:
        expected = await ask(served)
        events = await stalled(served, 2)
        answer = await ask(served)
        assert answer.token_ids == expected.token_ids
        assert answer.blocks[0].source == "encoded_on_decode"
        assert len(answer.blocks[0].failed_attempts) == 2
        assert answer.usage.shipped_bytes == 0
        for event in events:
            event.set()
        await served.until_idle()
        # What the slow workers then ship is for a reservation that has ended: it is refused and harms nobody.
        again = await ask(served)
        assert again.token_ids == expected.token_ids
        assert again.blocks[0].source == "resident"


async def test_the_driver_leaves_and_the_next_waiter_gets_the_block(tiny_folder: MakeFolder) -> None:
    async with serving(tiny_folder()) as served:
        expected = await ask(served)
        [go] = await stalled(served, 1)
        driver = asyncio.create_task(ask(served))
        await busy_one(served)
        waiter = asyncio.create_task(ask(served))
        fetches = served.stack.decode_apps[0].pool.fetches
        await until(lambda: [len(fetch.waiters) for fetch in fetches.all()] == [2])
        driver.cancel()
        await until(lambda: [fetch.epoch for fetch in fetches.all()] == [2])
        go.set()
        answer = await waiter
        assert answer.token_ids == expected.token_ids
        await served.until_idle()


async def test_a_waiters_own_deadline_holds(tiny_folder: MakeFolder) -> None:
    async with serving(tiny_folder()) as served:
        [go] = await stalled(served, 1)
        driver = asyncio.create_task(ask(served))
        await busy_one(served)
        blocks = BlocksPrompt(blocks=[BlockInput(text=text) for text in PROMPT["blocks"]])
        failure = await failure_of(_read(served.raw.Generate(v1.GenerateRequest(blocks=blocks, timeout_ms=200))))
        assert failure.reason == Reason.DEADLINE_EXCEEDED
        assert failure.metadata["while"] == "waiting for blocks"
        go.set()
        assert (await driver).token_ids
        await served.until_idle()


async def _read(call: AsyncIterable[object]) -> list[object]:
    return [event async for event in call]


async def test_every_prefill_worker_stops_while_it_ships(tiny_folder: MakeFolder) -> None:
    async with serving(tiny_folder(), prefill=1) as served:
        expected = await ask(served, LONG)
        assert expected.usage.shipped_bytes > CHUNK_BYTES
        served.evict_everywhere()
        receiver = served.stack.decode_apps[0].receiver
        before = receiver.received_bytes
        answering = asyncio.create_task(ask(served, LONG))
        await until(lambda: receiver.received_bytes > before or answering.done())
        await served.stop(served.stack.prefill_apps[0])
        answer = await answering
        assert answer.token_ids == expected.token_ids
        await served.until_idle()


async def odd_one_out(folder: MakeFolder, make: Callable[[], PrefillApp], field: str, *, odd_first: bool) -> None:
    """A gateway that sees a sound stack and one prefill worker that does not fit: it is named and left out."""
    odd = await asyncio.to_thread(make)
    async with InProcessStack(folder()) as stack:
        address = (await odd.start())["grpc_address"]
        prefill = [stack.prefill_apps[0].server.address]
        settings = GatewaySettings(
            decode_workers=[stack.decode_apps[0].server.address],
            prefill_workers=[address, *prefill] if odd_first else [*prefill, address],
        )
        gateway = GatewayApp(settings, folder(), "model")
        await gateway.start()
        try:
            async with drystone.AsyncClient(gateway.server.address) as client:
                processes = {process.worker_id: process for process in await client.status()}
                assert processes["odd"].state == "unusable"
                assert field in processes["odd"].detail
                assert {processes[name].state for name in ("decode-0", "prefill-0")} == {"ready"}
                for number in range(6):
                    answer = await client.generate(blocks=[f"block {number}", "q"], max_new_tokens=2)
                    assert answer.blocks[0].worker_id == "prefill-0"
        finally:
            await gateway.stop(0.0)
            await odd.stop(0.0)


async def test_a_prefill_worker_with_another_type_is_left_out_by_name(tiny_folder: MakeFolder) -> None:
    settings = PrefillSettings(worker_id="odd", dtype="bfloat16")
    for odd_first in (False, True):
        await odd_one_out(
            tiny_folder, lambda: PrefillApp(settings, tiny_folder(), "model"), "dtype", odd_first=odd_first
        )


async def test_a_prefill_worker_with_another_model_is_left_out_by_name(tiny_folder: MakeFolder) -> None:
    settings = PrefillSettings(worker_id="odd", dtype="float32")
    await odd_one_out(
        tiny_folder,
        lambda: PrefillApp(settings, tiny_folder(seed=1), "model"),
        "model_fingerprint",
        odd_first=True,
    )
