"""Everything at once on one folder: afterwards the disk and the books say the same, and no read was wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefill_worker.tiers.object_tier import ObjectTier
from tests.support.object_parts import FILE_BYTES, block_files, make_block, make_tier, same

BLOCKS = [make_block(number) for number in range(6)]
BUDGET = 3 * FILE_BYTES
VERBS = ("write", "write", "read", "delete", "sweep", "pin", "spoil", "lose", "cancelled write")

Act = tuple[str, int]
acts = st.lists(st.tuples(st.sampled_from(VERBS), st.integers(0, len(BLOCKS) - 1)), min_size=1, max_size=12)


def find_file(folder: Path, number: int) -> Path | None:
    name = f"{BLOCKS[number].key.hex()}.safetensors"
    return next((path for path in block_files(folder) if path.name == name), None)


async def act(tier: ObjectTier, folder: Path, verb: str, number: int) -> None:
    block = BLOCKS[number]
    match verb:
        case "write":
            await tier.write(block, pinned=False)
        case "read":
            found = await tier.read(block.key)
            assert found is None or same(found, block)
        case "delete":
            await tier.delete(block.key)
        case "sweep":
            await tier.sweep()
        case "pin":
            tier.ledger.pin(block.key, pinned=number % 2 == 0)
        case "spoil" | "lose":
            path = find_file(folder, number)
            with contextlib.suppress(FileNotFoundError):  # the tier's threads may have removed it meanwhile
                if path is not None:
                    os.truncate(path, 100) if verb == "spoil" else path.unlink()
        case _:
            writing = asyncio.create_task(tier.write(block, pinned=False))
            await asyncio.sleep(0)
            writing.cancel()
            await asyncio.wait([writing])


async def run(folder: Path, batches: list[list[Act]]) -> None:
    tier = make_tier(folder, budget=BUDGET, quarantine_limit=1)
    await tier.open()
    for batch in batches:
        await asyncio.gather(*(act(tier, folder, *one) for one in batch))
        tier.ledger.check_integrity()
        assert tier.ledger.used_bytes <= BUDGET
    # Blocks that were spoilt or lost are known to be once somebody asks for them.
    for block in BLOCKS:
        found = await tier.read(block.key)
        assert found is None or same(found, block)
        assert await tier.holds(block.key) == (found is not None)
    await settled(tier, folder)
    for block in BLOCKS:
        tier.ledger.pin(block.key, pinned=False)
        await tier.delete(block.key)
        assert not await tier.holds(block.key)
        assert await tier.read(block.key) is None
    assert tier.ledger.used_bytes == 0
    await settled(tier, folder)
    await tier.close()


async def settled(tier: ObjectTier, folder: Path) -> None:
    """Returns when the disk and the books agree: the thread of a cancelled write goes on to its end."""
    async with asyncio.timeout(10):
        while {path.stem for path in block_files(folder)} != {entry.key.hex() for entry in tier.ledger.entries()}:
            await asyncio.sleep(0.005)
            await tier.sweep()


@settings(max_examples=60)
@given(batches=st.lists(acts, min_size=1, max_size=4))
def test_the_disk_and_the_books_agree_whatever_happens_at_once(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[Act]]
) -> None:
    asyncio.run(run(tmp_path_factory.mktemp("races"), batches))


async def test_a_file_written_anew_is_not_put_aside_for_the_old_one(tmp_path: Path) -> None:
    tier = make_tier(tmp_path)
    await tier.open()
    block = BLOCKS[0]
    assert await tier.write(block, pinned=False)
    await act(tier, tmp_path, "spoil", 0)
    async with asyncio.timeout(10):
        async with tier._shelf.turn(block.key):
            writing = asyncio.create_task(tier.write(block, pinned=False))
            await asyncio.sleep(0)
            reading = asyncio.create_task(tier.read(block.key))
            while tier.meter.corruptions == 0:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.001)
        assert await writing
        assert await reading is None
    assert same(await tier.read(block.key), block)
    await tier.close()


async def test_a_victim_that_is_written_anew_stays_and_two_writers_never_wait_for_each_other(tmp_path: Path) -> None:
    tier = make_tier(tmp_path, budget=FILE_BYTES)
    await tier.open()
    first, second = BLOCKS[:2]
    assert await tier.write(first, pinned=False)
    async with asyncio.timeout(10):
        async with tier._shelf.turn(first.key):
            again = asyncio.create_task(tier.write(first, pinned=False))
            await asyncio.sleep(0)
            other = asyncio.create_task(tier.write(second, pinned=False))
            while first.key in tier.ledger:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.001)
        assert await again
        assert not await other, "a victim itself by then"
    assert same(await tier.read(first.key), first)
    assert [path.stem for path in block_files(tmp_path)] == [first.key.hex()]
    await tier.close()
