"""Records in the table: united, found, ended, bounded, and believed only when their key is right."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from prefill_worker.records.key_locks import KeyLocks
from prefill_worker.records.record import space_name
from prefill_worker.records.records import Records
from shared.errors import DrystoneError, Reason
from tests.support.records import SPACE, Clock, record


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def records(tmp_path: Path, clock: Clock) -> AsyncIterator[Records]:
    made = Records(tmp_path, None, key_space=SPACE, max_records=100, clock=clock)
    await made.open()
    yield made
    await made.close()


async def reopened(folder: Path, clock: Clock, space: object = SPACE) -> Records:
    again = Records(folder, None, key_space=space, clock=clock)  # type: ignore[arg-type]
    await again.open()
    return again


def file_of(folder: Path) -> Path:
    return folder / f"records-{space_name(SPACE)}.sqlite"


async def test_records_are_united(records: Records, clock: Clock) -> None:
    first = record(1, tenant="a", tags=("y", "x", "x"), expires_at=clock.now + 10)
    assert await records.keep([first, first]) == 1
    assert await records.keep([replace(first, tags=("x",))]) == 0
    later = replace(first, tenant="b", tags=("z",), expires_at=clock.now + 20, pinned=True)
    assert await records.keep([later]) == 1
    kept = (await records.get([first.key]))[first.key]
    assert kept == replace(later, tenant="a", tags=("x", "y", "z"))
    assert await records.keep([replace(first, expires_at=clock.now + 5)]) == 0
    assert await records.keep([replace(first, expires_at=None)]) == 1
    assert await records.keep([replace(first, expires_at=clock.now + 99)]) == 0
    assert (await records.get([first.key]))[first.key].expires_at is None
    assert (len(records), records.figures.kept) == (1, 3)


async def test_an_ended_record_is_gone_at_once_and_kept_anew(records: Records, clock: Clock) -> None:
    old = record(1, tenant="a", tags=("old",), expires_at=clock.now + 10, pinned=True)
    await records.keep([old, record(2)])
    clock.now += 10
    assert list(await records.get([old.key, record(2).key])) == [record(2).key]
    assert await records.select(tags=["old"]) == []
    assert await records.pinned_keys() == []
    assert await records.set_pinned([old.key], pinned=False) == []
    assert await records.keep([old]) == 0
    fresh = record(1, tenant="b", tags=("new",))
    assert await records.keep([fresh]) == 1
    assert await records.get([old.key]) == {old.key: fresh}
    assert await records.select(tags=["old"]) == []
    assert await records.expire() == []


async def test_expire_removes_what_has_ended(records: Records, clock: Clock) -> None:
    await records.keep([record(number, expires_at=clock.now + number) for number in range(1, 6)])
    clock.now += 3
    assert set(await records.expire()) == {record(number).key for number in (1, 2, 3)}
    assert len(records) == 2
    assert await records.expire() == []
    assert records.figures.expired == 3


async def test_what_could_not_be_let_go_of_stays_and_the_rest_goes(clock: Clock) -> None:
    records = Records(None, None, key_space=SPACE, clock=clock)
    await records.open()
    made = [record(number, expires_at=clock.now + number) for number in range(1, 600)]
    await records.keep(made)
    clock.now += 1000
    stuck = {one.key for one in made[::3]}

    async def let_go(keys: Sequence[bytes]) -> list[bytes]:
        return [key for key in keys if key not in stuck]

    assert set(await records.expire(let_go)) == {one.key for one in made} - stuck
    assert len(records) == len(stuck)
    assert set(await records.expire()) == stuck
    await records.close()


async def test_whoever_prolongs_a_record_waits_until_it_has_been_let_go_of(records: Records, clock: Clock) -> None:
    await records.keep([record(1, expires_at=clock.now + 1)])
    clock.now += 1
    begun, go = asyncio.Event(), asyncio.Event()

    async def let_go(keys: Sequence[bytes]) -> Sequence[bytes]:
        begun.set()
        await go.wait()
        return keys

    expiring = asyncio.create_task(records.expire(let_go))
    await begun.wait()
    keeping = asyncio.create_task(records.keep([record(1)]))
    await asyncio.sleep(0.02)
    assert not keeping.done()
    go.set()
    assert (await expiring, await keeping) == ([record(1).key], 1)
    assert await records.select() == [record(1)]


async def test_what_is_kept_outlives_the_process(records: Records, clock: Clock, tmp_path: Path) -> None:
    all_of_it = record(3, tenant="t\0ü", salt=b"\0salt", tags=("a\0b", "é"), expires_at=clock.now + 0.125, pinned=True)
    await records.keep([all_of_it, record(4)])
    await records.close()
    await records.close()
    again = await reopened(tmp_path, clock)
    assert await again.get([all_of_it.key, record(4).key]) == {all_of_it.key: all_of_it, record(4).key: record(4)}
    assert await again.select(tags=["a\0b"]) == [all_of_it]
    assert await again.select(tags=["a"]) == []
    assert len(again) == 2
    await again.close()


async def test_selection(records: Records) -> None:
    made = [record(number, tenant="ab"[number % 2], tags=(f"t{number % 3}", f"u{number % 5}")) for number in range(30)]
    await records.keep(made)
    ordered = sorted(made, key=lambda one: one.key)
    assert await records.select() == ordered
    assert await records.select(tenant="a", tags=["t1", "u2"]) == [
        one for one in ordered if one.tenant == "a" and {"t1", "u2"} & set(one.tags)
    ]
    assert await records.select(tenant="") == []
    prefix = ordered[7].key.hex()
    for length in (0, 1, 2, 3, 63, 64):
        assert await records.select(key_prefix=prefix[:length].upper()) == [
            one for one in ordered if one.key.hex().startswith(prefix[:length])
        ]
    pages, after = [], b""
    while page := await records.select(after_key=after, limit=7):
        pages.append(len(page))
        after = page[-1].key
    assert pages == [7, 7, 7, 7, 2]


@pytest.mark.parametrize("prefix", ["g", "0x", " ", "a" * 65, "٣"])
async def test_a_prefix_that_no_key_has_is_refused(records: Records, prefix: str) -> None:
    with pytest.raises(DrystoneError, match="key_prefix") as raised:
        await records.select(key_prefix=prefix)
    assert raised.value.reason == Reason.INVALID_BLOCK_KEY


async def test_many_keys_in_one_call(records: Records) -> None:
    await records.keep([record(1)])
    keys = [number.to_bytes(32, "big") for number in range(40_000)]
    assert list(await records.get([*keys, record(1).key])) == [record(1).key]


async def test_pins(records: Records) -> None:
    await records.keep([record(1), record(2, pinned=True), record(3)])
    keys = [record(number).key for number in (1, 2, 3, 4)]
    assert set(await records.set_pinned(keys[:2] + keys[3:], pinned=True)) == {keys[0]}
    assert await records.pinned_keys() == sorted(keys[:2])
    assert set(await records.set_pinned(keys, pinned=False)) == set(keys[:2])
    assert await records.pinned_keys() == []


async def test_deleting(records: Records, clock: Clock) -> None:
    await records.keep([record(1, tags=("x",)), record(2), record(3, expires_at=clock.now + 1)])
    clock.now += 2
    asked = [record(number).key for number in (2, 3, 1, 2, 9)]
    assert await records.delete(asked) == [record(2).key, record(1).key]
    assert (await records.get(asked), await records.select(tags=["x"]), len(records)) == ({}, [], 0)
    assert await records.delete(asked) == []
    assert records.figures.deleted == 2


async def test_a_full_table_takes_all_or_nothing(tmp_path: Path, clock: Clock) -> None:
    records = Records(tmp_path, None, key_space=SPACE, max_records=3, clock=clock)
    await records.open()
    await records.keep([record(1, expires_at=clock.now + 5), record(2)])
    with pytest.raises(DrystoneError) as raised:
        await records.keep([record(2, pinned=True), record(3), record(4)])
    assert raised.value.reason == Reason.RECORDS_FULL
    assert await records.select() == sorted([record(1, expires_at=clock.now + 5), record(2)], key=lambda one: one.key)
    assert await records.keep([record(2, pinned=True), record(3)]) == 2
    # An ended record takes no room, removed or not; a lowered bound leaves what there is.
    clock.now += 5
    assert await records.keep([record(4)]) == 1
    await records.close()
    smaller = Records(tmp_path, None, key_space=SPACE, max_records=1, clock=clock)
    await smaller.open()
    assert await smaller.keep([record(3, tags=("x",))]) == 1
    with pytest.raises(DrystoneError):
        await smaller.keep([record(5)])
    await smaller.close()


async def test_a_key_that_is_not_of_its_tokens_is_refused(records: Records) -> None:
    for wrong in (replace(record(1), token_ids=(1,)), replace(record(1), tenant_salt=b"other")):
        with pytest.raises(DrystoneError) as raised:
            await records.keep([record(2), wrong])
        assert raised.value.reason == Reason.INCOMPATIBLE_WORKERS
    assert len(records) == 0


@pytest.mark.parametrize(
    ("column", "value"),
    [("token_ids", b"\1\0\0\0"), ("token_ids", b"\1\0\0"), ("tenant_salt", b"x"), ("tags", "["), ("token_ids", "text")],
)
async def test_a_damaged_row_is_dropped(tmp_path: Path, clock: Clock, column: str, value: object) -> None:
    records = await reopened(tmp_path, clock)
    await records.keep([record(1), record(2)])
    await records.close()
    with sqlite3.connect(file_of(tmp_path)) as other:
        other.execute(f"UPDATE records SET {column} = ? WHERE key = ?", (value, record(1).key))  # noqa: S608 - ours
    other.close()
    records = await reopened(tmp_path, clock)
    assert await records.get([record(1).key, record(2).key]) == {record(2).key: record(2)}
    assert (records.figures.damaged_rows, len(records)) == (1, 1)
    assert await records.keep([record(1)]) == 1
    assert len(await records.select()) == 2
    await records.close()


@pytest.mark.parametrize("damage", ["garbage", "empty_header", "other_schema"])
async def test_a_damaged_file_is_set_aside(tmp_path: Path, clock: Clock, damage: str) -> None:
    records = await reopened(tmp_path, clock)
    await records.keep([record(1)])
    await records.close()
    match damage:
        case "garbage":
            file_of(tmp_path).write_bytes(b"not a database, for sure" * 99)
        case "empty_header":
            content = bytearray(file_of(tmp_path).read_bytes())
            content[:100] = bytes(100)
            file_of(tmp_path).write_bytes(content)
        case _:
            with sqlite3.connect(file_of(tmp_path)) as other:
                other.execute("UPDATE meta SET value = '99' WHERE name = 'schema'")
            other.close()
    before = file_of(tmp_path).read_bytes()
    records = await reopened(tmp_path, clock)
    assert (len(records), records.figures.damaged_tables) == (0, 1)
    assert file_of(tmp_path).with_name(file_of(tmp_path).name + ".damaged").read_bytes()[:100] == before[:100]
    assert await records.keep([record(2)]) == 1
    await records.close()
    records = await reopened(tmp_path, clock)
    assert (await records.select(), records.figures.damaged_tables) == ([record(2)], 0)
    await records.close()


async def test_damage_that_is_met_later_is_survived(tmp_path: Path, clock: Clock) -> None:
    records = await reopened(tmp_path, clock)
    await records.keep([record(number) for number in range(1000)])
    await records.close()
    page = 4096
    content = bytearray(file_of(tmp_path).read_bytes())
    for at in range(20 * page, len(content), page):
        content[at : at + 64] = b"\xaa" * 64
    file_of(tmp_path).write_bytes(content)
    records = await reopened(tmp_path, clock)
    written = {record(number).key: record(number) for number in range(1000)}
    assert (await records.get(list(written))).items() <= written.items()
    assert await records.keep([record(7)]) in {0, 1}
    assert (await records.get([record(7).key]))[record(7).key] == record(7)
    assert records.figures.damaged_tables == 1
    await records.close()


async def test_records_of_another_model_are_kept_apart(records: Records, clock: Clock, tmp_path: Path) -> None:
    other_space = replace(SPACE, dtype="bfloat16")
    await records.keep([record(1)])
    other = await reopened(tmp_path, clock, other_space)
    assert (len(other), await other.get([record(1).key])) == (0, {})
    await other.keep([record(1, space=other_space)])
    assert await records.select() == [record(1)]
    assert space_name(replace(SPACE, tenant_salt=b"x")) == space_name(SPACE)
    await other.close()


async def test_two_processes_do_not_share_a_table(records: Records, clock: Clock, tmp_path: Path) -> None:
    await records.keep([record(1)])
    second = Records(tmp_path, None, key_space=SPACE, table_timeout_s=20, clock=clock)
    second._table._file.busy_s = 0.05
    with pytest.raises(DrystoneError, match="locked") as raised:
        await second.open()
    assert raised.value.reason == Reason.INTERNAL
    assert second.figures.damaged_tables == 0
    await second.close()
    assert await records.select() == [record(1)]


async def test_a_table_in_memory(clock: Clock) -> None:
    records = Records(None, None, key_space=SPACE, clock=clock)
    await records.open()
    await records.keep([record(1)])
    assert await records.refresh() == 0
    assert await records.select() == [record(1)]
    await records.close()


async def test_a_table_that_fails_says_so_and_confirms_nothing(records: Records) -> None:
    await records.keep([record(1)])
    await records._on_table(records._table.close)
    with pytest.raises(DrystoneError) as raised:
        await records.keep([record(2)])
    assert raised.value.reason == Reason.INTERNAL
    assert await records.get([record(1).key]) == {}
    assert records.figures.table_failures == 2


async def test_a_full_disk_is_said_and_reading_goes_on(records: Records) -> None:
    await records.keep([record(1)])
    await records._on_table(lambda: records._table._file._connection.execute("PRAGMA max_page_count = 1"))  # type: ignore[union-attr]
    with pytest.raises(DrystoneError) as raised:
        await records.keep([record(number) for number in range(2, 3000)])
    assert raised.value.reason == Reason.RECORDS_FULL
    assert await records.select() == [record(1)]


async def test_key_locks_exclude_and_leave_nothing() -> None:
    locks = KeyLocks(0.05)
    inside: list[int] = []

    async def enter(number: int, keys: list[bytes]) -> None:
        async with locks.hold(keys):
            assert not inside
            inside.append(number)
            await asyncio.sleep(0)
            inside.remove(number)

    await asyncio.gather(*(enter(number, [b"b", bytes([97 + number % 3])]) for number in range(9)))
    assert len(locks) == 0


async def test_waiting_for_a_key_has_a_deadline() -> None:
    locks = KeyLocks(0.05)
    async with locks.hold([b"a"]):
        with pytest.raises(DrystoneError) as raised:
            async with locks.hold([b"a", b"0"]):
                pytest.fail("the key is held")
        assert raised.value.reason == Reason.DEADLINE_EXCEEDED
        async with locks.hold([b"0"]):
            pass
    async with locks.hold([b"a"]):
        pass
