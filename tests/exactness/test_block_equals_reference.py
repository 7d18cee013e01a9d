"""What is served equals the one-shot reference, for every kind of model, over real sockets, in float32."""

from __future__ import annotations

import asyncio

import pytest
import torch

from drystone import Block, Document
from drystone.local.gate_subject import Subject
from drystone.local.reference import Reference
from tests.conftest import MakeFolder
from tests.exactness.comparing import compare, passage
from tests.support.tiny_models import KINDS_SERVED


def documents(*seeds: int, words: int = 12) -> list[Document]:
    return [Document(title=f"Passage {seed}", text=passage(seed, words)) for seed in seeds]


PROMPTS = {
    "three passages": {"question": "Where is the stone?", "documents": documents(1, 2, 3)},
    "the same, shuffled": {"question": "Where is the stone?", "documents": documents(3, 1, 2)},
    "a passage repeated": {"question": "And the bell?", "documents": documents(4, 1, 4, 4)},
    "one block": {"blocks": [passage(5, 8), "Then"]},
    "blocks of one token": {"blocks": ["a", "b", "a", "Then what?"]},
    "thirty blocks": {"question": "Which one?", "documents": documents(*range(30), words=5)},
    "a long question": {"blocks": [passage(6, 20), passage(7, 260)]},
    "a long block": {"blocks": [passage(8, 300), "So"]},
}


@pytest.mark.parametrize("kind", KINDS_SERVED)
async def test_block_answers_equal_the_reference(kind: str, tiny_folder: MakeFolder):
    reference = Reference(tiny_folder(kind), torch.float32)
    async with Subject(tiny_folder(kind), "float32", "block", max_new_tokens=24) as subject:
        comparisons = {name: await compare(subject, reference, **prompt) for name, prompt in PROMPTS.items()}
        assert subject.idle_invariant()
    assert {name: each.beyond for name, each in comparisons.items() if not each.passed} == {}
    assert sum(len(each.ties) for each in comparisons.values()) <= 1
    assert all(each.tokens for each in comparisons.values())


@pytest.mark.parametrize("kind", ["llama-llama3rope", "qwen3", "mistral-sliding"])
async def test_full_answers_equal_generate(kind: str, tiny_folder: MakeFolder):
    reference = Reference(tiny_folder(kind), torch.float32)
    async with Subject(tiny_folder(kind), "float32", "full", max_new_tokens=24) as subject:
        for prompt in ({"question": "Where?", "documents": documents(1, 2)}, {"blocks": [passage(8, 300), "So"]}):
            blocks, question, served = await subject.ask(**prompt)
            assert len(question) == 1
            run = reference.full_generate([*(token for block in blocks for token in block), *question], 24)
            assert served.token_ids == run.token_ids
        assert subject.idle_invariant()


async def test_twenty_at_once_each_equal_their_reference(tiny_folder: MakeFolder):
    reference = Reference(tiny_folder("qwen3"), torch.float32)
    prompts = [
        {
            "question": f"Question {n}?",
            "documents": documents(*(n * k % 7 for k in range(1, 2 + n % 5))),
            "max_new_tokens": 4 + n,
            "attention": "full" if n % 4 == 3 else "block",
        }
        for n in range(18)
    ] + [{"blocks": ["x", "Then"]}, {"blocks": [Block(text=passage(9, 200)), "And"], "max_new_tokens": 40}]
    async with Subject(tiny_folder("qwen3"), "float32", "block", max_new_tokens=24) as subject:
        comparisons = await asyncio.gather(*(compare(subject, reference, n, **p) for n, p in enumerate(prompts)))
        assert subject.idle_invariant()
    # A FULL prompt is one block and one token: block attention over it is full attention.
    assert [each.index for each in comparisons if not each.passed] == []
    assert sum(len(each.ties) for each in comparisons) <= 1


async def test_the_gate_sees_a_wrong_answer(tiny_folder: MakeFolder):
    """A gate that cannot fail proves nothing: the reference of other weights must not match."""
    from drystone.local.gate_rules import compare_tokens

    reference = Reference(tiny_folder("llama-default"), torch.float32)
    async with Subject(tiny_folder("llama-default"), "float32", "block", max_new_tokens=24) as subject:
        blocks, question, served = await subject.ask(**PROMPTS["three passages"])
    run = reference.block_generate([[*blocks[0][:-1], (blocks[0][-1] + 1) % 300], *blocks[1:]], question, 24)
    wrong = compare_tokens(0, served, run, reference, blocks, question)
    assert not wrong.passed
