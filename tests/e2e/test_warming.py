"""Documents warmed ahead: named by key, found again after a restart, kept apart by tenant, deleted everywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from drystone.v1 import generation_pb2 as v1
from drystone.v1.prompt_pb2 import Document
from drystone.v1.statistics_pb2 import BlockSource
from shared.errors import Reason
from tests.conftest import MakeFolder
from tests.support.errors import failure_of
from tests.support.stacks import Served, serving

TEXTS = [f"The {colour} lighthouse number {number}." for number, colour in enumerate(("red", "blue", "green", "grey"))]


def documents(texts: list[str] = TEXTS) -> list[Document]:
    return [Document(title="Coast", text=text) for text in texts]


async def warm(served: Served, **fields: Any) -> list[v1.WarmResponse]:
    request = v1.WarmRequest(**{"documents": documents(), **fields})
    return [event async for event in served.raw.Warm(request, timeout=30)]


def ended(events: list[v1.WarmResponse]) -> list[v1.WarmedDocument]:
    found = [document for event in events for document in event.documents]
    return sorted(found, key=lambda document: document.document_index)


async def ask(served: Served, keys: list[str], **fields: Any) -> list[v1.GenerateResponse]:
    request = v1.GenerateRequest(**fields)
    request.rag.question = "Which?"
    request.rag.documents.extend(Document(block_key=key) for key in keys)
    request.sampling.max_new_tokens = 4
    return [event async for event in served.raw.Generate(request, timeout=30)]


def tokens(events: list[v1.GenerateResponse]) -> list[int]:
    return [token for event in events for token in event.delta.token_ids]


async def blocks(served: Served, **selector: Any) -> list[v1.BlockDescription]:
    request = v1.DescribeBlocksRequest(selector=v1.BlockSelector(**selector))
    return list((await served.raw.DescribeBlocks(request, timeout=30)).blocks)


def files(folder: Path) -> set[str]:
    """Keys of the blocks on disk."""
    return {path.stem for path in folder.rglob("*.safetensors")}


@pytest.fixture
async def served(tiny_folder: MakeFolder, tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tiny_folder(), prefill=2, store=tmp_path) as served:
        yield served


async def test_keys_of_warmed_documents_answer_as_their_texts_do(served: Served) -> None:
    events = await warm(served)
    last, found = events[-1], ended(events)
    assert [document.document_index for document in found] == [0, 1, 2, 3]
    assert not any(document.error or document.already_warm for document in found)
    assert (last.documents_done, last.documents_total, last.blocks_encoded) == (4, 4, 4)
    assert last.tokens_encoded == sum(document.tokens for document in found) > 0
    disk = sum(place.bytes for place in last.stored if place.source == BlockSource.BLOCK_SOURCE_PREFILL_DISK)
    assert disk == last.bytes_stored > 0
    keys = [key for document in found for key in document.block_keys]
    by_key = await ask(served, keys)
    spelled = v1.GenerateRequest()
    spelled.rag.question = "Which?"
    spelled.rag.documents.extend(documents())
    spelled.sampling.max_new_tokens = 4
    by_text = [event async for event in served.raw.Generate(spelled, timeout=30)]
    assert tokens(by_key) == tokens(by_text) != []
    assert by_key[-1].completed.usage.blocks_encoded == 0, "the template's own preamble is warmed too"


async def test_warming_again_encodes_nothing(served: Served) -> None:
    first = ended(await warm(served))
    encoded = sum(app.encoder.blocks_total for app in served.stack.prefill_apps)
    again = await warm(served)
    assert all(document.already_warm for document in ended(again))
    assert (again[-1].blocks_encoded, again[-1].tokens_encoded) == (0, 0)
    assert [document.block_keys for document in ended(again)] == [document.block_keys for document in first]
    assert sum(app.encoder.blocks_total for app in served.stack.prefill_apps) == encoded


async def test_a_warmed_corpus_is_warm_after_a_restart(tiny_folder: MakeFolder, tmp_path: Path) -> None:
    async with serving(tiny_folder(), prefill=2, store=tmp_path) as served:
        keys = [key for document in ended(await warm(served, tags=["coast"])) for key in document.block_keys]
        before = await ask(served, keys)
    async with serving(tiny_folder(), prefill=2, store=tmp_path) as served:
        after = await ask(served, keys)
        assert tokens(after) == tokens(before)
        sources = {block.source for block in after[-1].completed.blocks if block.block_key}
        assert sources == {BlockSource.BLOCK_SOURCE_PREFILL_DISK}
        assert sum(app.encoder.blocks_total for app in served.stack.prefill_apps) == 0
        assert sorted(block.block_key for block in await blocks(served, tags=["coast"])) == sorted(keys)


async def test_one_bad_document_is_its_own_affair(served: Served) -> None:
    mixed = [
        *documents(TEXTS[:1]),
        Document(),
        Document(utf8_text=b"\xff"),
        Document(block_key="ab"),
        *documents(TEXTS[1:2]),
    ]
    found = ended(await warm(served, documents=mixed))
    reasons = [document.error_reason for document in found]
    assert reasons == ["", Reason.EMPTY_DOCUMENT, Reason.INVALID_UTF8, Reason.INVALID_BLOCK_KEY, ""]
    assert "documents[1]" in found[1].error


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"documents": []}, Reason.NO_DOCUMENTS, "documents"),
        ({"tags": [""]}, Reason.INVALID_FIELD, "tags[0]"),
        ({"tags": ["x"] * 33}, Reason.INVALID_FIELD, "tags"),
        ({"ttl_seconds": 0}, Reason.INVALID_FIELD, "ttl_seconds"),
        ({"tenant": "a\nb"}, Reason.INVALID_FIELD, "tenant"),
        ({"model": "another"}, Reason.UNKNOWN_MODEL, "model"),
        ({"chunking": v1.Chunking(max_tokens=20, overlap_tokens=19)}, Reason.INVALID_FIELD, "chunking.overlap_tokens"),
    ],
)
async def test_a_call_that_breaks_a_rule_is_refused(served: Served, fields: Any, reason: Reason, field: str) -> None:
    failure = await failure_of(warm(served, **fields))
    assert (failure.reason, failure.fields) == (reason, (field,))


async def test_long_documents_are_cut_the_same_way_each_time(served: Served) -> None:
    text = "\n\n".join(" ".join(TEXTS) for _ in range(5))
    asked: Any = {"documents": [Document(title="Long", text=text)], "chunking": v1.Chunking(max_tokens=60)}
    [first], [again] = ended(await warm(served, **asked)), ended(await warm(served, **asked))
    assert len(first.block_keys) > 1
    assert (first.block_keys, again.already_warm) == (again.block_keys, True)
    assert tokens(await ask(served, list(first.block_keys))) != []


async def test_tenants_neither_use_nor_see_nor_delete_each_others_blocks(served: Served) -> None:
    [key] = ended(await warm(served, documents=documents(TEXTS[:1]), tenant="acme"))[0].block_keys
    [other] = ended(await warm(served, documents=documents(TEXTS[:1]), tenant="umbrella"))[0].block_keys
    assert key != other
    assert tokens(await ask(served, [key], tenant="acme")) == tokens(await ask(served, [other], tenant="umbrella"))
    for stranger in ("umbrella", ""):
        failure = await failure_of(ask(served, [key], tenant=stranger))
        assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, Reason.UNKNOWN_BLOCK_KEY)
        assert await blocks(served, block_keys=[key], tenant=stranger) == []
        gone = v1.DeleteBlocksRequest(selector=v1.BlockSelector(block_keys=[key], tenant=stranger))
        assert (await served.raw.DeleteBlocks(gone, timeout=30)).blocks_deleted == 0
    assert [block.tenant for block in await blocks(served, block_keys=[key], tenant="acme")] == ["acme"]


async def test_tenants_share_when_they_are_set_to(tiny_folder: MakeFolder) -> None:
    async with serving(tiny_folder(), gateway_settings={"share_blocks": True}) as served:
        [key] = ended(await warm(served, documents=documents(TEXTS[:1]), tenant="acme"))[0].block_keys
        again = ended(await warm(served, documents=documents(TEXTS[:1]), tenant="umbrella"))
        assert (list(again[0].block_keys), again[0].already_warm) == ([key], True)


async def test_deleted_blocks_are_gone_from_every_tier_and_worker(served: Served, tmp_path: Path) -> None:
    keys = [key for document in ended(await warm(served, tags=["old"])) for key in document.block_keys]
    await ask(served, keys)
    [described] = await blocks(served, block_keys=[keys[0]])
    sources = {place.source for place in described.locations}
    assert sources == {
        BlockSource.BLOCK_SOURCE_PREFILL_RAM,
        BlockSource.BLOCK_SOURCE_PREFILL_DISK,
        BlockSource.BLOCK_SOURCE_RESIDENT,
    }
    assert (described.recorded, list(described.tags)) == (True, ["old"])
    everything = await failure_of(served.raw.DeleteBlocks(v1.DeleteBlocksRequest(), timeout=30))
    assert everything.fields == ("selector",)
    answer = await served.raw.DeleteBlocks(v1.DeleteBlocksRequest(selector=v1.BlockSelector(tags=["old"])), timeout=30)
    assert answer.blocks_deleted == len(keys)
    assert answer.bytes_freed > 0
    assert await blocks(served, block_keys=keys) == []
    assert files(tmp_path).isdisjoint(keys)
    resident = {block.key.hex() for app in served.stack.decode_apps for block in app.pool.blocks.all()}
    assert resident.isdisjoint(keys)
    failure = await failure_of(ask(served, keys))
    assert failure.reason == Reason.UNKNOWN_BLOCK_KEY


async def test_pinned_blocks_survive_eviction_and_unpinned_ones_do_not(tiny_folder: MakeFolder, tmp_path: Path) -> None:
    room = {"ram_bytes": 150_000, "disk_bytes": 150_000, "sweep_seconds": 0.05}
    others = [f"Stone number {number} of the wall." for number in range(30)]
    async with serving(tiny_folder(), store=tmp_path, prefill_settings=room) as served:
        [app] = served.stack.prefill_apps
        held = {
            key
            for document in ended(await warm(served, documents=documents(TEXTS[:2]), pin=True))
            for key in document.block_keys
        }
        await warm(served, documents=documents(others))
        assert app.holdings.store.lower[0].meter.evictions > 0
        assert held <= files(tmp_path)
        assert {block.block_key for block in await blocks(served) if block.pinned} == held
        selector = v1.BlockSelector(block_keys=sorted(held))
        changed = await served.raw.PinBlocks(v1.PinBlocksRequest(selector=selector, unpin=True), timeout=30)
        assert changed.blocks_changed == len(held)
        for _ in range(3):
            await warm(served, documents=documents([f"{text} Again {_}." for text in others]))
        assert held.isdisjoint(files(tmp_path))


async def test_a_key_outlives_its_kv_and_its_worker(tiny_folder: MakeFolder) -> None:
    """No tier but memory, and the worker that held a block is gone: the second one knows its tokens."""
    async with serving(tiny_folder(), prefill=2) as served:
        [document] = ended(await warm(served, documents=documents(TEXTS[:1])))
        [key] = document.block_keys
        before = tokens(await ask(served, [key]))
        served.evict_everywhere()
        [described] = await blocks(served, block_keys=[key])
        assert (described.recorded, list(described.locations)) == (True, [])
        assert tokens(await ask(served, [key])) == before
        served.evict_everywhere()
        holder = next(app for app in served.stack.prefill_apps if app.encoder.blocks_total)
        await served.stop(holder)
        await asyncio.sleep(0.5)
        assert tokens(await ask(served, [key])) == before


async def test_pages_give_every_block_once(served: Served) -> None:
    keys = sorted(key for document in ended(await warm(served, tags=["page"])) for key in document.block_keys)
    found, token = [], ""
    while True:
        request = v1.DescribeBlocksRequest(selector=v1.BlockSelector(tags=["page"]), page_size=3, page_token=token)
        answer = await served.raw.DescribeBlocks(request, timeout=30)
        found += [block.block_key for block in answer.blocks]
        token = answer.next_page_token
        if not token:
            break
    assert found == keys


async def test_a_worker_that_cannot_be_reached_fails_a_deletion(served: Served) -> None:
    [key] = ended(await warm(served, documents=documents(TEXTS[:1])))[0].block_keys
    await served.stop(served.stack.prefill_apps[1])
    selector = v1.BlockSelector(block_keys=[key])
    await asyncio.sleep(0.5)
    failure = await failure_of(served.raw.DeleteBlocks(v1.DeleteBlocksRequest(selector=selector), timeout=30))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.WORKER_LOST)


async def test_warming_waits_for_room_to_write_and_leaves_nothing_out(tiny_folder: MakeFolder, tmp_path: Path) -> None:
    texts = [f"Stone number {number} of the wall." for number in range(20)]
    async with serving(tiny_folder(), store=tmp_path, prefill_settings={"write_queue_bytes": 0}) as served:
        events = await warm(served, documents=documents(texts))
        keys = {key for document in ended(events) for key in document.block_keys}
        assert len(keys) == len(texts)
        assert keys <= files(tmp_path)


async def test_warming_that_was_interrupted_goes_on_and_encodes_nothing_twice(served: Served) -> None:
    texts = [f"Stone number {number} of the wall." for number in range(60)]
    request = v1.WarmRequest(documents=documents(texts))
    call = served.raw.Warm(request, timeout=30)
    async for event in call:
        done = event.documents_done
        break
    call.cancel()
    assert 0 < done < len(texts)
    await served.until_idle()
    assert not any(document.error for document in ended(await warm(served, documents=documents(texts))))
    encoded = sum(app.encoder.blocks_total for app in served.stack.prefill_apps)
    assert encoded == len(texts) + 1, "each text once, and the preamble"


async def test_blocks_on_disk_are_their_tenants_after_a_restart_though_no_record_says_so(
    tiny_folder: MakeFolder, tmp_path: Path
) -> None:
    async with serving(tiny_folder(), store=tmp_path) as served:
        asked = v1.GenerateRequest(tenant="acme")
        asked.rag.question = "Which?"
        asked.rag.documents.extend(documents(TEXTS[:1]))
        asked.sampling.max_new_tokens = 2
        events = [event async for event in served.raw.Generate(asked, timeout=30)]
        keys = {block.block_key for block in events[-1].completed.blocks if block.block_key}
        assert {block.block_key for block in await blocks(served, tenant="acme")} == keys
        [app] = served.stack.prefill_apps
        for key in keys:
            await app.holdings.store.kept(bytes.fromhex(key))
    async with serving(tiny_folder(), store=tmp_path) as served:
        assert await blocks(served, block_keys=sorted(keys)) == []
        assert await blocks(served) == []
        gone = v1.DeleteBlocksRequest(selector=v1.BlockSelector(block_keys=sorted(keys)))
        assert (await served.raw.DeleteBlocks(gone, timeout=30)).blocks_deleted == 0
        assert {block.block_key for block in await blocks(served, tenant="acme")} == keys
        found = await ask(served, sorted(keys), tenant="acme")
        assert found[-1].completed.usage.blocks_encoded <= 1
