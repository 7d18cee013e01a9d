"""Planned requests by hand, for parts of the gateway that take one."""

from __future__ import annotations

import time
from typing import Any

from drystone.v1.generation_pb2 import GenerateRequest, Priority
from drystone.v1.prompt_pb2 import Attention
from drystone.v1.sampling_pb2 import SamplingParams
from drystone.v1.statistics_pb2 import BlockRole
from gateway.planning import key_space
from gateway.prompt import PlannedBlock, PlannedPrompt
from gateway.ticket import Ticket
from shared.internal.v1.common_pb2 import BlockRef
from tests.support.fake_workers import compatibility


def ticket(*blocks: tuple[int, ...], **changed: Any) -> Ticket:
    """A ticket of these blocks and a question of one token."""
    kind = changed.pop("compatibility", compatibility())
    keys = key_space(kind)
    planned = tuple(PlannedBlock(BlockRole.BLOCK_ROLE_PASSAGE, ids, None, store=True, text=None) for ids in blocks)
    now = time.monotonic()
    values: dict[str, Any] = {
        "request_id": "r",
        "traceparent": "",
        "model": "model",
        "compatibility": kind,
        "keys": keys,
        "tenant": "",
        "plan": PlannedPrompt(planned, (5,), Attention.ATTENTION_BLOCK, 0, ()),
        "refs": tuple(BlockRef(key=keys.key(ids), token_ids=ids, store=True) for ids in blocks),
        "sampling": SamplingParams(seed=3, max_new_tokens=2),
        "arrived": now,
        "planned": now,
        "deadline": now + 10.0,
        "request": GenerateRequest(priority=Priority.PRIORITY_NORMAL),
    }
    return Ticket(**{**values, **changed})
