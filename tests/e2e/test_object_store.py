"""Blocks and records in a bucket that workers share: over S3's protocol, from a gateway's request to the answer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from drystone import Document
from tests.conftest import MakeFolder
from tests.support.s3_server import S3Server, s3_server
from tests.support.stacks import Served, serving, until

DOCUMENTS = [Document(title="Wall", text=f"Stone number {number} of the wall.") for number in range(5)]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@contextlib.asynccontextmanager
async def sharing(folder: MakeFolder, server: S3Server, bucket: str, workers: int = 1) -> AsyncIterator[Served]:
    options = {
        "region": "us-east-1",
        "endpoint": f"http://127.0.0.1:{server.port}",
        "access_key_id": "test",
        "secret_access_key": "test",
        "allow_http": "true",
    }
    settings: dict[str, Any] = {"object_url": f"s3://{bucket}/kv", "object_options": options}
    async with serving(folder(), prefill=workers, prefill_settings=settings) as served:
        yield served


def sources(answer: Any) -> set[str]:
    return {str(block.source) for block in answer.blocks if block.key}


async def test_new_machines_with_empty_disks_encode_nothing(tiny_folder: MakeFolder, server: S3Server) -> None:
    server.make_bucket("corpus")
    async with sharing(tiny_folder, server, "corpus") as served:
        stream = served.client.warm(DOCUMENTS, tags=["wall"])
        warmed = await stream.result()
        keys = [key for document in warmed.documents for key in document.keys]
        before = await served.client.generate("Which?", documents=[Document(key=key) for key in keys], max_new_tokens=4)
    async with sharing(tiny_folder, server, "corpus", workers=2) as served:
        after = await served.client.generate("Which?", documents=[Document(key=key) for key in keys], max_new_tokens=4)
        assert after.token_ids == before.token_ids
        assert after.usage.blocks_encoded == 0
        assert sources(after) == {"object_store"}
        assert sum(app.encoder.blocks_total for app in served.stack.prefill_apps) == 0
        listed = [block.key async for block in served.client.blocks.list(keys=keys)]
        assert listed == sorted(keys)
        gone = await served.client.blocks.delete(keys=keys)
        assert gone.blocks == len(keys)
    async with sharing(tiny_folder, server, "corpus") as served:
        assert [block.key async for block in served.client.blocks.list(keys=keys)] == []


async def test_a_bucket_that_is_gone_costs_nothing_but_itself(tiny_folder: MakeFolder, server: S3Server) -> None:
    async with sharing(tiny_folder, server, "never-made") as served:
        answer = await served.client.generate("Which?", documents=DOCUMENTS, max_new_tokens=4)
        assert sources(answer) == {"encoded"}
        [app] = served.stack.prefill_apps
        await until(lambda: app.holdings.store.pending_bytes == 0, 20.0)
        assert app.holdings.store.lower[0].meter.write_failures + app.holdings.store.lower[0].meter.writes_dropped > 0
        served.evict_everywhere()
        again = await served.client.generate("Which?", documents=DOCUMENTS, max_new_tokens=4)
        assert again.token_ids == answer.token_ids
