"""A worker killed while it keeps records: the table opens, what was confirmed is there, batches are whole."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefill_worker.records.record import space_name
from prefill_worker.records.records import Records
from tests.support.records import SPACE, record

ROOT = Path(__file__).parents[2]
BATCH = 3
# Writes numbered batches without end and says each that was confirmed.
WRITER = """
import asyncio, itertools, sys
from pathlib import Path
from prefill_worker.records.records import Records
from tests.support.records import SPACE, record

async def main(folder: str, first: int, batch: int) -> None:
    records = Records(Path(folder), None, key_space=SPACE)
    await records.open()
    for start in itertools.count(first, batch):
        await records.keep([record(start + index, tags=("t", str(index))) for index in range(batch)])
        print(start, flush=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


def killed_while_keeping(folder: Path, first: int, draws: random.Random) -> int:
    """Starts of batches confirmed before the kill, as the number after the last of them."""
    command = [sys.executable, "-c", WRITER, str(folder), str(first), str(BATCH)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        confirmed = first
        for _ in range(draws.randint(1, 30)):
            confirmed = int(writer.stdout.readline()) + BATCH
        time.sleep(draws.random() * 0.01)
        os.kill(writer.pid, signal.SIGKILL)
        for line in writer.stdout:
            if line.endswith("\n"):
                confirmed = int(line) + BATCH
    return confirmed


async def check(folder: Path, confirmed: int) -> int:
    """The number after the last record that is there."""
    records = Records(folder, None, key_space=SPACE)
    await records.open()
    found = await records.select()
    assert (records.figures.damaged_rows, records.figures.damaged_tables) == (0, 0)
    assert len(found) == len(records)
    assert len(found) % BATCH == 0
    assert len(found) >= confirmed
    expected = [record(number, tags=tuple(sorted(("t", str(number % BATCH))))) for number in range(len(found))]
    assert found == sorted(expected, key=lambda one: one.key)
    assert len(await records.select(tags=["1"])) == len(found) // BATCH
    await records.close()
    plain = sqlite3.connect(folder / f"records-{space_name(SPACE)}.sqlite")
    assert plain.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    plain.close()
    return len(found)


async def killed_again_and_again(folder: Path, times: int) -> None:
    draws, there = random.Random(4), 0
    for _ in range(times):
        there = await check(folder, killed_while_keeping(folder, there, draws))
    assert there > times


async def test_what_was_confirmed_outlives_kills(tmp_path: Path) -> None:
    await killed_again_and_again(tmp_path, 8)


@pytest.mark.slow
async def test_what_was_confirmed_outlives_a_hundred_kills(tmp_path: Path) -> None:
    await killed_again_and_again(tmp_path, 100)
