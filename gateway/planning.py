"""From a request to a ticket: resolve, plan and key it, within the request's own time."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable

from drystone.v1.generation_pb2 import GenerateRequest
from gateway.cluster import Cluster
from gateway.prompt import (
    PlannedPrompt,
    PromptLimits,
    PromptPlanner,
    PromptTokenizer,
    TemplateDefaults,
    block_keys_in,
    filled_sampling,
    validate,
)
from gateway.stored import token_ids_of
from gateway.tenants import Tenants
from gateway.ticket import Ticket
from shared.errors import DrystoneError, Reason, deadline_exceeded
from shared.internal.v1.common_pb2 import BlockRef, Compatibility
from shared.internal.v1.worker_pb2 import GetInfoResponse
from shared.kv.keys import KeySpace

_SEED_BITS = 63


class Planning:
    """Plans requests for the model that the decode workers serve.

    Args:
        cluster: The workers.
        tokenizer: Of the served model.
        limits: Upper bounds of a request.
        defaults: Template defaults.
        tenants: Whose blocks are whose.
        default_timeout_seconds: Time of a request whose caller set none.
    """

    def __init__(
        self,
        cluster: Cluster,
        tokenizer: PromptTokenizer,
        *,
        limits: PromptLimits,
        defaults: TemplateDefaults,
        tenants: Tenants,
        default_timeout_seconds: float,
    ) -> None:
        self._cluster = cluster
        self._tokenizer = tokenizer
        self._limits = limits
        self._defaults = defaults
        self._tenants = tenants
        self._default_timeout = default_timeout_seconds

    async def ticket(
        self, request: GenerateRequest, request_id: str, traceparent: str, arrived: float, left: float | None
    ) -> Ticket:
        """Plans a request.

        Args:
            request: As it came.
            request_id: Its name.
            traceparent: Its trace context.
            arrived: `time.monotonic()` of its arrival.
            left: Seconds that its caller waits; None without an end.

        Raises:
            DrystoneError: It is not valid, does not fit, no worker is ready, or its time was up.
        """
        validate(request, self._limits)
        asked = [seconds for seconds in (left, request.timeout_ms / 1e3) if seconds]
        deadline = arrived + min(asked, default=self._default_timeout)
        # Looked at once: keys, context and all that is sent are of one kind, whatever workers do meanwhile.
        info = self._cluster.info
        tenant = self._tenants.named(request.tenant)
        keys = key_space(info.compatibility, tenant.salt)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                known = await token_ids_of(self._cluster, keys, block_keys_in(request))
                plan = await asyncio.to_thread(self.planner(info).plan, request, known)
                refs = await asyncio.to_thread(_refs, plan, keys)
        except TimeoutError as error:
            raise deadline_exceeded("planning the prompt") from error
        _check_vocabulary(plan, info)
        seed = request.sampling.seed if request.sampling.HasField("seed") else secrets.randbits(_SEED_BITS)
        return Ticket(
            request_id=request_id,
            traceparent=traceparent,
            model=self._cluster.model_name,
            compatibility=info.compatibility,
            keys=keys,
            tenant=tenant.name,
            plan=plan,
            refs=refs,
            sampling=filled_sampling(request, seed),
            arrived=arrived,
            planned=time.monotonic(),
            deadline=deadline,
            request=request,
        )

    def planner(self, info: GetInfoResponse) -> PromptPlanner:
        """A planner for the context that a decode worker serves."""
        return PromptPlanner(
            self._tokenizer, context_tokens=info.context_tokens, limits=self._limits, defaults=self._defaults
        )


def key_space(compatibility: Compatibility, tenant_salt: bytes = b"") -> KeySpace:
    """What block keys are made of for this kind of KV."""
    return KeySpace(
        compatibility.model_fingerprint,
        compatibility.dtype,
        compatibility.layout_version,
        compatibility.rope_regime,
        tenant_salt,
    )


def _refs(plan: PlannedPrompt, keys: KeySpace) -> tuple[BlockRef, ...]:
    return tuple(
        BlockRef(key=keys.key(block.token_ids), token_ids=block.token_ids, store=block.store) for block in plan.blocks
    )


def _check_vocabulary(plan: PlannedPrompt, info: GetInfoResponse) -> None:
    """The tokenizer is the gateway's, the embeddings are the worker's: an operator may have paired them wrongly."""
    parts: Iterable[tuple[int, ...]] = (*(block.token_ids for block in plan.blocks), plan.question_ids)
    largest = max((max(ids) for ids in parts if ids), default=0)
    if info.vocabulary_size and largest >= info.vocabulary_size:
        raise DrystoneError(
            Reason.INCOMPATIBLE_WORKERS,
            f"the gateway's tokenizer gave token id {largest}, but worker {info.worker.worker_id} has embeddings for "
            f"{info.vocabulary_size} ids; serve gateway and workers from the same model",
            metadata={"limit": str(info.vocabulary_size), "value": str(largest)},
        )
