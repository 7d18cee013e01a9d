"""A process that writes and removes blocks of a folder until it is killed: `python -m tests.support.block_writer`.

Says on stdout what it is about to write (`begin N`) and what is there (`done N`).
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.block_file import FileIdentity, file_bytes
from prefill_worker.tiers.object_tier import ObjectTier
from shared.kv.layout import KvShape
from tests.support.object_parts import KEYS, make_block, make_tier

# Blocks of four megabytes, so that a kill finds some half written.
SHAPE = KvShape(layers=4, kv_heads=4, head_dim=32, dtype="float32")
TOKENS = 1024
IDENTITY = FileIdentity.of(KEYS, SHAPE)
BLOCKS = 9
# Room for fewer than there are: eviction goes on all the while.
BUDGET = 6 * file_bytes(TOKENS, IDENTITY)
WRITERS = 3


def known_block(number: int) -> StoredBlock:
    """One of the blocks that are written."""
    return make_block(number, TOKENS, shape=SHAPE)


def make_crash_tier(folder: Path) -> ObjectTier:
    """The folder's tier, as this process has it."""
    return make_tier(folder, budget=BUDGET, identity=IDENTITY)


async def _write(tier: ObjectTier, blocks: list[StoredBlock], mine: random.Random) -> None:
    while True:
        number = mine.randrange(len(blocks))
        if mine.random() < 0.5:
            await tier.delete(blocks[number].key)
        print("begin", number, flush=True)  # noqa: T201 - the parent reads it
        if await tier.write(blocks[number], pinned=False):
            print("done", number, flush=True)  # noqa: T201 - likewise


async def _main(folder: Path, seed: int) -> None:
    tier = make_crash_tier(folder)
    await tier.open()
    blocks = [known_block(number) for number in range(BLOCKS)]
    await asyncio.gather(*(_write(tier, blocks, random.Random(seed + place)) for place in range(WRITERS)))


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), int(sys.argv[2])))
