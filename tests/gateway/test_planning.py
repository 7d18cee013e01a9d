"""Planning in the request's own time, for one kind of worker."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from drystone.v1.generation_pb2 import GenerateRequest
from drystone.v1.prompt_pb2 import BlockInput, BlocksPrompt, Truncation, TruncationSide
from gateway.cluster import Cluster
from gateway.planning import Planning
from gateway.prompt import PromptLimits, PromptTokenizer, TemplateDefaults
from gateway.tenants import Tenants
from gateway.worker import Worker
from shared.errors import DrystoneError, Reason
from shared.internal.v1.prefill_pb2 import DescribeStoredResponse, StoredBlock
from shared.internal.v1.worker_pb2 import GetInfoResponse
from tests.conftest import MakeFolder
from tests.support.fake_workers import DECODE, PREFILL, compatibility

CONTEXT = 100


class Storing(Worker):
    """A prefill worker that knows blocks, after a while."""

    def __init__(self, name: str, delay: float, *blocks: StoredBlock) -> None:
        super().__init__(name, PREFILL, None, info=GetInfoResponse(), detail="")  # type: ignore[arg-type] # not called
        self.delay, self.blocks = delay, blocks

    def prefill(self) -> Any:
        return self

    async def DescribeBlocks(self, *_: object, **__: object) -> DescribeStoredResponse:  # noqa: N802 - gRPC's name
        await asyncio.sleep(self.delay)
        return DescribeStoredResponse(blocks=self.blocks)


def planning(folder: MakeFolder, *prefill: Worker, **info: Any) -> Planning:
    cluster = Cluster("model", [], [], poll_seconds=1.0, tokenizer_fingerprint=b"")
    said = GetInfoResponse(compatibility=compatibility(), context_tokens=CONTEXT, **info)
    decode = Worker("d", DECODE, None, info=said, detail="")  # type: ignore[arg-type] # no call is made
    cluster.workers = [decode, *prefill]
    tokenizer = PromptTokenizer(folder())
    return Planning(
        cluster,
        tokenizer,
        limits=PromptLimits(),
        defaults=TemplateDefaults(),
        tenants=Tenants(share_blocks=False, secret=""),
        default_timeout_seconds=9.0,
    )


def asking(*blocks: BlockInput, **fields: Any) -> GenerateRequest:
    request = GenerateRequest(blocks=BlocksPrompt(blocks=[*blocks, BlockInput(text="why?")]), **fields)
    request.sampling.max_new_tokens = 4
    return request


async def failure_of(plan: Planning, request: GenerateRequest, left: float | None = None) -> DrystoneError:
    with pytest.raises(DrystoneError) as caught:
        await plan.ticket(request, "r", "", time.monotonic(), left)
    return caught.value


async def test_a_ticket_keeps_the_kind_that_its_keys_were_made_for(tiny_folder: MakeFolder) -> None:
    ticket = await planning(tiny_folder).ticket(asking(BlockInput(text="wall")), "r", "", time.monotonic(), None)
    assert ticket.compatibility == compatibility()
    assert ticket.refs[0].key == ticket.keys.key(ticket.refs[0].token_ids)
    assert (ticket.model, ticket.keys.tenant_salt) == ("model", b"")


async def test_prefill_workers_are_asked_at_once_and_believed_only_for_their_keys(tiny_folder: MakeFolder) -> None:
    plan = planning(tiny_folder)
    ticket = await plan.ticket(asking(BlockInput(text="wall")), "r", "", time.monotonic(), None)
    [ref] = ticket.refs
    right = StoredBlock(key=ref.key, token_ids=ref.token_ids)
    wrong = StoredBlock(key=ref.key, token_ids=[9, 9, 9])
    named = asking(BlockInput(block_key=ref.key.hex()))
    began = time.monotonic()
    plan = planning(tiny_folder, Storing("a", 0.3, right), Storing("b", 0.3, wrong), Storing("c", 0.3))
    ticket = await plan.ticket(named, "r", "", time.monotonic(), None)
    assert ticket.refs == (ref,)
    assert time.monotonic() - began < 5.0
    error = await failure_of(planning(tiny_folder, Storing("b", 0.0, wrong)), named)
    assert error.reason is Reason.UNKNOWN_BLOCK_KEY


async def test_planning_ends_with_the_requests_time(tiny_folder: MakeFolder) -> None:
    plan = planning(tiny_folder, Storing("slow", 30.0))
    named = asking(BlockInput(block_key="ab" * 32))
    error = await failure_of(plan, named, left=0.1)
    assert (error.reason, error.metadata["while"]) == (Reason.DEADLINE_EXCEEDED, "planning the prompt")
    named.timeout_ms = 50
    assert (await failure_of(plan, named)).reason is Reason.DEADLINE_EXCEEDED


async def test_token_ids_beyond_the_workers_embeddings_are_the_operators_mistake(tiny_folder: MakeFolder) -> None:
    error = await failure_of(planning(tiny_folder, vocabulary_size=4), asking(BlockInput(text="wall")))
    assert error.reason is Reason.INCOMPATIBLE_WORKERS
    assert error.metadata["limit"] == "4"
    await planning(tiny_folder, vocabulary_size=100_000).ticket(asking(), "r", "", time.monotonic(), None)


async def test_far_too_long_texts_are_refused_by_their_bytes(
    tiny_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planning(tiny_folder)
    encoded: list[str] = []
    encode = PromptTokenizer.encode

    def counted(self: PromptTokenizer, text: str, *, allow_special: bool) -> tuple[int, ...]:
        encoded.append(text)
        return encode(self, text, allow_special=allow_special)

    monkeypatch.setattr(PromptTokenizer, "encode", counted)
    long = BlockInput(text="wall " * CONTEXT * 13)
    error = await failure_of(plan, asking(long))
    assert error.reason is Reason.PROMPT_TOO_LONG
    assert "in bytes" in error.message
    assert error.metadata["limit"] == str(CONTEXT * 64)
    assert encoded == []
    cut = asking(long, truncation=Truncation(side=TruncationSide.TRUNCATION_SIDE_RIGHT))
    assert (await plan.ticket(cut, "r", "", time.monotonic(), None)).plan.truncated_tokens
