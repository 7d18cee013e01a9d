"""A prefill worker's start that fails, its upkeep of records, and what its service refuses."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from prefill_worker.app import PrefillApp
from prefill_worker.service import PrefillService
from prefill_worker.settings import PrefillSettings
from shared.errors import DrystoneError, Reason
from shared.internal.v1 import prefill_pb2 as pb
from tests.conftest import MakeFolder
from tests.support.stacks import until


def app_of(folder: Path, disk: Path, **options: object) -> PrefillApp:
    settings = PrefillSettings(
        model=str(folder),
        worker_id="p",
        host="127.0.0.1",
        disk_path=disk,
        ram_bytes=1 << 20,
        native_encoder=False,
        **options,  # type: ignore[arg-type] # settings of a test
    )
    return PrefillApp(settings, folder, "tiny")


async def test_a_start_that_fails_leaves_folder_and_table_free(tiny_folder: MakeFolder, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = app_of(tiny_folder(), tmp_path, port=taken.getsockname()[1])
        with pytest.raises(OSError, match="cannot serve"):
            await refused.start()
        await refused.stop(0.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = app_of(tiny_folder(), tmp_path, metrics_port=taken.getsockname()[1])
        with pytest.raises(OSError, match="in use"):
            await refused.start()
        assert refused.tasks == []
    app = app_of(tiny_folder(), tmp_path)
    await app.start()
    await app.stop(0.0)
    await app.stop(0.0)


async def test_a_defect_in_the_upkeep_of_records_ends_no_worker(
    tiny_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = app_of(tiny_folder(), tmp_path, sweep_seconds=0.01)
    await app.start()
    calls = 0

    async def broken() -> None:
        nonlocal calls
        calls += 1
        raise ExceptionGroup("of tasks", [OverflowError("a number")])

    monkeypatch.setattr(app.holdings, "expire", broken)
    await until(lambda: calls > 2)
    assert not any(task.done() for task in app.tasks)
    assert app.holdings.records.figures.table_failures >= 2
    await app.stop(0.0)


async def test_a_tenant_that_no_file_has_room_for_is_refused(tiny_folder: MakeFolder, tmp_path: Path) -> None:
    app = app_of(tiny_folder(), tmp_path)
    await app.start()
    service = PrefillService(app.model, None, app.holdings, 1.0)  # type: ignore[arg-type] # there are no jobs to run

    async def encode(tenant: str) -> list[pb.EncodeBlocksResponse]:
        request = pb.EncodeBlocksRequest(model_fingerprint=app.model.fingerprint, tenant=tenant)
        return [event async for event in service.EncodeBlocks(request, None)]  # type: ignore[arg-type] # not used

    assert await encode("漢" * 85 + "x") == []
    with pytest.raises(DrystoneError, match="tenant") as raised:
        await encode("漢" * 85 + "xx")
    assert raised.value.reason is Reason.INVALID_FIELD
    await app.stop(0.0)
