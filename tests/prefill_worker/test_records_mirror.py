"""Records in a shared store, a folder and a server that speaks S3: what one worker kept, others find."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import obstore
import pytest
from moto.server import ThreadedMotoServer
from obstore.store import LocalStore, ObjectStore, S3Store

from prefill_worker.records.mirror import Mirror
from prefill_worker.records.record import BlockRecord, space_name
from prefill_worker.records.record_json import from_json, to_json
from prefill_worker.records.records import Records
from shared.errors import DrystoneError, Reason
from tests.support.records import SPACE, Clock, record

ROOT = f"records/{space_name(SPACE)}"
IDENTITY_OF_2: dict[str, Any] = {"key": record(2).key, "token_ids": record(2).token_ids}


@pytest.fixture(scope="module")
def s3_address() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


def s3_store(address: str, bucket: str) -> ObjectStore:
    return S3Store(
        bucket,
        endpoint=f"http://{address}",
        region="us-east-1",
        access_key_id="test",
        secret_access_key="test",  # noqa: S106 - the test server takes any
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return LocalStore(tmp_path / "shared", mkdir=True)
    address = request.getfixturevalue("s3_address")
    bucket = tmp_path.name.replace("_", "-").strip("-")[:40].lower()
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request("PUT", f"/{bucket}")
    assert connection.getresponse().status == 200
    connection.close()
    return s3_store(address, bucket)


@asynccontextmanager
async def worker(
    store: ObjectStore, path: Path | None = None, clock: Clock | None = None, **options: float
) -> AsyncIterator[Records]:
    limit = int(options.pop("max_records", 1000))
    mirror = Mirror(store, SPACE, **{"pause_s": 0, **options})
    records = Records(path, mirror, key_space=SPACE, max_records=limit, clock=clock or Clock())
    await records.open()
    yield records
    await records.close()


def path_of(one: BlockRecord) -> str:
    return f"{ROOT}/{one.key.hex()[:2]}/{one.key.hex()}.json"


async def objects(store: ObjectStore) -> set[str]:
    return {meta["path"] async for batch in obstore.list(store) for meta in batch}


class Switch:
    """Stands before a store's operations and fails them while it is off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = True
        self.calls = 0
        for name in ("get_async", "put_async", "delete_async", "list_with_delimiter_async"):
            monkeypatch.setattr(obstore, name, self._switched(getattr(obstore, name)))

    def _switched(self, real: Callable[..., object]) -> Callable[..., object]:
        async def call(*args: object, **kwargs: object) -> object:
            self.calls += 1
            if not self.on:
                raise ConnectionResetError("the store is gone")
            return await real(*args, **kwargs)  # type: ignore[misc] # passed on as it came

        return call


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Switch:
    return Switch(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "shared", mkdir=True)


async def test_another_worker_finds_what_one_kept(store: ObjectStore) -> None:
    clock = Clock()
    one = record(1, tenant="t", salt=b"s", tags=("x",), expires_at=clock.now + 9.5, pinned=True)
    async with worker(store) as first, worker(store) as second:
        assert await first.keep([one, record(2)]) == 2
        assert await objects(store) == {path_of(one), path_of(record(2))}
        assert await second.get([one.key, record(3).key]) == {one.key: one}
        assert await second.select() == [one]
        assert (len(second), second.figures.taken_in) == (1, 1)
        # What one adds does not take away what another knew.
        assert await second.keep([record(2, tags=("y",))]) == 1
        assert from_json(bytes(await (await obstore.get_async(store, path_of(record(2)))).bytes_async())).tags == ("y",)
        async with worker(store) as third:
            assert await third.keep([record(2, tags=("z",))]) == 1
            assert (await third.get([record(2).key]))[record(2).key].tags == ("y", "z")
            assert await third.set_pinned([one.key], pinned=False) == [one.key]
        async with worker(store) as fourth:
            assert (await fourth.get([one.key]))[one.key].pinned is False


async def test_deleting_reaches_the_store(store: ObjectStore) -> None:
    async with worker(store) as first, worker(store) as second:
        await first.keep([record(1), record(2)])
        assert await second.delete([record(3).key, record(1).key]) == [record(1).key]
        assert await objects(store) == {path_of(record(2))}
        assert await second.get([record(1).key]) == {}
        assert await first.delete([record(2).key]) == [record(2).key]
        assert await objects(store) == set()


async def test_refresh_takes_in_what_others_kept(store: ObjectStore) -> None:
    made = [record(number) for number in range(40)]
    async with worker(store) as first, worker(store) as second:
        await first.keep(made)
        assert await second.refresh(most=15) == 15
        assert await second.refresh() == 25
        assert await second.refresh() == 0
        assert await second.select() == sorted(made, key=lambda one: one.key)


async def test_small_refreshes_come_round(folder: LocalStore) -> None:
    async with worker(folder) as first, worker(folder) as second:
        await first.keep([record(number) for number in range(20)])
        for number in range(0, 20, 2):
            await obstore.put_async(folder, path_of(record(number)), b"damaged")
        for _ in range(40):
            await second.refresh(most=1)
        assert len(second) == 10


async def test_refresh_stops_at_a_full_table(folder: LocalStore) -> None:
    async with worker(folder) as first, worker(folder, max_records=5) as second:
        await first.keep([record(number) for number in range(20)])
        await second.refresh()
        assert len(second) <= 5
        # It is known all the same, as long as the store is.
        assert len(await second.get([record(number).key for number in range(20)])) == 20
        assert second.figures.not_taken_in > 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:0],
        lambda data: data[:-9],
        lambda data: data.replace(b'"pinned":false', b'"pinned":true'),
        lambda data: b"[" * 100_000 + data,
        lambda data: b"\xff" + data,
        lambda data: to_json(replace(from_json(data), **IDENTITY_OF_2)),
        lambda data: to_json(replace(from_json(data), token_ids=(1, 2))),
        lambda data: data.replace(b'"version":1', b'"version":2'),
        lambda data: data + b" " * (17 << 20),
    ],
    ids=["empty", "cut", "flipped", "deep", "binary", "moved", "wrong_tokens", "version", "large"],
)
async def test_a_damaged_object_is_not_believed(folder: LocalStore, damage: Callable[[bytes], bytes]) -> None:
    async with worker(folder) as first, worker(folder) as second:
        await first.keep([record(1)])
        good = bytes(await (await obstore.get_async(folder, path_of(record(1)))).bytes_async())
        await obstore.put_async(folder, path_of(record(1)), damage(good))
        assert await second.get([record(1).key]) == {}
        assert second.figures.damaged_objects == 1
        assert second.figures.mirror_failures == 0
        # Keeping it again mends the object.
        assert await second.keep([record(1)]) == 1
        assert bytes(await (await obstore.get_async(folder, path_of(record(1)))).bytes_async()) == good


@pytest.mark.parametrize(
    "fields",
    [
        {"token_ids": [-1]},
        {"token_ids": [1 << 32]},
        {"token_ids": [True]},
        {"token_ids": 5},
        {"token_ids": [1.0]},
        {"tags": [1]},
        {"tenant": None},
        {"expires_at": float("inf")},
        {"expires_at": "1"},
        {"expires_at": True},
        {"expires_at": 10**400},
        {"tenant": "\ud800"},
        {"tags": ["\ud800"]},
        {"pinned": 1},
        {"key": "zz"},
        {"key": 7},
    ],
)
def test_a_field_of_the_wrong_kind_is_damage_whatever_its_checksum(fields: dict[str, object]) -> None:
    from prefill_worker.records import record_json

    content = {**json.loads(to_json(record(1))), **fields}
    del content["checksum"]
    sealed = {**content, "checksum": record_json._checksum(content)}
    with pytest.raises(ValueError, match=r"kind|record|hexadecimal|argument"):
        from_json(json.dumps(sealed).encode())
    assert from_json(to_json(record(1))) == record(1)


async def test_objects_of_others_are_passed_over(folder: LocalStore) -> None:
    async with worker(folder) as records:
        await records.keep([record(1)])
        for name in ("README", f"{ROOT}/aa/x.json", f"{ROOT}/aa/{'g' * 64}.json", f"{ROOT}/aa/{'a' * 64}"):
            await obstore.put_async(folder, name, b"?")
        assert await records.refresh() == 0
        assert (records.figures.damaged_objects, records.figures.mirror_failures) == (0, 0)


async def test_ended_objects_are_not_taken_in_and_go_after_a_while(folder: LocalStore) -> None:
    clock = Clock()
    async with worker(folder, clock=clock) as first, worker(folder, clock=clock) as second:
        await first.keep([record(1, expires_at=clock.now + 10), record(2)])
        clock.now += 10
        assert await first.expire() == [record(1).key]
        assert await second.get([record(1).key]) == {}
        await second.refresh()
        assert path_of(record(1)) in await objects(folder)
        clock.now += 7200
        await second.refresh()
        assert await objects(folder) == {path_of(record(2))}


async def test_another_worker_may_prolong(folder: LocalStore) -> None:
    clock = Clock()
    async with worker(folder, clock=clock) as first, worker(folder, clock=clock) as second:
        await first.keep([record(1, expires_at=clock.now + 10)])
        await second.keep([record(1, expires_at=clock.now + 99)])
        clock.now += 10
        touched: list[bytes] = []

        async def let_go(keys: Sequence[bytes]) -> Sequence[bytes]:
            touched.extend(keys)
            return keys

        assert await first.expire(let_go) == touched == []
        assert (await first.select())[0].expires_at == clock.now + 89
        clock.now += 89
        assert await first.expire(let_go) == touched == [record(1).key]


async def test_nothing_expires_while_the_store_cannot_be_asked(folder: LocalStore, switch: Switch) -> None:
    clock = Clock()
    async with worker(folder, clock=clock) as records:
        await records.keep([record(1, expires_at=clock.now + 10)])
        clock.now += 10
        switch.on = False
        assert await records.expire() == []
        assert len(records) == 1
        switch.on = True
        assert await records.expire() == [record(1).key]


async def test_a_store_that_is_gone_stops_nothing_but_deleting(
    folder: LocalStore, switch: Switch, tmp_path: Path
) -> None:
    async with worker(folder, tmp_path) as records:
        switch.on = False
        assert await records.keep([record(1), record(2)]) == 2
        assert list(await records.get([record(1).key, record(3).key])) == [record(1).key]
        assert await records.refresh() == 0
        assert records.figures.mirror_failures > 0
        with pytest.raises(DrystoneError) as raised:
            await records.delete([record(1).key])
        assert raised.value.reason == Reason.BLOCK_UNAVAILABLE
        assert len(records) == 2
    # What the store missed is written by the first refresh that reaches it, by another process if need be.
    async with worker(folder, tmp_path) as records:
        switch.on = True
        assert await objects(folder) == set()
        await records.refresh()
        assert await objects(folder) == {path_of(record(1)), path_of(record(2))}
        assert records.figures.mirror_writes == 2
        await records.refresh()
        assert records.figures.mirror_writes == 2
        assert await records.delete([record(1).key]) == [record(1).key]


async def test_a_pin_that_the_store_missed_is_written_later(folder: LocalStore, switch: Switch, tmp_path: Path) -> None:
    async with worker(folder, tmp_path) as records, worker(folder) as other:
        await records.keep([record(1)])
        switch.on = False
        assert await records.set_pinned([record(1).key], pinned=True) == [record(1).key]
        switch.on = True
        await records.refresh()
        assert (await other.get([record(1).key]))[record(1).key].pinned


async def test_a_delete_cut_short_can_be_asked_again(
    folder: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = obstore.delete_async
    async with worker(folder, tmp_path) as records:
        made = [record(number) for number in range(40)]
        await records.keep(made)
        calls = 0

        async def some(store: ObjectStore, path: str) -> None:
            nonlocal calls
            calls += 1
            if calls > 20:
                raise ConnectionResetError
            await real(store, path)

        monkeypatch.setattr(obstore, "delete_async", some)
        with pytest.raises(DrystoneError):
            await records.delete([one.key for one in made])
        assert 0 < len(await objects(folder)) < 40
        monkeypatch.setattr(obstore, "delete_async", real)
        await records.refresh()
        assert len(await objects(folder)) == len(records) == 40
        assert len(await records.delete([one.key for one in made])) == 40
        assert await objects(folder) == set()


async def test_after_a_failure_the_store_is_left_alone_for_a_while(folder: LocalStore, switch: Switch) -> None:
    async with worker(folder, pause_s=60) as records:
        switch.on = False
        await records.get([record(1).key])
        calls = switch.calls
        for _ in range(5):
            await records.get([record(1).key])
        assert switch.calls == calls
        assert records.figures.mirror_skips == 5
        with pytest.raises(DrystoneError):
            await records.delete([record(1).key])
        assert switch.calls > calls


async def test_a_store_that_never_answers_is_a_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        async with worker(s3_store(address, "b"), timeout_s=0.1) as records:
            assert await records.keep([record(1)]) == 1
            assert await records.get([record(2).key]) == {}
            with pytest.raises(DrystoneError):
                await records.delete([record(1).key])
            assert await records.refresh() == 0
            assert records.figures.mirror_failures >= 4


async def test_a_late_write_does_not_bring_a_deleted_record_back(
    folder: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun, go = obstore.put_async, asyncio.Event(), asyncio.Event()

    async def slow(*args: object) -> object:
        begun.set()
        await go.wait()
        return await real(*args)  # type: ignore[arg-type] # of the right kind, or wrong on purpose

    monkeypatch.setattr(obstore, "put_async", slow)
    async with worker(folder) as records:
        keeping = asyncio.create_task(records.keep([record(1)]))
        await begun.wait()
        deleting = asyncio.create_task(records.delete([record(1).key]))
        await asyncio.sleep(0.05)
        assert not deleting.done()
        go.set()
        assert (await keeping, await deleting) == (1, [record(1).key])
        assert await objects(folder) == set()
        assert await records.get([record(1).key]) == {}


async def test_a_late_read_does_not_bring_a_deleted_record_back(
    folder: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun, go = obstore.get_async, asyncio.Event(), asyncio.Event()

    async def slow(*args: object) -> object:
        found = await real(*args)  # type: ignore[arg-type] # of the right kind, or wrong on purpose
        if not begun.is_set():
            begun.set()
            await go.wait()
        return found

    async with worker(folder) as first, worker(folder) as second:
        await first.keep([record(1)])
        monkeypatch.setattr(obstore, "get_async", slow)
        getting = asyncio.create_task(second.get([record(1).key]))
        await begun.wait()
        deleting = asyncio.create_task(second.delete([record(1).key]))
        await asyncio.sleep(0.05)
        assert not deleting.done()
        go.set()
        assert list(await getting) == [record(1).key]
        assert await deleting == [record(1).key]
        assert await second.get([record(1).key]) == {}
        assert len(second) == 0
