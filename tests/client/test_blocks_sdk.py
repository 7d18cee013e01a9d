"""Stored blocks with both clients against a real gRPC server."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest

import drystone
from drystone import AsyncClient, BlockLocation, BlockSource, Client
from tests.client.canned_blocks import Stored

if TYPE_CHECKING:
    from tests.client.canned_gateway import CannedGateway

KEYS = [f"{number:x}" * 64 for number in range(8)]


@pytest.fixture
def stocked(gateway: CannedGateway) -> CannedGateway:
    for number, key in enumerate(KEYS):
        tags, tenant = ["odd" if number % 2 else "even"], "acme" if number == 7 else ""
        gateway.stored[key] = Stored(number + 1, tenant, tags, 60 if number else None, pinned=number == 1)
    return gateway


def test_list_fetches_a_page_when_the_one_before_is_used_up(stocked: CannedGateway) -> None:
    with Client(stocked.address) as client:
        found = client.blocks.list()
        assert [block.key for block in islice(found, 3)] == KEYS[:3]
        assert len(stocked.selectors) == 1
        assert [block.key for block in found] == KEYS[3:]
        assert len(stocked.selectors) == 3
        assert len(list(client.blocks.list(page_size=100))) == 8
        assert len(stocked.selectors) == 4


async def test_list_async(stocked: CannedGateway) -> None:
    async with AsyncClient(stocked.address) as client:
        assert [block.key async for block in client.blocks.list(page_size=5)] == KEYS
        assert [block.key async for block in client.blocks.list(tags=["odd"], tenant="acme")] == KEYS[7:]
    assert len(stocked.selectors) == 3


def test_a_block_says_all_that_is_known(stocked: CannedGateway) -> None:
    with Client(stocked.address) as client:
        block = client.blocks.get(KEYS[1])
        assert client.blocks.get("9" * 64) is None
        first = client.blocks.get(KEYS[0])
    assert block == drystone.BlockInfo(
        key=KEYS[1],
        tokens=2,
        locations=(BlockLocation("prefill-0", BlockSource.PREFILL_DISK, 200),),
        hits=2,
        idle_seconds=90.5,
        pinned=True,
        tags=("odd",),
        ttl_seconds=60,
        recorded=True,
    )
    assert block is not None
    assert block.bytes == 200
    assert repr(block) == "BlockInfo(111111111111…, 2 tokens, 200 bytes, in prefill-0, pinned)"
    assert first is not None
    assert first.ttl_seconds is None


async def test_get_async(stocked: CannedGateway) -> None:
    async with AsyncClient(stocked.address) as client:
        block = await client.blocks.get(KEYS[7], tenant="acme")
        assert await client.blocks.get(KEYS[7], tenant="other") is None
    assert block is not None
    assert (block.tokens, block.tenant) == (8, "acme")


def test_selectors_are_carried_whole(gateway: CannedGateway) -> None:
    with Client(gateway.address) as client:
        list(client.blocks.list(keys=iter(KEYS[:2]), key_prefix="0", tags="a", tenant="t", model="tiny"))
        list(client.blocks.list(keys=KEYS[0], tags=["a", "b"]))
    whole, short = gateway.selectors
    assert (list(whole.block_keys), whole.key_prefix, list(whole.tags)) == (KEYS[:2], "0", ["a"])
    assert (whole.tenant, whole.model) == ("t", "tiny")
    assert (list(short.block_keys), list(short.tags)) == (KEYS[:1], ["a", "b"])


def test_pin_and_unpin_count_what_changed(stocked: CannedGateway) -> None:
    with Client(stocked.address) as client:
        assert client.blocks.pin(tags="odd") == 3
        assert client.blocks.pin(tags="odd") == 0
        assert client.blocks.unpin(keys=KEYS[1:4]) == 2
    assert [key for key in KEYS if stocked.stored[key].pinned] == [KEYS[5], KEYS[7]]


async def test_pin_and_unpin_async(stocked: CannedGateway) -> None:
    async with AsyncClient(stocked.address) as client:
        assert await client.blocks.pin(key_prefix="0") == 1
        assert await client.blocks.unpin(key_prefix="1") == 1
    assert [key for key in KEYS if stocked.stored[key].pinned] == KEYS[:1]


def test_delete(stocked: CannedGateway) -> None:
    with Client(stocked.address) as client:
        assert client.blocks.delete(tags=["even"]) == drystone.DeletedBlocks(4, 1600)
        assert [block.key for block in client.blocks.list()] == KEYS[1::2]


async def test_delete_async(stocked: CannedGateway) -> None:
    async with AsyncClient(stocked.address) as client:
        assert await client.blocks.delete(tenant="acme") == drystone.DeletedBlocks(1, 800)
        with pytest.raises(drystone.InvalidRequestError, match="every block"):
            await client.blocks.delete()
    assert len(stocked.stored) == 7


def test_deleting_everything_is_the_servers_refusal(stocked: CannedGateway) -> None:
    with Client(stocked.address) as client, pytest.raises(drystone.InvalidRequestError, match="every block") as caught:
        client.blocks.delete()
    assert caught.value.reason == "INVALID_FIELD"
    assert len(stocked.stored) == 8


def test_wrong_selectors_are_refused_before_any_request(gateway: CannedGateway) -> None:
    wrong: dict[str, Any] = {"tag": "a"}
    with Client(gateway.address) as client:
        with pytest.raises(TypeError, match="unknown options: tag"):
            client.blocks.delete(**wrong)
        with pytest.raises(drystone.InvalidRequestError, match="Unicode"):
            client.blocks.pin(tags="\ud800")
    assert not gateway.selectors


def test_no_server(closed_port: int) -> None:
    with Client(f"127.0.0.1:{closed_port}") as client, pytest.raises(drystone.ConnectError):
        next(client.blocks.list())
