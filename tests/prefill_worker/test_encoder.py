"""The queue in front of the model: each block once, nothing for nobody, bounded, and it never stops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest

from prefill_worker import encoder as module
from prefill_worker.encoder import Encoder
from prefill_worker.store import RamStore
from shared.engine import served_model
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason
from shared.kv.birth import chunk_checksum, chunk_plan
from shared.runtime import cancelled
from shared.transfer.raw import raw_bytes
from tests.conftest import MakeFolder
from tests.support.stacks import until

KEYS = [bytes([number]) * 32 for number in range(6)]
IDS = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def model(tiny_folder: MakeFolder) -> ServedModel:
    return served_model.load(tiny_folder(), name="tiny", dtype="float32")


@contextlib.asynccontextmanager
async def encoding(model: ServedModel, max_queued: int = 10) -> AsyncIterator[Encoder]:
    encoder = Encoder(model, RamStore(1 << 20), max_queued)
    running = asyncio.create_task(encoder.run())
    yield encoder
    assert not running.done(), "the encoder's loop ended"
    await cancelled(running)


class Gate:
    """Holds encodings up until it is opened; counts them."""

    def __init__(self, encoder: Encoder) -> None:
        self.open, self.begun, run = threading.Event(), 0, encoder._run

        def held(*arguments: object) -> object:
            self.begun += 1
            self.open.wait(10.0)
            return run(*arguments)  # type: ignore[arg-type] # passed on as they came

        encoder._run = held  # type: ignore[method-assign,assignment]


async def test_a_block_is_encoded_once_for_all_who_ask(model: ServedModel) -> None:
    async with encoding(model) as encoder:
        gate = Gate(encoder)
        (first, began), (second, shared) = (encoder.request(KEYS[0], IDS, store=False) for _ in range(2))
        assert (began, shared) == (False, True)
        assert first is second
        third, _ = encoder.request(KEYS[0], IDS, store=True)
        gate.open.set()
        block = await first.done
        assert await third.done is block
        assert gate.begun == encoder.blocks_total == 1
        assert encoder._store.peek(KEYS[0]) is block, "one of them stores it"
        assert encoder.queued == 0
        assert (encoder.tokens_total, first.encode_ms > 0) == (len(IDS), True)


async def test_its_birth_verifies(model: ServedModel) -> None:
    async with encoding(model) as encoder:
        asked, _ = encoder.request(KEYS[1], IDS, store=False)
        block = await asked.done
        [chunk] = chunk_plan(model.geometry.shape, len(IDS))
        data = raw_bytes(block.extent)
        checksum = chunk_checksum(KEYS[1], block.birth.birth_id, model.geometry.shape, len(IDS), chunk, data)
        assert block.birth.checksums == (checksum,)
        assert block.token_ids == tuple(IDS)
        assert encoder._store.peek(KEYS[1]) is None


async def test_what_nobody_wants_is_not_begun(model: ServedModel) -> None:
    async with encoding(model) as encoder:
        gate = Gate(encoder)
        first, _ = encoder.request(KEYS[0], IDS, store=False)
        await until(lambda: gate.begun == 1)
        unwanted, _ = encoder.request(KEYS[1], IDS, store=False)
        encoder.leave(unwanted)
        last, _ = encoder.request(KEYS[2], IDS, store=False)
        gate.open.set()
        await last.done
        assert gate.begun == 2
        assert unwanted.done.cancelled()
        assert first.done.done()
        assert encoder.queued == 0


async def test_the_queue_is_bounded(model: ServedModel) -> None:
    async with encoding(model, max_queued=2) as encoder:
        gate = Gate(encoder)
        asked = [encoder.request(key, IDS, store=False)[0] for key in KEYS[:2]]
        with pytest.raises(DrystoneError) as caught:
            encoder.request(KEYS[2], IDS, store=False)
        assert caught.value.reason is Reason.ENCODE_QUEUE_FULL
        assert caught.value.retry_after_ms == 1000
        assert encoder.request(KEYS[1], IDS, store=False)[1], "joining takes no place"
        gate.open.set()
        await asyncio.gather(*(one.done for one in asked))
        encoder.request(KEYS[2], IDS, store=False)


async def test_a_failure_is_this_blocks_alone(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async with encoding(model) as encoder:
        monkeypatch.setattr(module, "encode_block", lambda *_: 1 / 0)
        bad, _ = encoder.request(KEYS[0], IDS, store=True)
        with pytest.raises(DrystoneError, match="could not be encoded") as caught:
            await bad.done
        assert caught.value.reason is Reason.BLOCK_UNAVAILABLE
        monkeypatch.undo()
        good, _ = encoder.request(KEYS[0], IDS, store=True)
        assert (await good.done).key == KEYS[0]


async def test_stopping_fails_what_is_open(model: ServedModel) -> None:
    encoder = Encoder(model, RamStore(0), 10)
    gate = Gate(encoder)
    running = asyncio.create_task(encoder.run())
    asked = [encoder.request(key, IDS, store=False)[0] for key in KEYS]
    await until(lambda: gate.begun == 1)
    running.cancel()
    gate.open.set()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    for one in asked:
        assert one.done.done()
        error = one.done.exception()
        assert isinstance(error, DrystoneError)
        assert error.reason is Reason.DRAINING
