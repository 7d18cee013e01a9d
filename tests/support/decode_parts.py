"""Small real parts of a decode worker: pools without a model, requests without a gateway."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from decode_worker.arena import Arena
from decode_worker.pool import Pool
from decode_worker.request import Request
from decode_worker.sample import Sample
from decode_worker.sampling import SampleState
from decode_worker.text import TextStream
from drystone.v1.generation_pb2 import Priority
from drystone.v1.sampling_pb2 import SamplingParams
from shared.internal.v1.common_pb2 import BlockRef, WorkerIdentity
from shared.internal.v1.decode_pb2 import GenerateResponse
from shared.kv.layout import KvShape
from tests.support.tiny_models import tiny_tokenizer

SHAPE = KvShape(layers=3, kv_heads=2, head_dim=4, dtype="float32")
IDENTITY = WorkerIdentity(worker_id="decode-0", incarnation=11)

_call_ids = itertools.count(1)


@functools.cache
def tokenizer() -> Any:
    return tiny_tokenizer().backend_tokenizer


def make_arena(tokens: int, shape: KvShape = SHAPE) -> Arena:
    """An arena with room for `tokens` tokens."""
    return Arena(shape, shape.extent_bytes(tokens), torch.device("cpu"))


def make_pool(tokens: int, shape: KvShape = SHAPE) -> Pool:
    """A pool with room for `tokens` tokens."""
    return Pool(make_arena(tokens, shape), IDENTITY)


def block(name: int, tokens: int, *, store: bool = True) -> BlockRef:
    """A block whose key and tokens follow from its name."""
    return BlockRef(key=bytes([name]) * 32, token_ids=[name + 3] * tokens, store=store)


class Sink(list[GenerateResponse]):
    """Keeps what a request was sent."""

    def kinds(self) -> list[str]:
        return [str(message.WhichOneof("message")) for message in self]

    def token_ids(self, sample: int = 0) -> list[int]:
        mine = [message.tokens for message in self if message.tokens.sample_index == sample]
        return [token for tokens in mine for token in tokens.token_ids]

    def text(self) -> str:
        return "".join(message.tokens.text for message in self)


def make_request(
    blocks: Sequence[BlockRef],
    question: Sequence[int] = (1, 2, 3),
    *,
    sink: Sink | None = None,
    seconds: float = 30.0,
    stop: Sequence[str] = (),
    stop_ids: frozenset[int] = frozenset(),
    n: int = 1,
    priority: Priority.ValueType = Priority.PRIORITY_NORMAL,
    keep_tail: bool = False,
    resumed: Mapping[int, Sequence[int]] | None = None,
    **sampling: float,
) -> Request:
    """A request as the service makes it; greedy, four tokens, unless told otherwise."""
    values = {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "seed": 7, **sampling}
    number = next(_call_ids)
    params = SamplingParams(**values)  # type: ignore[arg-type] # numbers of the right kind by name
    prompt = [*(token for ref in blocks for token in ref.token_ids), *question]
    state = SampleState(params, sample_index=0, prompt_ids=prompt, stop_ids=stop_ids, grammar=None)
    states = [state, *(state.fork(index) for index in range(1, n))]
    samples = [Sample(state, TextStream(tokenizer(), list(question), stop)) for state in states]
    for index, past in (resumed or {}).items():
        samples[index].resumed = tuple(past)
        for token in past:
            samples[index].state.accept(token)
            samples[index].text.push(token)
    return Request(
        request_id=f"request-{number}",
        call_id=number,
        traceparent="",
        blocks=list(blocks),
        question_ids=list(question),
        sampling=params,
        samples=samples,
        deadline=time.monotonic() + seconds,
        sink=(sink if sink is not None else Sink()).append,
        priority=priority,
        keep_tail=keep_tail,
        reuse_tail=True,
    )


def assert_idle(pool: Pool) -> None:
    """The invariant of design §6: idle means no pins, no reservations, and every byte free or resident."""
    pool.check_integrity([])
    assert pool.blocks.pins == 0
    assert pool.blocks.pinned_records == 0
    assert len(pool.fetches) == 0
    resident = sum(extent.records for extent in pool.blocks.extents())
    assert pool.arena.free_records + resident == pool.arena.capacity_records
    assert pool.blocks.evictable_records() == resident


def assert_all_free_after_eviction(pool: Pool) -> None:
    """After evicting everything, free is all."""
    assert_idle(pool)
    while pool.blocks.evict_one():
        pool.check_integrity([])
    assert len(pool.blocks) == 0
    assert pool.arena.free_records == pool.arena.capacity_records
