"""What the exactness tests share."""

from __future__ import annotations

import torch

from drystone.local.gate_rules import Comparison, compare_tokens
from drystone.local.gate_subject import Subject
from drystone.local.reference import Reference

WORDS = (
    "river",
    "stone",
    "wall",
    "harbour",
    "lamp",
    "bread",
    "glass",
    "north",
    "seven",
    "quiet",
    "market",
    "salt",
    "bell",
)


def passage(seed: int, words: int) -> str:
    """Words in an order that `seed` decides."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (words,), generator=generator))


async def compare(subject: Subject, reference: Reference, index: int = 0, **prompt: object) -> Comparison:
    """Asks the service, runs the reference on the same token ids, and holds one against the other."""
    blocks, question, served = await subject.ask(**prompt)  # type: ignore[arg-type] # keywords of GenerateOptions
    run = reference.block_generate(blocks, question, int(prompt.get("max_new_tokens", 24)))  # type: ignore[call-overload]
    return compare_tokens(index, served, run, reference, blocks, question)
