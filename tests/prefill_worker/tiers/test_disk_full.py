"""A disk without room: the tier says no, leaves nothing behind, and goes on with what fits."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.object_parts import TOKENS, block_files, make_block, make_tier, same

# 38 KiB a block: twelve do not fit.
LONG = 8 * TOKENS
ROOM = 400 << 10

_LIMITED = """
import asyncio, resource, signal, sys
from pathlib import Path
from tests.support.object_parts import FILE_BYTES, block_files, make_block, make_tier, same

async def main() -> None:
    tier = make_tier(Path(sys.argv[1]))
    await tier.open()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    assert not await tier.write(make_block(1, 400), pinned=False)
    assert (tier.meter.write_failures, len(tier.ledger), tier.ledger.used_bytes) == (1, 0, 0)
    assert block_files(Path(sys.argv[1])) == []
    await tier.sweep()
    assert await tier.write(make_block(2), pinned=False)
    assert same(await tier.read(make_block(2).key), make_block(2))
    await tier.close()

asyncio.run(main())
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root on Linux")
    system = ctypes.CDLL(None, use_errno=True)
    if system.mount(b"tmpfs", os.fsencode(tmp_path), b"tmpfs", 0, f"size={ROOM}".encode()) != 0:
        pytest.skip(f"a small file system cannot be mounted here: {os.strerror(ctypes.get_errno())}")
    yield tmp_path
    assert system.umount2(os.fsencode(tmp_path), 2) == 0  # MNT_DETACH


async def test_a_full_disk_costs_the_write_and_no_more(small_disk: Path) -> None:
    tier = make_tier(small_disk, budget=64 << 20)
    await tier.open()
    blocks = [make_block(number, LONG) for number in range(12)]
    written = [await tier.write(block, pinned=False) for block in blocks]
    assert written[0]
    assert not all(written)
    assert tier.meter.write_failures >= 1
    assert not tier.resting
    # The disk is smaller than the budget said: old blocks have gone to make room for new ones since.
    assert written[-1] or written[-2]
    assert tier.meter.evictions > 0
    assert {path.stem for path in block_files(small_disk)} == {entry.key.hex() for entry in tier.ledger.entries()}
    for block in blocks:
        if await tier.holds(block.key):
            assert same(await tier.read(block.key), block)
    tier.ledger.check_integrity()
    await tier.sweep()
    assert tier.ledger.budget_bytes == 64 << 20
    await tier.close()


async def test_a_disk_that_others_have_filled_recovers_when_there_is_room_again(small_disk: Path) -> None:
    tier = make_tier(small_disk)
    await tier.open()
    kept = make_block(1)
    assert await tier.write(kept, pinned=True)
    hog = small_disk / "hog"
    room = os.statvfs(small_disk)
    hog.write_bytes(bytes(room.f_bavail * room.f_frsize))
    for number in range(2, 8):
        assert not await tier.write(make_block(number), pinned=False)
        await tier.sweep()
    assert tier.meter.write_failures == 6, "it tries again after each sweep"
    assert same(await tier.read(kept.key), kept), "what is there is served all the same"
    assert [path.stem for path in block_files(small_disk)] == [kept.key.hex()]
    hog.unlink()
    await tier.sweep()
    assert await tier.write(make_block(2), pinned=False)
    await tier.close()


def test_a_limit_of_file_sizes_is_a_failure_like_any_other(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
