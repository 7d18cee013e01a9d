"""The block store under any order of events, over tiers that are slow, fail and lose what they were given.

The model is what a caller may rely on: a block that was put is found or not found, never mistaken for another; one
that was deleted is not found until it is put again, whatever was under way; pins and budgets hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.block_store import BlockStore
from prefill_worker.tiers.ram import RamTier
from shared.errors import DrystoneError
from shared.internal.v1.common_pb2 import SHIP_SOURCE_OBJECT_STORE
from tests.support.tier_parts import SIZE, TOKENS, FakeTier, StrictLedger, cost, key_of, tiny_block

NUMBERS = st.integers(0, 5)
LEVELS = st.integers(0, 1)
QUEUE_BLOCKS = 6
WAIT = 5.0


class StoreUnderAnyOrder(RuleBasedStateMachine):
    @initialize(ram=st.integers(0, 3), disk=st.integers(0, 4))
    def begin(self, ram: int, disk: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.tiers = (FakeTier(disk * SIZE), FakeTier(None, SHIP_SOURCE_OBJECT_STORE))
        self.ram = RamTier(StrictLedger(ram * SIZE, cost))
        self.store = BlockStore(self.ram, self.tiers, write_queue_bytes=QUEUE_BLOCKS * SIZE, sweep_seconds=0)
        # Births by key: put and not deleted, and deleted for good.
        self.put: dict[bytes, list[StoredBlock]] = {key_of(number): [] for number in range(6)}
        self.deleted: list[StoredBlock] = []
        self.pinned: set[bytes] = set()
        self.tasks: list[asyncio.Task[None]] = []
        self.run(self.store.start())

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        self.loop.run_until_complete(work)

    def begin_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(work)
        self.tasks.append(task)
        self.steps(1)
        return task

    @rule(number=NUMBERS)
    def puts(self, number: int) -> None:
        block = tiny_block(number)
        self.put[block.key].append(block)
        self.store.put(block)

    @rule(number=NUMBERS)
    def looks_in_memory(self, number: int) -> None:
        self.check(key_of(number), self.store.in_memory(key_of(number)))

    @rule(number=NUMBERS, tokens=st.sampled_from([TOKENS, None]))
    def finds(self, number: int, tokens: int | None) -> None:
        self.begin_task(self.find(key_of(number), tokens))

    async def find(self, key: bytes, tokens: int | None) -> None:
        found = await self.store.find(key, tokens)
        self.check(key, None if found is None else found[0])

    def check(self, key: bytes, block: StoredBlock | None) -> None:
        if block is not None:
            assert not any(block is gone for gone in self.deleted), "a deleted block came back"
            assert any(block is one for one in self.put[key]), "it is not what was put"

    @rule(number=NUMBERS)
    def deletes(self, number: int) -> None:
        self.begin_task(self.delete(key_of(number)))

    async def delete(self, key: bytes) -> None:
        """From its beginning on nothing that was put before may be found; what is put meanwhile is new."""
        old, self.put[key] = self.put[key], []
        self.deleted += old
        self.pinned.discard(key)
        try:
            await self.store.delete(key)
        except DrystoneError:
            # It was told: what it could not delete may be found again.
            self.deleted = [block for block in self.deleted if not any(block is one for one in old)]
            self.put[key] += old

    @rule(number=NUMBERS)
    def waits_until_kept(self, number: int) -> None:
        self.begin_task(self.keep(key_of(number)))

    async def keep(self, key: bytes) -> None:
        await self.store.kept(key)

    @rule(number=NUMBERS, pinned=st.booleans())
    def pins(self, number: int, pinned: bool) -> None:  # noqa: FBT001 - drawn
        key = key_of(number)
        assert self.store.pin(key, pinned=pinned) == (pinned != (key in self.pinned))
        (self.pinned.add if pinned else self.pinned.discard)(key)

    @rule(pick=st.integers(0, 50))
    def cancels_someone(self, pick: int) -> None:
        """Askers and keepers; a delete that is cancelled promises nothing."""
        waiting = [task for task in self.tasks if not task.done() and "delete" not in str(task.get_coro())]
        if waiting:
            waiting[pick % len(waiting)].cancel()
            self.steps(1)

    @rule(level=LEVELS, shut=st.booleans())
    def gates(self, level: int, shut: bool) -> None:  # noqa: FBT001 - drawn
        gate = self.tiers[level].gate
        (gate.clear if shut else gate.set)()

    @rule(level=LEVELS, broken=st.booleans())
    def breaks(self, level: int, broken: bool) -> None:  # noqa: FBT001 - drawn
        self.tiers[level].broken = broken

    @rule(level=LEVELS, paying=st.booleans())
    def pays(self, level: int, paying: bool) -> None:  # noqa: FBT001 - drawn
        self.tiers[level].paying = paying

    @rule(level=LEVELS, number=NUMBERS)
    def loses(self, level: int, number: int) -> None:
        self.tiers[level].blocks.pop(key_of(number), None)

    @rule(count=st.integers(1, 30))
    def steps(self, count: int) -> None:
        async def turns() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        self.run(turns())

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "store"):
            return
        for tier in self.store.tiers:
            tier.ledger.check_integrity()
            for entry in tier.ledger.entries():
                assert entry.pinned <= (entry.key in self.pinned)
        assert {entry.key for entry in self.ram.ledger.entries()} == set(self.ram._blocks)
        assert self.store.pending_bytes <= QUEUE_BLOCKS * SIZE
        assert [tier.overlaps for tier in self.tiers] == [0, 0]
        pending = [write.block for behind in self.store._behind for write in behind._pending.values()]
        assert self.store.pending_bytes == sum(block.bytes for block in pending)
        for task in self.tasks:
            if task.done() and not task.cancelled():
                task.result()

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            self.run(self.end())
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.steps(10)
            self.loop.close()

    async def end(self) -> None:
        """With every tier well again everything ends, and nothing deleted is anywhere."""
        for tier in self.tiers:
            tier.gate.set()
            tier.broken = False
        async with asyncio.timeout(WAIT):
            await asyncio.gather(*self.tasks, return_exceptions=True)
            for key in self.put:
                await self.store.kept(key)
                await self.find(key, TOKENS)
        for tier in self.tiers:
            for key, block in tier.blocks.items():
                self.check(key, block)
        for key in self.pinned:
            assert all(entry.pinned for _, entry in self.store.entries_of(key))
        await self.store.close(WAIT)
        assert self.store.pending_bytes == 0
        assert [len(one) for one in (self.store._reads, self.store._reading, self.store._deleting)] == [0, 0, 0]
        assert asyncio.all_tasks() == {asyncio.current_task()}
        for task in self.tasks:
            if not task.cancelled():
                task.result()


TestStoreUnderAnyOrder = StoreUnderAnyOrder.TestCase
TestStoreUnderAnyOrder.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
