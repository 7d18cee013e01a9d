"""A whole stack: overload and over-long names as a client sees them."""

from __future__ import annotations

from collections.abc import AsyncIterable

import grpc

from drystone.v1 import generation_pb2 as v1
from drystone.v1.prompt_pb2 import BlockInput, BlocksPrompt
from shared.errors import DrystoneError, Reason
from tests.conftest import MakeFolder
from tests.support.errors import failure_of
from tests.support.stacks import Served, serving


def asking(**fields: object) -> v1.GenerateRequest:
    prompt = BlocksPrompt(blocks=[BlockInput(text="A wall of dry stone."), BlockInput(text="What is it?")])
    return v1.GenerateRequest(blocks=prompt, timeout_ms=5000, **fields)  # type: ignore[arg-type] # by name


async def read(call: AsyncIterable[object]) -> list[object]:
    return [event async for event in call]


def fill(served: Served) -> None:
    def full(*_: object, **__: object) -> None:
        raise DrystoneError(Reason.ENCODE_QUEUE_FULL, "5 blocks wait to be encoded; limit 5", retry_after_ms=1234)

    for app in served.stack.prefill_apps:
        app.encoder.request = full  # type: ignore[assignment, method-assign] # stands in for the real one


async def test_full_queues_everywhere_are_the_clients_to_wait_for(tiny_folder: MakeFolder) -> None:
    async with serving(tiny_folder(), prefill=2) as served:
        fill(served)
        failure = await failure_of(read(served.raw.Generate(asking())))
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ENCODE_QUEUE_FULL)
        assert failure.retry_ms == 1234
        await served.until_idle()


async def test_names_of_any_length_are_told_as_what_they_are(tiny_folder: MakeFolder) -> None:
    async with serving(tiny_folder()) as served:
        for name in ("x" * 20_000, "石" * 20_000, "\n" * 20_000):
            failure = await failure_of(read(served.raw.Generate(asking(model=name))))
            assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, Reason.UNKNOWN_MODEL)
            assert len(failure.message) <= 300
            assert all(len(fact) <= 300 for fact in failure.metadata.values())
        failure = await failure_of(read(served.raw.Generate(asking(tenant="x" * 129))))
        assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD)
        assert failure.fields == ("tenant",)
