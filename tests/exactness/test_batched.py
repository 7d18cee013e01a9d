"""Thirty-two requests of every kind at once, with others that leave on the way, say what each says alone."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from drystone import Answer, Document
from tests.conftest import MakeFolder
from tests.exactness.comparing import passage
from tests.support.stacks import Served, serving

DOCUMENTS = [Document(title=f"Passage {seed}", text=passage(seed, 8 + 6 * seed)) for seed in range(7)]


def mixed(number: int) -> dict[str, Any]:
    """Lengths, samplings, samples and attention of all kinds, over blocks that many of them share."""
    options: dict[str, Any] = {"max_new_tokens": 2 + number * 7 % 41, "ignore_eos": number % 3 > 0}
    documents = [DOCUMENTS[number * step % 7] for step in range(1, 2 + number % 5)]
    match number % 8:
        case 0:
            options |= {"temperature": 1.1, "seed": number, "n": 3}
        case 1:
            options |= {"temperature": 0.8, "top_k": 30, "seed": number, "frequency_penalty": 0.6}
        case 2:
            options |= {"repetition_penalty": 1.4, "min_new_tokens": options["max_new_tokens"] // 2}
        case 3:
            options |= {"temperature": 1.3, "top_p": 0.9, "seed": number, "logprobs": 2}
        case 4:
            options |= {"regex": "[a-z]{2,9}( [a-z]{2,9}){1,4}", "ignore_eos": False}
        case 5:
            options |= {"attention": "full", "logit_bias": {40: 3.0, 41: -5.0}}
        case 6:
            options |= {"stop": ["e", "qu"]}
    question = "Which stone? " * (1 + number % 4 * 25)
    return {"question": question, "documents": documents, **options}


def said(answer: Answer) -> list[tuple[tuple[int, ...], str, str]]:
    return [(tuple(sample.token_ids), sample.text, sample.finish_reason) for sample in answer.samples]


async def leaves(served: Served, number: int) -> None:
    """A request whose caller goes away while it is served."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.01 * number):
            await served.client.generate(**{**mixed(number), "max_new_tokens": 300, "ignore_eos": True, "regex": None})


@pytest.mark.parametrize("kind", ["qwen3", "llama-yarn"])
async def test_thirty_two_at_once_say_what_each_says_alone(kind: str, tiny_folder: MakeFolder) -> None:
    async with serving(tiny_folder(kind)) as served:
        alone = [said(await served.client.generate(**mixed(number))) for number in range(32)]
        served.evict_everywhere()
        everyone = [served.client.generate(**mixed(number)) for number in range(32)]
        answers, _ = await asyncio.gather(
            asyncio.gather(*everyone), asyncio.gather(*(leaves(served, number) for number in range(1, 17)))
        )
        assert [said(answer) for answer in answers] == alone
        await served.until_idle()
