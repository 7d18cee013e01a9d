"""A worker killed while it writes: whatever it leaves is whole, or is not served."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from pathlib import Path

from prefill_worker.tiers.block_file import decode_file
from tests.support.block_writer import BLOCKS, BUDGET, IDENTITY, known_block, make_crash_tier
from tests.support.object_parts import block_files, same

ROUNDS = int(os.environ.get("DRYSTONE_CRASHES", "6"))
ROOT = Path(__file__).parents[3]


def _half_written(folder: Path) -> list[Path]:
    return [path for path in block_files(folder) if "#" in path.name]


async def _write_until_killed(folder: Path, seed: int, after_seconds: float | None) -> tuple[int, int]:
    """Writes begun and ended by the time that the writer died: after so long, or as soon as half a file is seen."""
    writer = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.block_writer",
        str(folder),
        str(seed),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert writer.stdout is not None
    async with asyncio.timeout(60):
        said = [await writer.stdout.readline()]
        if after_seconds is None:
            end = time.monotonic() + 1.0
            while not _half_written(folder) and time.monotonic() < end:
                pass  # nothing else runs here, and a write takes a few milliseconds
        else:
            await asyncio.sleep(after_seconds)
        writer.kill()
        said += (await writer.stdout.read()).splitlines()
        await writer.wait()
    assert said[0].startswith(b"begin"), "it broke before its first write"
    return sum(line.startswith(b"begin") for line in said), sum(line.startswith(b"done") for line in said)


async def test_no_block_of_a_killed_writer_is_wrong_and_those_that_were_written_are_there(tmp_path: Path) -> None:
    draw = random.Random(20240915)
    blocks = {block.key.hex(): block for block in map(known_block, range(BLOCKS))}
    inside = halves = served = 0
    for kill in range(ROUNDS):
        after_seconds = None if kill % 2 else draw.choice((0.02, 0.2)) * draw.random()
        begun, ended = await _write_until_killed(tmp_path, kill, after_seconds)
        leftovers = _half_written(tmp_path)
        inside += begun > ended
        halves += bool(leftovers)
        whole = [path for path in block_files(tmp_path) if "#" not in path.name]
        for path in whole:
            block = blocks[path.name.removesuffix(".safetensors")]
            assert same(decode_file(memoryview(path.read_bytes()), block.key, IDENTITY), block)

        tier = make_crash_tier(tmp_path)
        await tier.open()
        assert not _half_written(tmp_path)
        assert tier.ledger.used_bytes <= BUDGET
        for block in blocks.values():
            held = await tier.holds(block.key)
            found = await tier.read(block.key)
            assert (found is not None) == held
            assert found is None or same(found, block)
            served += held
        assert tier.meter.corruptions == 0
        await tier.close()
    print(f"{ROUNDS} kills, {halves} left half a file; {served} blocks served afterwards")  # noqa: T201 - a figure
    assert inside > 0, "no kill came while writes were begun and not ended"
    assert halves > 0, "no kill came while a file was being written"
    assert served > 0
