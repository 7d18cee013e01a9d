"""The pool under any order of admissions, commits, ends and drops: pins balance, and idle means idle."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode_worker.blocks import Block
from decode_worker.pool import Pool
from decode_worker.request import Fetch, Request
from decode_worker.tail import SEGMENT_TOKENS
from shared.errors import DrystoneError
from tests.support.decode_parts import assert_all_free_after_eviction, assert_idle, block, make_pool, make_request

CAPACITY_TOKENS = 3 * SEGMENT_TOKENS + 20
SIZES = (1, 2, 3, 5, 8, 13, 40, 90, 150)


class PoolMachine(RuleBasedStateMachine):
    """Plays the engine: every block's extent is filled with a number of its own and must keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool: Pool = make_pool(CAPACITY_TOKENS)
        self.running: list[Request] = []
        self.encoding: list[Fetch] = []

    @rule(
        names=st.lists(st.integers(0, len(SIZES) - 1), max_size=4),
        new_tokens=st.integers(1, 2 * SEGMENT_TOKENS),
        store=st.booleans(),
    )
    def admit(self, names: list[int], new_tokens: int, *, store: bool) -> None:
        blocks = [block(name, SIZES[name], store=store) for name in names]
        request = make_request(blocks, max_new_tokens=new_tokens)
        try:
            self.pool.refuse_if_never(request)
        except DrystoneError:
            return
        held = [list(fetch.waiters) for fetch in self.pool.fetches.all()]
        free = self.pool.arena.free_records + self.pool.blocks.evictable_records()
        driven = self.pool.admit(request, may_move=not self.encoding)
        if driven is None:
            assert self.running or self.encoding, "an idle pool has room for everything that ever fits"
            assert [list(fetch.waiters) for fetch in self.pool.fetches.all()] == held
            assert self.pool.arena.free_records + self.pool.blocks.evictable_records() == free
            assert (request.pins, request.fetches, request.samples[0].tail) == ([], set(), None)
            return
        assert request.samples[0].tail is not None
        self.running.append(request)

    @precondition(lambda self: self.arriving())
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        fetch = data.draw(st.sampled_from(self.arriving()))
        self.pool.arena.view(fetch.extent).fill_(fetch.key[0] + 1)
        ready = self.pool.commit(fetch)
        assert all(not request.fetches for request in ready)
        for request in ready:
            self.pool.place(request)

    @precondition(lambda self: self.arriving())
    @rule(data=st.data())
    def begin_to_encode_here(self, data: st.DataObject) -> None:
        fetch = data.draw(st.sampled_from(self.arriving()))
        fetch.restart()
        assert fetch.landing.seize()
        self.encoding.append(fetch)

    @precondition(lambda self: self.encoding)
    @rule(data=st.data())
    def end_to_encode_here(self, data: st.DataObject) -> None:
        fetch = data.draw(st.sampled_from(self.encoding))
        self.encoding.remove(fetch)
        fetch.landing.release()
        self.pool.arena.view(fetch.extent).fill_(fetch.key[0] + 1)
        if not fetch.waiters:
            self.pool.give_up(fetch)
            return
        for request in self.pool.commit(fetch):
            self.pool.place(request)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """Finish, cancel and failure are one way out, whatever has arrived by then."""
        request = data.draw(st.sampled_from(self.running))
        self.running.remove(request)
        for fetch in self.pool.leave(request):
            assert fetch.waiters
            fetch.restart()
        request.release()
        request.release()

    @precondition(lambda self: len(self.pool.blocks))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        found: Block = data.draw(st.sampled_from(self.pool.blocks.all()))
        freed = self.pool.blocks.drop(found.key)
        assert (freed == 0) is (found.pins > 0)

    @rule()
    def evict(self) -> None:
        self.pool.blocks.evict_one()

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity(self.running)
        if not self.running and not self.encoding:
            assert_idle(self.pool)

    @invariant()
    def nobody_writes_into_another(self) -> None:
        for found in self.pool.blocks.all():
            assert bool((self.pool.arena.view(found.extent) == found.key[0] + 1).all())
        for request in self.running:
            for placement in request.placements:
                assert bool((self.pool.arena.view(placement.extent) == placement.key[0] + 1).all())

    def arriving(self) -> list[Fetch]:
        return [fetch for fetch in self.pool.fetches.all() if fetch not in self.encoding]

    def teardown(self) -> None:
        while self.running:
            request = self.running.pop()
            self.pool.leave(request)
            request.release()
        for fetch in self.encoding:
            fetch.landing.release()
            self.pool.give_up(fetch)
        assert_all_free_after_eviction(self.pool)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=50, stateful_step_count=30)
