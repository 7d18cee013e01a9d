"""A planned request, as the rest of the gateway handles it."""

from __future__ import annotations

from dataclasses import dataclass

from drystone.v1 import generation_pb2 as v1
from drystone.v1.sampling_pb2 import SamplingParams
from gateway.prompt import PlannedPrompt
from shared.internal.v1.common_pb2 import BlockRef, Compatibility
from shared.kv.keys import KeySpace


@dataclass(frozen=True, slots=True)
class Ticket:
    """A planned request.

    Attributes:
        model: Name of the model.
        compatibility: The KV that the request was planned for; only workers of the same kind take part.
        keys: What its block keys were made of; the tenant's salt among it.
        tenant: Whose blocks it uses.
        refs: Blocks with their keys, in prompt order.
        request: As it came: what the decode worker is to do with it.
        arrived: `time.monotonic()` of its arrival.
        deadline: `time.monotonic()` of its end.
    """

    request_id: str
    traceparent: str
    model: str
    compatibility: Compatibility
    keys: KeySpace
    tenant: str
    plan: PlannedPrompt
    refs: tuple[BlockRef, ...]
    sampling: SamplingParams
    arrived: float
    planned: float
    deadline: float
    request: v1.GenerateRequest
