"""A passage is encoded once and laid into any later prompt: as the answers' own statistics tell it."""

from __future__ import annotations

import asyncio

import pytest

from drystone import Block, Document
from drystone._results import Answer
from tests.support.stacks import Served

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOCUMENTS = [
    Document(title="Harbour", text="The harbour office opens at seven."),
    Document(title="Lighthouse", text="The keeper writes down the weather every evening."),
    Document(title="Wall", text="A wall of dry stone stands without mortar."),
]


def sources(answer: Answer) -> list[str]:
    assert answer.blocks[-1].role == "question"
    return [str(block.source) for block in answer.blocks[:-1]]


async def test_the_same_passages_in_another_order_cost_nothing(served: Served) -> None:
    served.evict_everywhere()
    cold = await served.client.generate("Who writes?", documents=DOCUMENTS, max_new_tokens=6)
    assert set(sources(cold)) == {"encoded"}
    assert cold.usage.blocks_encoded == 4
    assert cold.usage.cached_tokens == 0
    shape = served.stack.decode_apps[0].pool.arena.shape
    assert cold.usage.shipped_bytes == shape.extent_bytes(cold.usage.encoded_tokens)
    assert all(block.worker_id == "prefill-0" and block.encode_ms > 0 for block in cold.blocks[:-1])

    warm = await served.client.generate("When?", documents=[DOCUMENTS[i] for i in (2, 0, 1)], max_new_tokens=6)
    assert set(sources(warm)) == {"resident"}
    assert (warm.usage.blocks_encoded, warm.usage.encoded_tokens, warm.usage.shipped_bytes) == (0, 0, 0)
    assert warm.usage.blocks_reused == 4
    assert warm.usage.cached_tokens == sum(block.tokens for block in warm.blocks[:-1])
    assert {block.key for block in warm.blocks[1:-1]} == {block.key for block in cold.blocks[1:-1]}
    await served.until_idle()


async def test_a_subset_and_another_question_cost_nothing(served: Served) -> None:
    await served.client.generate("Who writes?", documents=DOCUMENTS, max_new_tokens=1)
    subset = await served.client.generate("And now?", documents=DOCUMENTS[1:2], max_new_tokens=3)
    assert (subset.usage.blocks_encoded, subset.usage.shipped_bytes) == (0, 0)


async def test_an_evicted_block_comes_from_the_prefill_workers_memory(served: Served) -> None:
    first = await served.client.generate("Who?", documents=DOCUMENTS, max_new_tokens=6)
    pool = served.stack.decode_apps[0].pool
    while pool.blocks.evict_one():
        pass
    again = await served.client.generate("Who?", documents=DOCUMENTS, max_new_tokens=6)
    assert set(sources(again)) == {"prefill_ram"}
    assert again.usage.blocks_encoded == 0
    assert again.usage.shipped_bytes == pool.arena.shape.extent_bytes(again.usage.cached_tokens)
    assert again.token_ids == first.token_ids


async def test_identical_cold_requests_encode_once(served: Served) -> None:
    served.evict_everywhere()
    before = served.stack.prefill_apps[0].encoder.blocks_total
    answers = await asyncio.gather(
        *(served.client.generate("Who writes?", documents=DOCUMENTS, max_new_tokens=4) for _ in range(2))
    )
    assert served.stack.prefill_apps[0].encoder.blocks_total - before == 4
    assert answers[0].token_ids == answers[1].token_ids
    assert sorted(answer.usage.blocks_encoded for answer in answers) == [0, 4]
    one = next(answer for answer in answers if not answer.usage.blocks_encoded)
    assert set(sources(one)) == {"shared_fetch"}
    assert one.usage.shipped_bytes == 0
    await served.until_idle()


async def test_a_passage_twice_in_one_prompt_is_one_block(served: Served) -> None:
    served.evict_everywhere()
    answer = await served.client.generate("Which?", documents=[DOCUMENTS[0]] * 2, max_new_tokens=4)
    first, second = answer.blocks[1:3]
    assert first.key == second.key
    assert (first.source, second.source) == ("encoded", "resident")
    assert second.offset == first.offset + first.tokens
    assert second.shipped_bytes == 0


async def test_a_key_in_place_of_text_gives_the_same_answer(served: Served) -> None:
    spelled = await served.client.generate("Who writes?", documents=DOCUMENTS, max_new_tokens=8)
    keys = [block.key for block in spelled.blocks if block.role == "passage"]
    by_key = await served.client.generate(
        "Who writes?", documents=[Document(key=key.upper()) for key in keys], max_new_tokens=8
    )
    assert by_key.token_ids == spelled.token_ids
    assert by_key.text == spelled.text
    assert [block.key for block in by_key.blocks] == [block.key for block in spelled.blocks]
    exact = await served.client.generate(blocks=[Block("alpha beta"), Block("gamma")], max_new_tokens=8)
    named = await served.client.generate(blocks=[Block(key=exact.blocks[0].key), Block("gamma")], max_new_tokens=8)
    assert named.token_ids == exact.token_ids


async def test_full_blocks_are_not_kept_unless_asked(served: Served) -> None:
    served.evict_everywhere()
    options = {"messages": [{"role": "user", "content": "Where is the harbour?"}], "max_new_tokens": 4}
    first = await served.client.generate(**options)  # type: ignore[arg-type] # one dict for both
    assert first.attention == "full"
    assert [str(block.role) for block in first.blocks] == ["full", "question"]
    await served.until_idle()
    assert len(served.stack.decode_apps[0].pool.blocks) == 0
    assert served.stack.prefill_apps[0].holdings.store.keys() == set()
    again = await served.client.generate(**options)  # type: ignore[arg-type] # likewise
    assert again.usage.blocks_encoded == 1
    assert again.token_ids == first.token_ids


async def test_two_conversations_that_are_alike_share_and_leave_nothing(served: Served) -> None:
    served.evict_everywhere()
    messages = [{"role": "user", "content": "Where is the lighthouse?"}]
    answers = await asyncio.gather(*(served.client.generate(messages=messages, max_new_tokens=4) for _ in range(3)))
    assert len({answer.token_ids for answer in answers}) == 1
    await served.until_idle()
    assert len(served.stack.decode_apps[0].pool.blocks) == 0


async def test_figures_add_up(served: Served) -> None:
    status = await served.client.status()
    assert [(process.role, process.state) for process in status] == [
        ("gateway", "ready"),
        ("decode", "ready"),
        ("prefill", "ready"),
    ]
    decode, prefill = status[1].values, status[2].values
    assert decode["num_requests_running"] == decode["num_requests_waiting"] == decode["reservations_open"] == 0
    assert decode["pool_pinned_bytes"] == 0
    assert decode["received_bytes_total"] == prefill["shipped_bytes_total"] > 0
    assert decode["chunks_refused_total"] == prefill["chunks_resent_total"] == 0
    assert prefill["blocks_encoded_total"] > 0
