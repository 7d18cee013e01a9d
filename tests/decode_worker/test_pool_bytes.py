"""Memory is what sharing promises: passages once, and a tail for each."""

from __future__ import annotations

from decode_worker.tail import SEGMENT_TOKENS, segments_for
from shared.engine.served_model import ServedModel
from tests.decode_worker.test_engine import block, driven, reservations
from tests.support.decode_parts import assert_idle
from tests.support.stacks import until

REQUESTS = 64


async def test_sixty_four_requests_over_the_same_passages_hold_them_once(model: ServedModel) -> None:
    passages = [block(number, 20 + number) for number in range(1, 11)]
    tail = segments_for(3 + 40) * SEGMENT_TOKENS
    passage_tokens = sum(len(ref.token_ids) for ref in passages)
    async with driven(model, tokens=passage_tokens + REQUESTS * tail, max_waiting=0) as run:
        orders = [[*passages[number % 10 :], *passages[: number % 10]] for number in range(REQUESTS)]
        requests = [run.submit(order, max_new_tokens=40) for order in orders]
        arena = run.pool.arena
        assert arena.used_bytes == arena.capacity_bytes == arena.shape.extent_bytes(passage_tokens + REQUESTS * tail)
        first, sink = requests[0]
        run.engine.encode_here(first, reservations(sink))
        await until(lambda: all(len(heard.token_ids()) > 1 for _, heard in requests), 60.0)
        assert arena.used_bytes == arena.capacity_bytes
        await run.ended(*(request for request, _ in requests))
        assert arena.used_bytes == arena.shape.extent_bytes(passage_tokens)
        assert_idle(run.pool)
