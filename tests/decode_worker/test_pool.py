"""Admission takes everything or nothing; fetches have waiters and epochs; nothing stays behind."""

from __future__ import annotations

import random

import pytest

from decode_worker.pool import Pool
from decode_worker.request import Fetch, Request
from decode_worker.tail import SEGMENT_TOKENS
from drystone.v1.statistics_pb2 import BlockSource
from shared.errors import DrystoneError, Reason
from shared.internal.v1.transfer_pb2 import RefusalReason
from tests.support.decode_parts import (
    SHAPE,
    assert_all_free_after_eviction,
    assert_idle,
    block,
    make_pool,
    make_request,
)


def finish(pool: Pool, request: Request) -> list[Fetch]:
    orphaned = pool.leave(request)
    request.release()
    return orphaned


def admitted(pool: Pool, *names: int, tokens: int = 8) -> tuple[Request, list[Fetch]]:
    request = make_request([block(name, tokens) for name in names])
    driven = pool.admit(request, may_move=True)
    assert driven is not None
    return request, driven


def resident(pool: Pool, *names: int, tokens: int = 8) -> None:
    request, driven = admitted(pool, *names, tokens=tokens)
    for fetch in driven:
        pool.commit(fetch)
    finish(pool, request)
    assert_idle(pool)


def test_a_cold_request_drives_its_fetches_and_starts_when_all_are_in() -> None:
    pool = make_pool(200)
    request, driven = admitted(pool, 1, 2)
    assert [fetch.key[0] for fetch in driven] == [1, 2]
    assert request.pins == []
    assert pool.commit(driven[0]) == []
    assert pool.commit(driven[1]) == [request]
    assert {pin.block.key[0] for pin in request.pins} == {1, 2}
    pool.place(request)
    assert [(p.key[0], p.offset, p.extent.tokens) for p in request.placements] == [(1, 0, 8), (2, 8, 8)]
    pool.check_integrity([request])
    finish(pool, request)
    assert_idle(pool)
    assert len(pool.blocks) == 2
    assert_all_free_after_eviction(pool)


def test_a_warm_request_drives_nothing() -> None:
    pool = make_pool(200)
    resident(pool, 1, 2)
    request, driven = admitted(pool, 2, 1)
    assert driven == []
    sources = {arrival.source for arrival in request.arrivals.values()}
    assert sources == {BlockSource.BLOCK_SOURCE_RESIDENT}
    finish(pool, request)
    assert_idle(pool)


def test_a_repeated_block_is_held_once_and_placed_twice() -> None:
    pool = make_pool(200)
    request, driven = admitted(pool, 1, 2, 1)
    assert len(driven) == 2
    for fetch in driven:
        pool.commit(fetch)
    assert len(request.pins) == 2
    pool.place(request)
    assert [(p.key[0], p.offset) for p in request.placements] == [(1, 0), (2, 8), (1, 16)]
    assert request.placements[0].extent is request.placements[2].extent
    finish(pool, request)
    assert_idle(pool)


def test_the_second_request_joins_the_fetch() -> None:
    pool = make_pool(300)
    first, driven = admitted(pool, 1)
    second, none = admitted(pool, 1)
    assert none == []
    assert driven[0].waiters == [first, second]
    assert pool.commit(driven[0]) == [first, second]
    assert pool.blocks.pins == 2
    pool.check_integrity([first, second])
    finish(pool, first)
    finish(pool, second)
    assert_idle(pool)


def test_no_room_holds_nothing() -> None:
    pool = make_pool(SEGMENT_TOKENS + 20)
    running, driven = admitted(pool, 1, tokens=16)
    before = pool.arena.free_records
    joined = make_request([block(1, 16), block(2, 4)])
    assert pool.admit(joined, may_move=True) is None
    assert driven[0].waiters == [running]
    assert (joined.pins, joined.fetches, joined.arrivals, joined.samples[0].tail) == ([], set(), {}, None)
    assert pool.arena.free_records == before
    assert len(pool.fetches) == 1
    pool.check_integrity([running])
    finish(pool, running)
    assert_idle(pool)
    assert pool.admit(joined, may_move=True) is not None
    finish(pool, joined)
    assert_idle(pool)


def test_a_request_without_room_evicts_nothing() -> None:
    pool = make_pool(2 * SEGMENT_TOKENS + 16)
    resident(pool, 1, 2)
    running, _ = admitted(pool, 1)
    waiting = make_request([block(2, 8), block(3, 80)])
    assert pool.admit(waiting, may_move=True) is None
    assert pool.blocks.evictions == 0
    assert len(pool.blocks) == 2
    finish(pool, running)
    assert_idle(pool)


def test_a_request_never_evicts_its_own_blocks() -> None:
    pool = make_pool(2 * 8 + 3 * SEGMENT_TOKENS)
    resident(pool, 1, 2)
    resident(pool, 3, tokens=SEGMENT_TOKENS)
    resident(pool, 5, tokens=SEGMENT_TOKENS)
    # Block 1 is the least recently used, and the last that this request names.
    request = make_request([block(4, 70), block(2, 8), block(1, 8)])
    driven = pool.admit(request, may_move=True)
    assert driven is not None
    assert [fetch.key[0] for fetch in driven] == [4]
    assert [found.key[0] for found in pool.blocks.all()] == [1, 2]
    finish(pool, request)
    assert_idle(pool)


def test_what_fits_beside_its_own_blocks_leaves_them_alone() -> None:
    pool = make_pool(SEGMENT_TOKENS + 24)
    resident(pool, 1, 2, 3)
    # Only when block 3 is gone is there a run for block 4 beside the tail: found by the second try.
    request, driven = admitted(pool, 4, 2, 1)
    assert [fetch.key[0] for fetch in driven] == [4]
    finish(pool, request)
    assert_all_free_after_eviction(pool)


def test_blocks_are_moved_when_bytes_suffice_and_no_run_does() -> None:
    pool = make_pool(SEGMENT_TOKENS + 80)
    first = make_request([block(1, 40), block(2, 8)], max_new_tokens=1)
    for fetch in pool.admit(first, may_move=True) or ():
        pool.arena.view(fetch.extent).fill_(fetch.key[0])
        pool.commit(fetch)
    finish(pool, first)
    pool.blocks.drop(bytes([1]) * 32)
    # 144 tokens in all, exactly what it needs, but block 2 at 40 parts them into runs of 40 and 96.
    request = make_request([block(4, 72), block(2, 8)])
    assert pool.admit(request, may_move=False) is None
    pool.check_integrity([])
    driven = pool.admit(request, may_move=True)
    assert driven is not None
    assert [fetch.key[0] for fetch in driven] == [4]
    assert bool((pool.arena.view(request.pins[0].block.extent) == 2).all())
    assert pool.arena.moved_bytes > 0
    finish(pool, request)
    assert_all_free_after_eviction(pool)


def test_what_fits_by_bytes_is_admitted_with_nine_tenths_of_the_pool_pinned_in_random_sizes() -> None:
    draw = random.Random(3)
    pool = make_pool(6000)
    held: list[Request] = []
    number = 0
    while pool.arena.free_records > 0.3 * pool.arena.capacity_records:
        number += 1
        request = make_request([block(number % 250, draw.randint(1, 150))])
        for fetch in pool.admit(request, may_move=True) or ():
            pool.arena.view(fetch.extent).fill_(fetch.key[0])
            pool.commit(fetch)
        held.append(request)
    while pool.arena.free_records < 0.1 * pool.arena.capacity_records or len(held) % 3:
        finish(pool, held.pop(draw.randrange(len(held))))
        while pool.blocks.evict_one():
            pass
    tokens = pool.arena.free_records // SHAPE.layers - SEGMENT_TOKENS
    assert tokens > 100
    big = make_request([block(251, tokens)], max_new_tokens=1)
    driven = pool.admit(big, may_move=True)
    assert driven is not None
    pool.check_integrity([*held, big])
    for request in held:
        pool.place(request)
        for placement in request.placements:
            assert bool((pool.arena.view(placement.extent) == placement.key[0]).all())
    for request in [*held, big]:
        finish(pool, request)
    assert_all_free_after_eviction(pool)


def test_idle_blocks_make_room() -> None:
    pool = make_pool(SEGMENT_TOKENS + 24)
    resident(pool, 1, 2, 3)
    request, driven = admitted(pool, 4, tokens=20)
    assert len(driven) == 1
    assert pool.blocks.evictions == 3
    finish(pool, request)
    assert_idle(pool)


def test_what_never_fits_is_refused_with_both_numbers() -> None:
    pool = make_pool(SEGMENT_TOKENS + 16)
    pool.refuse_if_never(make_request([block(1, 16), block(1, 16)]))
    with pytest.raises(DrystoneError) as caught:
        pool.refuse_if_never(make_request([block(1, 16), block(2, 1)]))
    assert caught.value.reason is Reason.REQUEST_TOO_LARGE_FOR_POOL
    assert caught.value.metadata == {
        "needed_bytes": str(SHAPE.extent_bytes(SEGMENT_TOKENS + 17)),
        "capacity_bytes": str(SHAPE.extent_bytes(SEGMENT_TOKENS + 16)),
    }
    with pytest.raises(DrystoneError, match="raise --pool-bytes"):
        pool.refuse_if_never(make_request([], max_new_tokens=SEGMENT_TOKENS + 16))


def test_the_next_waiter_inherits_the_fetch_with_a_new_epoch() -> None:
    pool = make_pool(400)
    driver, [fetch] = admitted(pool, 1)
    waiter, _ = admitted(pool, 1)
    stale = pool.fetches.reservation(fetch)
    landing = fetch.landing
    landing.birth_id, landing.taken, landing.received_bytes = b"b" * 16, {0}, 10
    assert finish(pool, driver) == [fetch]
    fetch.restart()
    assert (fetch.waiters, landing.birth_id, landing.taken, landing.received_bytes) == ([waiter], b"", set(), 0)
    assert pool.fetches.find(stale) == RefusalReason.REFUSAL_REASON_STALE_EPOCH
    assert pool.fetches.find(pool.fetches.reservation(fetch)) is fetch
    assert finish(pool, waiter) == []
    assert_idle(pool)
    assert pool.fetches.find(stale) == RefusalReason.REFUSAL_REASON_UNKNOWN_RESERVATION


def test_a_waiter_that_does_not_drive_leaves_quietly() -> None:
    pool = make_pool(400)
    driver, [fetch] = admitted(pool, 1)
    waiter, _ = admitted(pool, 1)
    assert finish(pool, waiter) == []
    assert (fetch.waiters, fetch.epoch) == ([driver], 1)
    finish(pool, driver)
    assert_idle(pool)


def test_an_extent_that_is_being_written_outlives_its_waiters() -> None:
    pool = make_pool(200)
    request, [fetch] = admitted(pool, 1)
    assert fetch.landing.seize()
    assert finish(pool, request) == []
    assert len(pool.fetches) == 1
    pool.check_integrity([])
    fetch.landing.release()
    pool.give_up(fetch)
    assert_idle(pool)


def test_another_life_is_told_apart() -> None:
    pool = make_pool(200)
    request, [fetch] = admitted(pool, 1)
    reservation = pool.fetches.reservation(fetch)
    assert reservation.bytes == SHAPE.extent_bytes(8)
    reservation.worker.incarnation += 1
    assert pool.fetches.find(reservation) == RefusalReason.REFUSAL_REASON_STALE_INCARNATION
    finish(pool, request)


@pytest.mark.parametrize(("first", "second"), [(False, True), (True, False), (True, True)])
def test_a_block_stays_when_any_of_its_users_stores_it(*, first: bool, second: bool) -> None:
    pool = make_pool(400)
    one, two = (make_request([block(1, 8, store=store)]) for store in (first, second))
    driven = pool.admit(one, may_move=True)
    assert driven is not None
    pool.admit(two, may_move=True)
    pool.commit(driven[0])
    finish(pool, one)
    finish(pool, two)
    assert_idle(pool)
    assert len(pool.blocks) == 1


def test_storing_a_block_that_is_there_for_one_request_keeps_it() -> None:
    pool = make_pool(400)
    passing, keeping = (make_request([block(1, 8, store=store)]) for store in (False, True))
    driven = pool.admit(passing, may_move=True)
    assert driven is not None
    pool.commit(driven[0])
    assert pool.admit(keeping, may_move=True) == []
    finish(pool, keeping)
    finish(pool, passing)
    assert len(pool.blocks) == 1
    assert_all_free_after_eviction(pool)
