"""Everything at once on one folder: afterwards the disk and the books say the same, and no read was wrong."""

from __future__ import annotations

import asyncio
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
            if path is not None:
                path.write_bytes(b"spoilt") if verb == "spoil" else path.unlink()
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
    async with asyncio.timeout(5):
        while {path.stem for path in block_files(folder)} != {entry.key.hex() for entry in tier.ledger.entries()}:
            await asyncio.sleep(0.005)  # the thread of a cancelled write goes on to its end
            await tier.sweep()
    for block in BLOCKS[1::2]:  # unpinned at the last
        tier.ledger.pin(block.key, pinned=False)
        await tier.delete(block.key)
        assert not await tier.holds(block.key)
        assert find_file(folder, BLOCKS.index(block)) is None
    await tier.close()


@settings(max_examples=60)
@given(batches=st.lists(acts, min_size=1, max_size=4))
def test_the_disk_and_the_books_agree_whatever_happens_at_once(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[Act]]
) -> None:
    asyncio.run(run(tmp_path_factory.mktemp("races"), batches))
