"""Samples, shapes, log probabilities, interrupted streams and conversations, through the whole way."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from prometheus_client import generate_latest

from drystone import DrystoneError
from drystone.v1 import generation_pb2 as v1
from drystone.v1.prompt_pb2 import BlockInput, BlocksPrompt
from drystone.v1.sampling_pb2 import Resume, ResumeSample, SamplingParams
from shared.errors import Reason
from tests.support.errors import failure_of
from tests.support.stacks import Served

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT: dict[str, Any] = {"blocks": ["A wall of dry stone.", "alpha beta gamma", "What is it?"]}
DRAWN: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.3, "seed": 5, "ignore_eos": True}


def raw(question: str, **rest: Any) -> v1.GenerateRequest:
    sampling = SamplingParams(**{**DRAWN, **rest.pop("sampling", {})})
    texts = ["A wall of dry stone.", "alpha beta gamma", question]
    return v1.GenerateRequest(
        blocks=BlocksPrompt(blocks=[BlockInput(text=text) for text in texts]), sampling=sampling, **rest
    )


async def said(served: Served, asked: v1.GenerateRequest) -> list[v1.GenerateResponse]:
    return [event async for event in served.raw.Generate(asked, timeout=20.0)]


def tokens(events: list[v1.GenerateResponse], sample: int = 0) -> list[int]:
    return [token for e in events if e.delta.sample_index == sample for token in e.delta.token_ids]


def text(events: list[v1.GenerateResponse], sample: int = 0) -> str:
    return "".join(e.delta.text for e in events if e.delta.sample_index == sample)


async def test_samples_are_counted_and_told_apart(served: Served) -> None:
    several = await served.client.generate(**PROMPT, **DRAWN, n=3)
    alone = await served.client.generate(**PROMPT, **DRAWN)
    assert several.token_ids == alone.token_ids
    assert len({sample.token_ids for sample in several.samples}) == 3
    assert several.usage.completion_tokens == 36
    assert several.usage.prompt_tokens == alone.usage.prompt_tokens


async def test_log_probabilities_are_of_the_tokens_said(served: Served) -> None:
    answer = await served.client.generate(**PROMPT, **DRAWN, logprobs=3)
    logprobs = answer.samples[0].logprobs
    assert logprobs is not None
    assert [one.token_id for one in logprobs] == list(answer.token_ids)
    for one in logprobs:
        assert one.logprob <= one.top[0].logprob <= 0
        assert [top.logprob for top in one.top] == sorted((top.logprob for top in one.top), reverse=True)
        assert math.fsum(math.exp(top.logprob) for top in one.top) <= 1 + 1e-5


async def test_answers_have_the_shape_that_was_asked_for(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    options = {**DRAWN, "max_new_tokens": 60}
    shaped = await served.client.generate(**PROMPT, **options, json_schema=schema)
    assert 0 <= json.loads(shaped.text)["n"] <= 9
    assert shaped.finish_reason == "stop"
    matched = await served.client.generate(**PROMPT, **options, regex="[ab]{3}-[0-9]{2}", n=2)
    assert all(re.fullmatch("[ab]{3}-[0-9]{2}", sample.text) for sample in matched.samples)
    chosen = await served.client.generate(**PROMPT, **options, choices=["stone", "wall"])
    assert chosen.text in ("stone", "wall")


@pytest.mark.parametrize("wrong", [{"json_schema": '{"type": 7}'}, {"regex": "(((("}, {"grammar": "nothing like one"}])
async def test_a_shape_that_cannot_be_is_refused_and_nothing_stays(served: Served, wrong: dict[str, str]) -> None:
    with pytest.raises(DrystoneError) as caught:
        await served.client.generate(**PROMPT, **wrong)  # type: ignore[arg-type] # one keyword each
    assert caught.value.reason == Reason.INVALID_STRUCTURED_OUTPUT
    await served.until_idle()


@pytest.mark.parametrize("cut", [1, 5, 11])
async def test_a_stream_is_taken_up_where_it_broke(served: Served, cut: int) -> None:
    sampling = {"frequency_penalty": 0.7, "repetition_penalty": 1.3, "min_new_tokens": 4, "logprobs": 1}
    whole = await said(served, raw("And then?", n=2, sampling=sampling))
    fingerprint = whole[0].started.model_fingerprint
    received: list[v1.GenerateResponse] = []
    for event in whole:
        if len(tokens(received)) >= cut:
            break
        received.append(event)
    past = [
        ResumeSample(sample_index=index, token_ids=tokens(received, index), text_chars=len(text(received, index)))
        for index in range(2)
    ]
    resume = Resume(samples=past, model_fingerprint=fingerprint)
    rest = await said(served, raw("And then?", n=2, sampling=sampling, resume=resume))
    for index in range(2):
        assert tokens(received, index) + tokens(rest, index) == tokens(whole, index)
        assert text(received, index) + text(rest, index) == text(whole, index)
    later = [one.logprob for e in rest if e.delta.sample_index == 0 for one in e.delta.logprobs]
    first = [one.logprob for e in whole if e.delta.sample_index == 0 for one in e.delta.logprobs]
    assert later == pytest.approx(first[len(tokens(received)) :], abs=1e-4)


async def test_a_stream_that_had_ended_is_only_told_its_end(served: Served) -> None:
    whole = await said(served, raw("And then?"))
    past = ResumeSample(token_ids=tokens(whole), text_chars=0)
    resume = Resume(samples=[past], model_fingerprint=whole[0].started.model_fingerprint)
    rest = await said(served, raw("And then?", resume=resume))
    assert tokens(rest) == []
    assert text(rest) == text(whole)
    assert rest[-2].sample_finished == whole[-2].sample_finished
    assert rest[-1].HasField("completed")


async def test_another_models_stream_is_not_taken_up(served: Served) -> None:
    resume = Resume(samples=[ResumeSample(token_ids=[40])], model_fingerprint="0" * 64)
    failure = await failure_of(said(served, raw("And then?", resume=resume)))
    assert failure.reason == Reason.MODEL_CHANGED


async def test_a_follow_up_says_what_a_fresh_request_says(served: Served) -> None:
    blocks = [*PROMPT["blocks"][:2], "What is it?" + " stone" * 80]
    first = await served.client.generate(blocks=blocks, **DRAWN, keep_tail=True, priority="high")
    engine = served.stack.decode_apps[0].engine
    assert len(engine.pool.sealed) > 1
    question = "What is it?" + " stone" * 80 + " And what is that?"
    before = engine.pool.hit_tokens
    follow_up = await said(served, raw(question))
    reused = engine.pool.hit_tokens - before - sum(b.tokens for b in follow_up[0].started.blocks[:-1])
    assert reused > 64
    served.evict_everywhere()
    fresh = await said(served, raw(question))
    assert tokens(follow_up) == tokens(fresh)
    assert first.token_ids
    await served.until_idle()


@pytest.mark.parametrize("documents", [[], ["The wall is dry.", "The stone is cut once."]])
async def test_a_conversation_runs_only_its_new_turns(served: Served, documents: list[str]) -> None:
    turns = [{"role": "user", "content": "What of the wall?" + " Stone." * 30}]
    options: dict[str, Any] = {"documents": documents, "max_new_tokens": 12, "keep_tail": True, "ignore_eos": True}
    pool = served.stack.decode_apps[0].engine.pool
    first = await served.client.generate(messages=turns, **options)
    turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And then?"}]
    before = pool.hit_tokens
    second = await served.client.generate(messages=turns, **options)
    blocks = sum(block.tokens for block in second.blocks[:-1])
    asked = second.usage.prompt_tokens - blocks
    assert pool.hit_tokens - before - blocks >= first.usage.prompt_tokens - blocks - 2
    served.evict_everywhere()
    fresh = await served.client.generate(messages=turns, **options)
    assert fresh.token_ids == second.token_ids
    assert asked > first.usage.prompt_tokens - blocks
    served.evict_everywhere()
    await served.until_idle()


async def test_the_engines_metrics_are_named_after_vllms(served: Served) -> None:
    await served.client.generate(**PROMPT, **DRAWN, n=2)
    app = served.stack.decode_apps[0]
    page = generate_latest(app._metrics.registry).decode()
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "num_requests_waiting_for_blocks",
        "kv_cache_usage_ratio",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "prompt_tokens_total",
        "generation_tokens_total",
    ):
        assert re.search(rf"^drystone_{name} ", page, re.MULTILINE), name
    for name in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "iteration_tokens",
        "step_time_decode_seconds",
        "step_time_prefill_seconds",
    ):
        counted = re.search(rf"^drystone_{name}_count (\S+)", page, re.MULTILINE)
        assert counted is not None, name
        assert float(counted[1]) > 0, name
    assert re.search(r'^drystone_requests_ended_total\{reason="length"\} [1-9]', page, re.MULTILINE)
