"""Heads of files: tokens and tenant without KV; gone is not unreadable, and what is bad is put aside."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.breaker import FAILURES_IN_A_ROW
from prefill_worker.tiers.object_files import ObjectError
from prefill_worker.tiers.object_tier import ObjectTier
from shared.errors import DrystoneError, Reason
from tests.support.object_parts import make_block, make_tier, same


def file_of(folder: Path, block: StoredBlock) -> Path:
    [file] = folder.rglob(f"{block.key.hex()}.safetensors")
    return file


async def written(folder: Path, *, shared: bool, tenant: str = "acme") -> tuple[ObjectTier, StoredBlock, Path]:
    tier = make_tier(folder, shared=shared)
    await tier.open()
    block = make_block(1, tenant=tenant)
    assert await tier.write(block, pinned=False)
    return tier, block, file_of(folder, block)


@pytest.mark.parametrize("shared", [False, True])
async def test_a_listing_does_not_know_the_tenant_and_a_head_does(tmp_path: Path, *, shared: bool) -> None:
    tier, block, _ = await written(tmp_path, shared=shared)
    await tier.close()
    again = make_tier(tmp_path, shared=shared)
    await again.open()
    known = again.ledger.get(block.key)
    assert known is not None
    assert known.tenant == "\0"
    head = await again.head(block.key)
    assert head is not None
    assert (head.tenant, head.token_ids) == ("acme", block.token_ids)
    known = again.ledger.get(block.key)
    assert known is not None
    assert (known.tenant, known.hits, again.meter.hits) == ("acme", 0, 0)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [0, 100, 900])
async def test_a_file_that_was_cut_off_is_put_aside(tmp_path: Path, size: int, *, shared: bool) -> None:
    tier, block, file = await written(tmp_path, shared=shared)
    os.truncate(file, size)
    assert await tier.head(block.key) is None
    assert (tier.meter.corruptions, tier.meter.failures) == (1, 0)
    assert not file.exists()
    assert not await tier.holds(block.key)
    assert await tier.write(block, pinned=False)
    assert same(await tier.read(block.key), block)


@pytest.mark.parametrize("shared", [False, True])
async def test_a_flipped_bit_in_a_head_is_put_aside(tmp_path: Path, *, shared: bool) -> None:
    tier, block, file = await written(tmp_path, shared=shared)
    raw = bytearray(file.read_bytes())
    raw[200] ^= 1
    file.write_bytes(raw)
    assert await tier.head(block.key) is None
    assert (tier.meter.corruptions, file.exists()) == (1, False)


@pytest.mark.parametrize("shared", [False, True])
async def test_a_file_that_is_gone_leaves_the_books(tmp_path: Path, *, shared: bool) -> None:
    tier, block, file = await written(tmp_path, shared=shared)
    file.unlink()
    assert await tier.head(block.key) is None
    assert block.key not in tier.ledger
    assert (tier.meter.corruptions, tier.meter.failures) == (0, 0)


async def test_what_others_wrote_cut_off_is_put_aside_too(tmp_path: Path) -> None:
    mine = make_tier(tmp_path, shared=True)
    await mine.open()
    _, block, file = await written(tmp_path, shared=True)
    os.truncate(file, 100)
    assert await mine.head(block.key) is None
    assert (mine.meter.corruptions, file.exists()) == (1, False)


async def test_a_store_that_fails_is_not_an_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, block, _ = await written(tmp_path, shared=False)

    async def broken(*_: object) -> None:
        raise ObjectError("no answer")

    monkeypatch.setattr(tier._shelf.files, "beginning", broken)
    for _ in range(FAILURES_IN_A_ROW):
        with pytest.raises(DrystoneError, match="could not be looked at: no answer") as caught:
            await tier.head(block.key)
        assert caught.value.reason is Reason.BLOCK_UNAVAILABLE
    assert tier.resting
    with pytest.raises(DrystoneError, match="left alone for a while"):
        await tier.head(block.key)
    assert block.key in tier.ledger


async def test_reads_at_once_are_not_taken_for_slow_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pace is told of reads that run together adds up to their time together."""
    tier, block, _ = await written(tmp_path, shared=False)
    now, told, waiting = [0.0], list[float](), list[int]()
    monkeypatch.setattr(tier._reader._under_way, "_clock", lambda: now[0])
    monkeypatch.setattr(tier.pace, "measured", lambda _, seconds: told.append(seconds))
    get = tier._shelf.files.get

    async def slow(name: str) -> memoryview | None:
        waiting.append(1)
        data = await get(name)
        if len(waiting) == 8:
            now[0] = 0.8
        return data

    monkeypatch.setattr(tier._shelf.files, "get", slow)
    await asyncio.gather(*(tier.read(block.key) for _ in range(8)))
    assert len(told) == 8
    assert sum(told) == pytest.approx(0.8)


async def test_the_books_of_a_shared_store_are_not_believed_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker evicts: within a minute it is noticed, and the block is written again."""
    tier, block, file = await written(tmp_path, shared=True)
    now = [tier._reader._clock()]
    monkeypatch.setattr(tier._reader, "_clock", lambda: now[0])
    assert await tier.holds(block.key)
    file.unlink()
    assert await tier.holds(block.key), "seen a moment ago"
    now[0] += 61.0
    assert not await tier.holds(block.key)
    assert await tier.write(block, pinned=False)
    assert file_of(tmp_path, block).exists()
