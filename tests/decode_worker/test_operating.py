"""Operators' hands on resident blocks: described, kept, dropped, and memory always tiles."""

from __future__ import annotations

from decode_worker.operating import describe, drop, pin
from decode_worker.pool import Pool
from decode_worker.request import Fetch, Request
from decode_worker.tail import SEGMENT_TOKENS
from tests.support.decode_parts import assert_all_free_after_eviction, assert_idle, block, make_pool, make_request


def key(name: int) -> bytes:
    return bytes([name]) * 32


def admitted(pool: Pool, *names: int, tenant: str = "", keep_tail: bool = False) -> tuple[Request, list[Fetch]]:
    request = make_request([block(name, 8) for name in names], range(3, 3 + SEGMENT_TOKENS + 5), keep_tail=keep_tail)
    request.tenant = tenant
    driven = pool.admit(request, may_move=True)
    assert driven is not None
    return request, driven


def resident(pool: Pool, *names: int, tenant: str = "") -> None:
    request, driven = admitted(pool, *names, tenant=tenant)
    for fetch in driven:
        pool.commit(fetch)
    pool.leave(request)
    request.release()


def test_blocks_are_described_with_their_tenant() -> None:
    pool = make_pool(1000)
    resident(pool, 1, tenant="acme")
    resident(pool, 2)
    assert [(one.key[0], one.tokens, one.tenant) for one in describe(pool, [])] == [(1, 8, "acme"), (2, 8, "")]
    assert [one.key[0] for one in describe(pool, [key(2), key(9)])] == [2]
    assert [one.key[0] for one in describe(pool, [], key(1))] == [2]
    assert [one.key[0] for one in describe(pool, [], b"", 1)] == [1]


def test_pinned_blocks_are_not_evicted_until_let_go() -> None:
    pool = make_pool(1000)
    resident(pool, 1, 2)
    assert pin(pool, [key(1), key(1), key(9)], held=True) == [key(1)]
    assert pin(pool, [key(1)], held=True) == []
    while pool.blocks.evict_one():
        pool.check_integrity([])
    assert [one.key[0] for one in describe(pool, []) if one.pinned] == [1]
    assert pin(pool, [key(1)], held=False) == [key(1)]
    assert_all_free_after_eviction(pool)


def test_at_most_half_of_the_pool_is_held() -> None:
    pool = make_pool(1000)
    resident(pool, *range(1, 90))
    held = pin(pool, [key(name) for name in range(1, 90)], held=True)
    assert len(held) == 62, "62 blocks of 8 tokens are the most within 500 tokens"
    pin(pool, held, held=False)
    assert_all_free_after_eviction(pool)


def test_an_idle_block_is_freed_at_once_even_when_pinned() -> None:
    pool = make_pool(1000)
    resident(pool, 1, 2)
    pin(pool, [key(1)], held=True)
    assert drop(pool, [key(1), key(7)]) == ([key(1)], pool.arena.shape.extent_bytes(8))
    assert [one.key[0] for one in describe(pool, [])] == [2]
    assert_all_free_after_eviction(pool)


def test_a_block_in_use_is_found_no_more_and_freed_by_its_last_user() -> None:
    pool = make_pool(1000)
    resident(pool, 1)
    user, driven = admitted(pool, 1)
    assert driven == []
    assert drop(pool, [key(1)]) == ([key(1)], 0)
    _, again = fresh = admitted(pool, 1)
    assert [fetch.key for fetch in again] == [key(1)], "a later request gets it anew"
    pool.leave(fresh[0])
    fresh[0].release()
    pool.check_integrity([user])
    pool.leave(user)
    user.release()
    assert_all_free_after_eviction(pool)


def test_a_block_on_its_way_is_not_kept() -> None:
    pool = make_pool(1000)
    request, [fetch] = admitted(pool, 1)
    assert drop(pool, [key(1)]) == ([key(1)], 0)
    assert pool.commit(fetch) == [request]
    pool.leave(request)
    request.release()
    assert_idle(pool)
    assert describe(pool, []) == []


def test_kept_tails_go_with_the_blocks_they_were_read_over() -> None:
    pool = make_pool(1000)
    for names in ((1, 2), (2, 3), (3,)):
        request, driven = admitted(pool, *names, keep_tail=True)
        for fetch in driven:
            pool.commit(fetch)
        tail = request.samples[0].tail
        assert tail is not None
        tail.filled = len(request.question_ids)
        assert len(pool.seal(request, request.samples[0])) == 2
        pool.leave(request)
        request.release()
    assert len(pool.sealed) == 6
    assert drop(pool, [key(2)])[1] == pool.arena.shape.extent_bytes(8 + 4 * SEGMENT_TOKENS)
    assert len(pool.sealed) == 2, "the chain over block 3 alone stays"
    assert_all_free_after_eviction(pool)
