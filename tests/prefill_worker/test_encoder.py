"""The queue in front of the model: each block once, nothing for nobody, bounded, and it never stops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import structlog

from prefill_worker.batch_queue import Urgency
from prefill_worker.encoder import Encoder
from prefill_worker.encoding import Encoding
from prefill_worker.forward import Outcome
from prefill_worker.tiers.block import StoredBlock
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason
from shared.kv.birth import chunk_checksum, chunk_plan
from shared.runtime import cancelled
from tests.support.stacks import until

KEYS = [bytes([number]) * 32 for number in range(12)]
IDS = [5, 6, 7, 8]
HIGH, NORMAL, LOW, WARMING = Urgency


class Encoded:
    """An encoder and what it told others.

    Attributes:
        kept: What it gave to be stored.
        batches: Keys of each batch that the thread has begun.
        open: The thread goes on while this is set.
    """

    def __init__(self, model: ServedModel, **options: Any) -> None:
        self.kept: dict[bytes, StoredBlock] = {}
        self.forwards: list[tuple[int, float]] = []
        self.batches: list[list[bytes]] = []
        self.open = threading.Event()
        self.open.set()
        limits = {"max_queued_blocks": 20, "max_queued_tokens": 1000, "max_unshipped_bytes": 1 << 30}
        self.encoder = Encoder(
            model,
            self.keep,
            on_batch=lambda tokens, seconds: self.forwards.append((tokens, seconds)),
            **{"batch_tokens": 100, **limits, **options},
        )
        self._run = self.encoder._forward.run
        self.encoder._forward.run = self.run  # type: ignore[method-assign] # holds the thread up, and lets it go on

    def keep(self, block: StoredBlock) -> None:
        self.kept[block.key] = block

    def run(self, jobs: Any) -> Outcome:
        self.batches.append([job.key for job in jobs])
        assert self.open.wait(10.0)
        return self._run(jobs)

    def ask(
        self, index: int, urgency: Urgency = NORMAL, *, store: bool = False, tokens: int = 4, tenant: str = ""
    ) -> Encoding:
        ids = range(5, 5 + tokens)
        return self.encoder.request(KEYS[index], ids, store=store, urgency=urgency, tenant=tenant)[0]

    async def busy(self) -> Encoding:
        """The thread, held up in the forward of block 0."""
        self.open.clear()
        begun, batches = self.ask(0), len(self.batches)
        await until(lambda: len(self.batches) > batches)
        return begun

    @property
    def order(self) -> list[int]:
        return [key[0] for batch in self.batches for key in batch]

    def assert_idle(self) -> None:
        encoder = self.encoder
        assert (encoder.queued, encoder.queued_tokens, encoder.unshipped_bytes) == (0, 0, 0)
        assert sum(encoder.queue_depths().values()) == 0


@contextlib.asynccontextmanager
async def encoding(model: ServedModel, **options: Any) -> AsyncIterator[Encoded]:
    encoded = Encoded(model, **options)
    running = asyncio.create_task(encoded.encoder.run())
    try:
        yield encoded
        assert not running.done(), "the encoder's loop ended"
    finally:
        encoded.open.set()
        await cancelled(running)


async def finished(encoded: Encoded, *asked: Encoding) -> None:
    """Lets the thread go on, waits for blocks, and leaves them."""
    encoded.open.set()
    async with asyncio.timeout(10.0):
        await asyncio.gather(*(one.done for one in asked))
    for one in asked:
        encoded.encoder.leave(one)
    assert all(one.held_bytes == 0 for one in asked if not one.interested)
    encoded.assert_idle()


async def test_a_block_is_encoded_once_for_all_who_ask(served: ServedModel) -> None:
    async with encoding(served) as encoded:
        await encoded.busy()
        encoder = encoded.encoder
        while_queued = [encoder.request(KEYS[1], IDS, store=False, urgency=LOW) for _ in range(2)]
        while_running = encoder.request(KEYS[0], IDS, store=True, urgency=NORMAL)
        assert [shared for _, shared in (*while_queued, while_running)] == [False, True, True]
        assert while_queued[0][0] is while_queued[1][0]
        encoded.open.set()
        block = await while_running[0].done
        assert encoded.kept == {KEYS[0]: block}, "one of them stores it"
        await while_queued[0][0].done
        assert while_queued[0][0].queue_ms > 0
        assert encoded.order == [0, 1]
        assert (encoder.blocks_total, encoder.tokens_total, encoder.queued) == (2, 8, 0)
        assert while_running[0].encode_ms > 0
        assert encoder.encode_seconds(8) is not None
        assert while_running[0].interested == 2


async def test_its_birth_verifies_and_it_says_whose_it_is(served: ServedModel) -> None:
    async with encoding(served) as encoded:
        asked = encoded.ask(1, tenant="acme")
        block = await asked.done
        shape = served.geometry.shape
        [chunk] = chunk_plan(shape, len(IDS))
        checksum = chunk_checksum(KEYS[1], block.birth.birth_id, shape, len(IDS), chunk, block.data)
        assert block.birth.checksums == (checksum,)
        assert (block.token_ids, block.tenant, block.bytes) == (tuple(IDS), "acme", shape.extent_bytes(4))
        assert encoded.kept == {}


async def test_the_most_urgent_goes_first_between_two_warming_blocks(served: ServedModel) -> None:
    async with encoding(served) as encoded:
        asked = [await encoded.busy(), encoded.ask(1, WARMING), encoded.ask(2, WARMING), encoded.ask(3, NORMAL)]
        asked += [encoded.ask(4, HIGH), encoded.ask(5, LOW)]
        assert encoded.encoder.queue_depths() == {HIGH: 1, NORMAL: 1, LOW: 1, WARMING: 2}
        assert encoded.encoder.queued_tokens == 20
        await finished(encoded, *asked)
        assert encoded.batches == [[KEYS[index]] for index in (0, 4, 3, 5, 1, 2)], "on a CPU one by one"


async def test_whoever_joins_with_more_urgency_raises_the_block(served: ServedModel) -> None:
    async with encoding(served) as encoded:
        asked = [await encoded.busy(), encoded.ask(1, NORMAL), encoded.ask(2, WARMING)]
        asked += [encoded.ask(2, HIGH), encoded.ask(1, WARMING)]
        await finished(encoded, *asked)
        assert encoded.order == [0, 2, 1]


async def test_a_patience_of_ones_own(served: ServedModel) -> None:
    async with encoding(served, patience={WARMING: -5.0}) as encoded:
        await finished(encoded, await encoded.busy(), encoded.ask(1, HIGH), encoded.ask(2, WARMING))
        assert encoded.order == [0, 2, 1]


async def test_blocks_share_a_forward_where_that_is_faster(served: ServedModel) -> None:
    async with encoding(served, packed=True, batch_tokens=20) as encoded:
        first = await encoded.busy()
        asked = [encoded.ask(index, tokens=tokens) for index, tokens in ((1, 9), (2, 12), (3, 8), (4, 3), (5, 40))]
        await finished(encoded, first, *asked)
        assert encoded.batches == [[KEYS[i] for i in batch] for batch in ([0], [1, 3, 4], [2], [5])]
        assert [tokens for tokens, _ in encoded.forwards] == [4, 20, 12, 40]
        assert encoded.encoder.seconds_total == pytest.approx(sum(seconds for _, seconds in encoded.forwards))


async def test_what_nobody_wants_leaves_at_once_and_is_not_begun(served: ServedModel) -> None:
    async with encoding(served) as encoded:
        first = await encoded.busy()
        unwanted, joined = encoded.ask(1), encoded.ask(2)
        encoded.ask(2)
        encoded.encoder.leave(unwanted)
        assert unwanted.done.cancelled()
        assert (encoded.encoder.queued, encoded.encoder.queued_tokens) == (2, 4)
        encoded.encoder.leave(joined)
        again = encoded.ask(1)
        assert again is not unwanted
        await finished(encoded, first, joined, again)
        assert encoded.order == [0, 2, 1]


async def test_what_is_running_when_all_have_gone_is_kept_if_somebody_said_so(served: ServedModel) -> None:
    async with encoding(served) as encoded:
        begun = await encoded.busy()
        encoded.ask(0, store=True)
        encoded.ask(0, store=False)
        for _ in range(3):
            encoded.encoder.leave(begun)
        encoded.open.set()
        await begun.done
        assert list(encoded.kept) == [KEYS[0]]
        encoded.assert_idle()
        with pytest.raises(ValueError, match="left once"):
            encoded.encoder.leave(begun)


async def test_a_deleted_block_is_served_and_not_kept(served: ServedModel) -> None:
    async with encoding(served) as encoded:
        running, queued = await encoded.busy(), encoded.ask(1, store=True)
        encoded.ask(0, store=True)
        for key in KEYS[:3]:
            encoded.encoder.forget(key)
        encoded.open.set()
        assert ((await running.done).key, (await queued.done).key) == (KEYS[0], KEYS[1])
        assert encoded.kept == {}
        await encoded.ask(1, store=True).done
        assert list(encoded.kept) == [KEYS[1]], "asked for again, it is kept again"


async def test_the_queue_is_bounded_and_says_when_to_come_again(served: ServedModel) -> None:
    async with encoding(served, max_queued_blocks=2, max_queued_tokens=10) as encoded:
        assert encoded.encoder.encode_seconds(10) is None
        asked = [await encoded.busy(), encoded.ask(1), encoded.ask(2)]
        with pytest.raises(DrystoneError) as caught:
            encoded.ask(3, HIGH)
        assert caught.value.reason is Reason.ENCODE_QUEUE_FULL
        assert caught.value.retry_after_ms == 1000
        assert encoded.encoder.queued == 3, "what was refused is not in the books"
        asked.append(encoded.ask(1, HIGH))
        await finished(encoded, *asked)
        encoded.encoder._rate.record(8_000_000, 8_000_000.0)
        assert encoded.encoder.encode_seconds(10) == pytest.approx(10.0, rel=1e-3)
        asked = [await encoded.busy(), encoded.ask(1, tokens=9)]
        with pytest.raises(DrystoneError, match="limit 10") as caught:
            encoded.ask(3)
        assert caught.value.retry_after_ms == pytest.approx(9000, rel=1e-3)
        await finished(encoded, *asked)


@pytest.mark.parametrize("packed", [False, True])
async def test_extents_that_are_not_shipped_hold_encoding_up(served: ServedModel, *, packed: bool) -> None:
    """Never more bytes than allowed, in whole batches; what leaves makes room at once."""
    room = 10 * served.geometry.shape.token_bytes
    async with encoding(served, max_unshipped_bytes=room, packed=packed) as encoded:
        encoder = encoded.encoder
        asked = [encoded.ask(index) for index in range(5)]
        await until(lambda: encoder.blocks_total == 2)
        for _ in range(5):
            await asyncio.sleep(0.005)
        assert (encoder.blocks_total, encoder.queued) == (2, 3), "8 tokens of 10: a third block has no room"
        assert encoder.unshipped_bytes == 8 * served.geometry.shape.token_bytes
        encoder.leave(asked[0])
        await asked[2].done
        encoder.leave(asked[1])
        encoder.leave(asked[2])
        await asyncio.gather(asked[3].done, asked[4].done)
        encoder.leave(asked[3])
        encoder.leave(asked[4])
        encoded.assert_idle()


async def test_a_block_longer_than_the_room_is_encoded_when_nothing_else_is_held(served: ServedModel) -> None:
    async with encoding(served, max_unshipped_bytes=1) as encoded:
        first, second = encoded.ask(0), encoded.ask(1)
        await first.done
        await asyncio.sleep(0.01)
        assert not second.done.done()
        encoded.encoder.leave(first)
        await second.done


async def test_what_nobody_waits_for_takes_no_room(served: ServedModel) -> None:
    async with encoding(served, max_unshipped_bytes=1) as encoded:
        begun = await encoded.busy()
        encoded.encoder.leave(begun)
        await finished(encoded, encoded.ask(1))


async def test_a_failure_is_this_blocks_alone(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ServedModel.forward_kv

    def limited(model: ServedModel, ids: Any, *rest: Any) -> None:
        if len(ids) > 20:
            raise MemoryError(f"{len(ids)} rows")
        whole(model, ids, *rest)

    monkeypatch.setattr(ServedModel, "forward_kv", limited)
    async with encoding(served, packed=True) as encoded:
        first = await encoded.busy()
        bad, good = encoded.ask(1, tokens=30, store=True), encoded.ask(2, store=True)
        await_bad = asyncio.gather(bad.done, return_exceptions=True)
        encoded.open.set()
        [error] = await await_bad
        assert isinstance(error, DrystoneError)
        assert (error.reason, "30 rows" in error.message) == (Reason.BLOCK_UNAVAILABLE, True)
        encoder = encoded.encoder
        encoder.leave(bad)
        await finished(encoded, first, good)
        assert encoded.order == [0, 1, 2]
        assert list(encoded.kept) == [KEYS[2]]
        assert (encoder.failures_total, encoder.splits_total, encoder.retries_total) == (1, 1, 1)
        assert (encoder.blocks_total, encoder.tokens_total) == (2, 8)
        monkeypatch.undo()
        await finished(encoded, encoded.ask(1, tokens=30))


async def test_a_defect_of_the_thread_does_not_end_the_loop(served: ServedModel) -> None:
    async with encoding(served) as encoded:
        run, encoded._run = encoded._run, lambda _: 1 / 0  # type: ignore[assignment,return-value] # the defect
        bad = encoded.ask(0)
        with pytest.raises(DrystoneError, match="division"):
            await bad.done
        encoded._run = run
        encoded.encoder.leave(bad)
        assert encoded.encoder.failures_total == 1
        await finished(encoded, encoded.ask(0))


async def test_a_failure_that_nobody_waits_for_is_no_defect(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    unseen: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    async with encoding(served) as encoded:
        monkeypatch.setattr(ServedModel, "forward_kv", lambda *_: 1 / 0)
        encoded.encoder.leave(await encoded.busy())
        encoded.open.set()
        await until(lambda: encoded.encoder.failures_total == 1)
    gc.collect()
    await asyncio.sleep(0)
    assert unseen == []


async def test_what_cannot_be_kept_is_served(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async with encoding(served) as encoded:
        monkeypatch.setattr(encoded.encoder, "_keep", lambda _: 1 / 0)
        with structlog.testing.capture_logs() as lines:
            await finished(encoded, encoded.ask(0, store=True))
        assert [line["event"] for line in lines] == ["keep_failed"]
        assert encoded.encoder.keep_failures_total == 1


async def test_stopping_fails_what_is_open_and_waits_for_the_thread(served: ServedModel) -> None:
    encoded = Encoded(served)
    running = asyncio.create_task(encoded.encoder.run())
    begun = await encoded.busy()
    asked = [begun, *(encoded.ask(index, store=True) for index in range(1, 5))]
    running.cancel()
    await until(lambda: all(one.done.done() for one in asked))
    assert not running.done(), "the thread is in a forward, and the loop goes on"
    with pytest.raises(DrystoneError) as caught:
        encoded.ask(7)
    assert caught.value.reason is Reason.DRAINING
    encoded.open.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    for one in asked:
        error = one.done.exception()
        assert isinstance(error, DrystoneError)
        assert error.reason is Reason.DRAINING
        encoded.encoder.leave(one)
    assert not any(thread.name.startswith("encoder") for thread in threading.enumerate())
    assert (encoded.order, encoded.kept) == ([0], {})
    encoded.assert_idle()
