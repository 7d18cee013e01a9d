"""Streams, seeds and stops through the whole way; and the same answer whoever runs beside it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from decode_worker.scheduler import StepBudget
from drystone import Answer, Completed, Document, SampleFinished, Started, TextDelta
from tests.support.stacks import Served
from tests.support.tiny_models import tiny_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT: dict[str, Any] = {"blocks": ["A wall of dry stone.", "alpha beta gamma", "What is it?"]}


async def greedy(served: Served, new: int = 40) -> Answer:
    return await served.client.generate(**PROMPT, max_new_tokens=new, ignore_eos=True)


async def test_events_come_in_order_and_add_up(served: Served) -> None:
    events = [event async for event in served.client.stream(**PROMPT, max_new_tokens=12, ignore_eos=True)]
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Completed)
    assert isinstance(events[-2], SampleFinished)
    deltas = [event for event in events[1:-2] if isinstance(event, TextDelta)]
    assert len(deltas) == len(events) - 3
    ids = [token for delta in deltas for token in delta.token_ids]
    assert len(ids) == 12 == events[-2].completion_tokens == events[-1].usage.completion_tokens
    assert events[-2].finish_reason == "length"
    text = "".join(delta.text for delta in deltas)
    whole = tiny_tokenizer().decode(ids, skip_special_tokens=True)
    assert whole.startswith(text)
    assert whole[len(text) :].strip("\N{REPLACEMENT CHARACTER}") == ""
    blocks = events[0].blocks
    assert [block.offset for block in blocks] == [
        sum(block.tokens for block in blocks[:index]) for index in range(len(blocks))
    ]
    assert events[0].prompt_tokens == sum(block.tokens for block in blocks)


async def test_deltas_are_whole_characters(served: Served) -> None:
    """A tiny random model says many bytes that are part of a character, and some that never become one."""
    async for event in served.client.stream(**PROMPT, max_new_tokens=200, ignore_eos=True, temperature=4.0, seed=3):
        if isinstance(event, TextDelta):
            assert event.text.encode("utf-8").decode("utf-8") == event.text
            assert not event.text.endswith("\N{REPLACEMENT CHARACTER}")


async def test_max_new_tokens(served: Served) -> None:
    whole = await greedy(served)
    for new in (1, 2, 7):
        answer = await greedy(served, new)
        assert answer.token_ids == whole.token_ids[:new]
        assert answer.finish_reason == "length"
        assert answer.usage.completion_tokens == new


async def test_the_models_own_end(served: Served) -> None:
    ends = tiny_tokenizer().eos_token_id
    for seed in range(40):
        answer = await served.client.generate(**PROMPT, max_new_tokens=60, temperature=3.0, seed=seed)
        assert ends not in answer.token_ids
        if answer.finish_reason == "stop":
            assert answer.usage.completion_tokens == len(answer.token_ids) < 60
            break
    else:
        pytest.fail("no draw ended by itself")
    on = await served.client.generate(**PROMPT, max_new_tokens=60, temperature=3.0, seed=seed, ignore_eos=True)
    assert on.finish_reason == "length"
    assert on.token_ids[len(answer.token_ids)] == ends
    least = await served.client.generate(**PROMPT, max_new_tokens=60, temperature=3.0, seed=seed, min_new_tokens=60)
    assert len(least.token_ids) == 60
    assert ends not in least.token_ids


async def test_stop_strings(served: Served) -> None:
    whole = (await greedy(served)).text
    for start, length in ((3, 1), (5, 2), (9, 4)):
        stop = whole[start : start + length]
        answer = await served.client.generate(**PROMPT, max_new_tokens=40, ignore_eos=True, stop=[stop, "\0never"])
        assert answer.text == whole[: whole.index(stop)]
        assert answer.finish_reason == "stop"
        assert answer.samples[0].matched_stop == stop
    never = await served.client.generate(**PROMPT, max_new_tokens=40, ignore_eos=True, stop=whole[-1] + "\0")
    assert never.text == whole
    assert never.finish_reason == "length"


async def test_stop_tokens(served: Served) -> None:
    whole = (await greedy(served)).token_ids
    token = next(token for token in whole[3:] if token not in whole[:3])
    async with served.client.stream(**PROMPT, max_new_tokens=40, ignore_eos=True, stop_token_ids=[token]) as stream:
        ended = [event async for event in stream if isinstance(event, SampleFinished)]
        answer = await stream.read()
    assert answer.token_ids == whole[: whole.index(token)]
    assert ended[0].matched_stop_token_id == token
    assert ended[0].finish_reason == "stop"


async def test_the_same_seed_draws_the_same_answer(served: Served) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.2, "top_p": 0.95, "ignore_eos": True}
    first = await served.client.generate(**PROMPT, **options, seed=11)
    again = await served.client.generate(**PROMPT, **options, seed=11)
    other = await served.client.generate(**PROMPT, **options, seed=12)
    assert first.token_ids == again.token_ids != other.token_ids
    assert first.seed == 11
    drawn = await served.client.generate(**PROMPT, **options)
    repeated = await served.client.generate(**PROMPT, **options, seed=drawn.seed)
    assert repeated.token_ids == drawn.token_ids
    zero = await served.client.generate(**PROMPT, **options, seed=0)
    assert zero.seed == 0


def mixed(number: int) -> dict[str, Any]:
    """Prompts of every kind that share some of their blocks, greedy and drawn, long and short."""
    passages = [f"Passage {index % 4} tells of stone {index % 4} and of the harbour." for index in range(number)]
    documents = [Document(title=f"T{index % 3}", text=text) for index, text in enumerate(passages[: 1 + number % 4])]
    options: dict[str, Any] = {"max_new_tokens": 3 + number * 2 % 17, "ignore_eos": True}
    if number % 2:
        options |= {"temperature": 0.9, "top_k": 40, "seed": number}
    match number % 4:
        case 0:
            return {"blocks": [*passages[:3], f"Question {number}?"], **options}
        case 1:
            return {"question": f"Which one, {number}?", "documents": documents or ["lone"], **options}
        case 2:
            return {"messages": [{"role": "user", "content": f"Say {number}."}], "documents": documents, **options}
        case _:
            return {"messages": [{"role": "user", "content": "word " * 30 + str(number)}], **options}


async def test_twenty_at_once_answer_as_each_alone(served: Served) -> None:
    requests = [mixed(number) for number in range(20)]
    alone = [await served.client.generate(**request) for request in requests]
    served.evict_everywhere()
    steps = served.stack.decode_apps[0].engine.steps_total
    together = await asyncio.gather(*(served.client.generate(**request) for request in requests))
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    most = max(len(answer.token_ids) for answer in together)
    taken = served.stack.decode_apps[0].engine.steps_total - steps
    assert taken < sum(len(answer.token_ids) for answer in together) / 2, "they ran one after another"
    assert taken >= most
    await served.until_idle()


async def test_a_drawn_answer_does_not_depend_on_who_is_beside_it(served: Served) -> None:
    options: dict[str, Any] = {"max_new_tokens": 25, "temperature": 1.5, "seed": 4, "ignore_eos": True}
    alone = await served.client.generate(**PROMPT, **options)
    crowd = [asyncio.create_task(served.client.generate(**mixed(number))) for number in range(12)]
    beside = await served.client.generate(**PROMPT, **options)
    await asyncio.gather(*crowd)
    assert beside.token_ids == alone.token_ids


async def test_a_long_question_runs_in_chunks_beside_others(served: Served) -> None:
    question = "stone wall harbour " * 210
    alone = await served.client.generate(blocks=["alpha", question], max_new_tokens=5)
    assert alone.blocks[-1].tokens > 2 * StepBudget().tokens
    answers = await asyncio.gather(
        served.client.generate(blocks=["alpha", question], max_new_tokens=5),
        served.client.generate(blocks=["gamma", question], max_new_tokens=5),
        served.client.generate(**PROMPT, max_new_tokens=30, ignore_eos=True),
    )
    assert answers[0].token_ids == alone.token_ids
    assert answers[2].token_ids == (await greedy(served, 30)).token_ids
