"""A folder as a tier: what is written comes back, what is bad never does, the books say what is there."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.object_tier import ObjectTier
from shared.errors import DrystoneError, Reason
from shared.kv.birth import make_birth
from tests.support.object_parts import (
    FILE_BYTES,
    IDENTITY,
    SHAPE,
    TOKENS,
    Clock,
    block_files,
    make_block,
    make_tier,
    same,
)


async def opened(folder: Path, **options: object) -> ObjectTier:
    tier = make_tier(folder, **options)  # type: ignore[arg-type] # of the right kind, or wrong on purpose
    await tier.open()
    return tier


async def put(tier: ObjectTier, *blocks: StoredBlock, pinned: bool = False) -> None:
    for block in blocks:
        assert await tier.write(block, pinned=pinned)


def file_of(folder: Path, block: StoredBlock) -> Path:
    return folder / "blocks" / tier_prefix() / block.key.hex()[:2] / f"{block.key.hex()}.safetensors"


def tier_prefix() -> str:
    return f"{IDENTITY.model_fingerprint.hex()[:16]}-float32-v1"


async def test_a_block_comes_back_as_it_was_and_after_a_restart(tmp_path: Path) -> None:
    tier = await opened(tmp_path)
    first, second = make_block(1), make_block(2, 7, tenant="acme")
    assert await tier.read(first.key) is None
    await put(tier, first, second)
    assert same(await tier.read(first.key), first)
    assert same(await tier.read(second.key), second)
    assert (tier.meter.hits, tier.meter.misses) == (2, 1)
    assert tier.meter.written_bytes == tier.meter.read_bytes == first.bytes + second.bytes
    await tier.close()

    again = await opened(tmp_path)
    assert await again.holds(first.key)
    assert again.ledger.used_bytes == sum(path.stat().st_size for path in block_files(tmp_path))
    entry = again.ledger.get(second.key)
    assert entry is not None
    assert entry.tokens == 7
    assert same(await again.read(second.key), second)
    known = again.ledger.get(second.key)
    assert known is not None
    assert (known.tenant, known.hits) == ("acme", 1)
    again.ledger.check_integrity()
    await again.close()


async def test_files_have_the_name_and_the_form_that_they_are_said_to_have(tmp_path: Path) -> None:
    tier = await opened(tmp_path / "new" / "folder")
    block = make_block(3)
    await put(tier, block)
    [path] = block_files(tmp_path / "new" / "folder")
    assert path == file_of(tmp_path / "new" / "folder", block)
    assert path.stat().st_size == FILE_BYTES
    with safe_open(path, "numpy") as file:
        assert file.get_tensor("kv").tobytes() == block.data
        assert tuple(file.get_tensor("token_ids")) == block.token_ids
    assert (tmp_path / "new" / "folder").stat().st_mode & 0o777 == 0o700
    await tier.close()


async def test_what_is_read_is_not_copied(tmp_path: Path) -> None:
    tier = await opened(tmp_path)
    await put(tier, make_block(4))
    found = await tier.read(make_block(4).key)
    assert found is not None
    assert found.data.readonly
    assert type(found.data.obj).__name__ == "Bytes", "the buffer of the store's client"
    await tier.close()


async def test_a_deleted_block_is_gone_from_the_disk_and_the_books(tmp_path: Path) -> None:
    tier = await opened(tmp_path)
    block = make_block(5)
    await put(tier, block)
    assert await tier.delete(block.key) == FILE_BYTES
    assert await tier.delete(block.key) == 0
    assert not await tier.holds(block.key)
    assert await tier.read(block.key) is None
    assert block_files(tmp_path) == []
    await put(tier, block)
    assert same(await tier.read(block.key), block)
    await tier.close()


async def test_a_block_whose_file_somebody_removed_is_a_miss_and_off_the_books(tmp_path: Path) -> None:
    tier = await opened(tmp_path)
    block = make_block(6)
    await put(tier, block)
    file_of(tmp_path, block).unlink()
    assert await tier.read(block.key) is None
    assert (tier.meter.misses, tier.meter.failures, len(tier.ledger)) == (1, 0, 0)
    await tier.close()


async def test_delete_says_when_it_could_not(tmp_path: Path) -> None:
    tier = await opened(tmp_path)
    block = make_block(7)
    await put(tier, block)
    path = file_of(tmp_path, block)
    path.unlink()
    (path / "in_the_way").mkdir(parents=True)
    with pytest.raises(DrystoneError) as raised:
        await tier.delete(block.key)
    assert raised.value.reason is Reason.BLOCK_UNAVAILABLE
    assert await tier.holds(block.key), "it may still be there"
    await tier.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bit=st.integers(0, 8 * FILE_BYTES - 1))
def test_a_flipped_bit_is_found_counted_and_put_aside(tmp_path_factory: pytest.TempPathFactory, bit: int) -> None:
    folder = tmp_path_factory.mktemp("flipped")

    async def check() -> None:
        tier = await opened(folder)
        block = make_block(8)
        await put(tier, block)
        path = file_of(folder, block)
        raw = bytearray(path.read_bytes())
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        assert await tier.read(block.key) is None
        assert (tier.meter.corruptions, tier.meter.hits, len(tier.ledger)) == (1, 0, 0)
        assert block_files(folder) == []
        kept = folder / "quarantine" / tier_prefix() / path.name
        assert kept.read_bytes() == raw
        await put(tier, block)
        assert same(await tier.read(block.key), block)
        await tier.delete(block.key)
        assert not kept.exists(), "what is deleted is nowhere, not even put aside"
        await tier.close()

    asyncio.run(check())


@pytest.mark.parametrize("left", [0, 1, 100, FILE_BYTES - 1])
async def test_a_file_cut_off_is_found_while_running_and_at_start(tmp_path: Path, left: int) -> None:
    tier = await opened(tmp_path)
    block, other = make_block(9), make_block(10)
    await put(tier, block, other)
    os.truncate(file_of(tmp_path, block), left)
    assert await tier.read(block.key) is None
    assert tier.meter.corruptions == 1
    await tier.close()

    os.truncate(file_of(tmp_path, other), left)
    again = await opened(tmp_path)
    assert again.meter.corruptions == 1
    assert not await again.holds(other.key)
    assert await again.read(other.key) is None
    assert block_files(tmp_path) == []
    await again.close()


async def test_a_file_of_another_block_model_type_or_regime_under_this_name_is_refused(tmp_path: Path) -> None:
    block = make_block(11)
    impostors = {
        "model": dataclasses.replace(IDENTITY, model_fingerprint=IDENTITY.model_fingerprint[:8] + bytes(24)),
        "regime": dataclasses.replace(IDENTITY, rope_regime=bytes(31) + b"x"),
        "dtype": dataclasses.replace(IDENTITY, shape=dataclasses.replace(SHAPE, head_dim=16, dtype="float16")),
        "layout": dataclasses.replace(IDENTITY, layout_version=2),
        "key": IDENTITY,
    }
    for name, identity in impostors.items():
        elsewhere = tmp_path / name
        tier = await opened(elsewhere, identity=identity)
        theirs = make_block(12) if name == "key" else block
        birth = make_birth(theirs.key, identity.shape, TOKENS, theirs.data)
        await put(tier, dataclasses.replace(theirs, birth=birth))
        await tier.close()
        [path] = block_files(elsewhere)

        folder = tmp_path / f"for {name}"
        mine = await opened(folder)
        await put(mine, block)
        path.replace(file_of(folder, block))
        assert await mine.read(block.key) is None, name
        assert mine.meter.corruptions == 1, name
        await mine.close()


async def test_bad_files_are_kept_up_to_a_number(tmp_path: Path) -> None:
    tier = await opened(tmp_path, quarantine_limit=2)
    blocks = [make_block(number) for number in range(20, 24)]
    await put(tier, *blocks)
    for block in blocks:
        file_of(tmp_path, block).write_bytes(b"nonsense")
        assert await tier.read(block.key) is None
    names = {path.stem for path in (tmp_path / "quarantine").rglob("*.safetensors")}
    assert names == {block.key.hex() for block in blocks[2:]}
    await tier.close()
    again = await opened(tmp_path, quarantine_limit=1)
    assert [path.stem for path in (tmp_path / "quarantine").rglob("*.safetensors")] == [blocks[3].key.hex()]
    await again.close()


async def test_the_budget_holds_on_the_disk_and_across_restarts(tmp_path: Path) -> None:
    tier = await opened(tmp_path, budget=3 * FILE_BYTES)
    blocks = [make_block(number) for number in range(30, 36)]
    await put(tier, blocks[0], pinned=True)
    await put(tier, *blocks[1:])
    assert tier.meter.evictions == 3
    assert {path.stem for path in block_files(tmp_path)} == {entry.key.hex() for entry in tier.ledger.entries()}
    assert await tier.holds(blocks[0].key), "pinned"
    await tier.close()

    for age, number in enumerate((0, 5, 4)):  # read in this order, long ago first
        os.utime(file_of(tmp_path, blocks[number]), (1_000_000 + age, 1_000_000 + age))
    pins = {blocks[0].key}
    less = await opened(tmp_path, budget=2 * FILE_BYTES, pinned=pins.__contains__)
    assert {entry.key for entry in less.ledger.entries()} == {blocks[0].key, blocks[4].key}
    assert {path.stem for path in block_files(tmp_path)} == {blocks[0].key.hex(), blocks[4].key.hex()}
    assert not await less.write(make_block(99, 200), pinned=False), "larger than all that is not pinned"
    less.ledger.check_integrity()
    await less.close()


async def test_writes_at_the_same_time_keep_the_budget_and_the_books(tmp_path: Path) -> None:
    tier = await opened(tmp_path, budget=4 * FILE_BYTES)
    blocks = [make_block(number) for number in range(40, 56)]
    async with asyncio.timeout(30):
        outcomes = await asyncio.gather(*(tier.write(block, pinned=False) for block in blocks + blocks))
    files = {path.stem for path in block_files(tmp_path)}
    assert len(files) <= 4
    assert files == {entry.key.hex() for entry in tier.ledger.entries()}
    assert any(outcomes)
    for entry in tier.ledger.entries():
        assert await tier.read(entry.key) is not None
    tier.ledger.check_integrity()
    await tier.close()


async def test_a_start_over_the_budget_keeps_what_was_used_last(tmp_path: Path) -> None:
    tier = await opened(tmp_path)
    blocks = sorted((make_block(number) for number in range(36, 46)), key=lambda block: block.key)
    await put(tier, *blocks)
    await tier.close()
    # One order of ages and then the other: no order of names or of folders fits both.
    for kept in (blocks[5:], blocks[5:7]):
        others = [block for block in blocks if block not in kept and file_of(tmp_path, block).exists()]
        oldest_first = others + kept
        for age, block in enumerate(oldest_first):
            os.utime(file_of(tmp_path, block), (1_000_000 + age, 1_000_000 + age))
        less = await opened(tmp_path, budget=len(kept) * FILE_BYTES)
        assert [block for block in blocks if file_of(tmp_path, block).exists()] == kept
        assert {entry.key for entry in less.ledger.entries()} == {block.key for block in kept}
        await less.close()


async def test_a_block_that_is_still_being_written_is_not_there_yet(tmp_path: Path) -> None:
    tier = await opened(tmp_path)
    block = make_block(46, 20_000)
    writing = asyncio.create_task(tier.write(block, pinned=False))
    await asyncio.sleep(0)
    assert block.key in tier.ledger, "its place is"
    assert not await tier.holds(block.key)
    assert await tier.read(block.key) is None
    assert await writing
    assert await tier.holds(block.key)
    await tier.close()


async def test_last_use_outlives_a_restart_and_idle_blocks_expire(tmp_path: Path) -> None:
    clock = Clock(2_000_000.0)
    used, idle, pinned = make_block(60), make_block(61), make_block(62)
    tier = await opened(tmp_path)
    await put(tier, used, idle, pinned)
    for block in (used, idle, pinned):
        os.utime(file_of(tmp_path, block), (1_000_000, 1_000_000))
    assert await tier.read(used.key) is not None
    assert file_of(tmp_path, used).stat().st_mtime > 1_000_000
    await tier.close()
    os.utime(file_of(tmp_path, used), (1_999_000, 1_999_000))

    pins = {pinned.key}
    again = await opened(tmp_path, ledger_clock=clock, ttl_seconds=3600.0, pinned=pins.__contains__)
    await again.sweep()
    assert {entry.key for entry in again.ledger.entries()} == {used.key, pinned.key}
    assert again.meter.expirations == 1
    assert not file_of(tmp_path, idle).exists()
    clock.now += 3600.0
    await again.sweep()
    assert [path.stem for path in block_files(tmp_path)] == [pinned.key.hex()]
    await again.close()


async def test_a_second_opener_is_refused_until_the_first_has_closed(tmp_path: Path) -> None:
    tier = await opened(tmp_path)
    other = make_tier(tmp_path)
    with pytest.raises(OSError, match=rf"disk_path: {tmp_path} is in use by another worker"):
        await other.open()
    await tier.close()
    await other.open()
    await other.close()


async def test_leftovers_of_writers_go_at_start_and_foreign_files_stay(tmp_path: Path) -> None:
    tier = await opened(tmp_path)
    block = make_block(70)
    await put(tier, block)
    await tier.close()
    path = file_of(tmp_path, block)
    leftover = path.with_name(f"{path.name}#17")
    leftover.write_bytes(b"half a block")
    note = tmp_path / "blocks" / "README"
    note.write_text("not ours")
    again = await opened(tmp_path)
    assert not leftover.exists()
    assert note.exists()
    assert same(await again.read(block.key), block)
    await again.close()


async def test_blocks_of_other_models_take_of_the_budget_and_go_first(tmp_path: Path) -> None:
    other = dataclasses.replace(IDENTITY, model_fingerprint=bytes(32))
    theirs = await opened(tmp_path, identity=other)
    await put(theirs, make_block(80), make_block(81))
    await theirs.close()
    tier = await opened(tmp_path, budget=3 * FILE_BYTES)
    await put(tier, make_block(82))
    assert len(block_files(tmp_path)) == 3, "there is room yet"
    await put(tier, make_block(83), make_block(84))
    assert tier.meter.evictions == 0
    assert {path.stem for path in block_files(tmp_path)} == {entry.key.hex() for entry in tier.ledger.entries()}
    await tier.close()


async def test_a_write_that_is_cancelled_leaves_nothing_that_counts(tmp_path: Path) -> None:
    tier = await opened(tmp_path)
    block = make_block(90)
    writing = asyncio.create_task(tier.write(block, pinned=False))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert not await tier.holds(block.key)
    assert tier.ledger.used_bytes == 0
    async with asyncio.timeout(5):
        while block_files(tmp_path):  # its thread may have gone on to the end: a sweep finds that
            await asyncio.sleep(0.01)
            await tier.sweep()
    await put(tier, block)
    await tier.sweep()
    assert same(await tier.read(block.key), block)
    await tier.close()


async def test_a_block_that_is_no_block_of_this_model_is_not_written(tmp_path: Path) -> None:
    tier = await opened(tmp_path)
    block = make_block(91)
    assert not await tier.write(dataclasses.replace(block, data=block.data[:-4]), pinned=False)
    assert tier.meter.write_failures == 1
    assert block_files(tmp_path) == []
    await tier.close()
