"""Which workers a gateway uses: those that answer, are ready, and hold KV of one kind."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest

from drystone.v1.operations_pb2 import ProcessState
from gateway import cluster as module
from gateway import worker as worker_module
from gateway.cluster import Cluster
from shared.errors import DrystoneError, Reason
from tests.support.fake_workers import DECODE, PREFILL, TOKENIZER, FakeWorker, compatibility, serving_workers


@contextlib.asynccontextmanager
async def looking(*workers: FakeWorker) -> AsyncIterator[Cluster]:
    """A cluster of these workers that has looked once."""
    async with serving_workers(*workers):
        decode = [worker.address for worker in workers if worker.role == DECODE]
        prefill = [worker.address for worker in workers if worker.role == PREFILL]
        cluster = Cluster("model", decode, prefill, poll_seconds=1.0, tokenizer_fingerprint=TOKENIZER)
        try:
            await cluster.look()
            yield cluster
        finally:
            await cluster.close()


def usable(cluster: Cluster) -> list[str]:
    return [worker.worker_id for worker in (*cluster.decode_workers, *cluster.prefill_workers)]


def details(cluster: Cluster) -> dict[str, str]:
    return {status.worker_id: status.detail for status in cluster.statuses()}


async def test_all_that_fit_are_used() -> None:
    async with looking(FakeWorker("d", DECODE), FakeWorker("p", PREFILL)) as cluster:
        assert usable(cluster) == ["d", "p"]
        assert cluster.info.worker.worker_id == "d"


@pytest.mark.parametrize("slow", ["decode", "prefill", "odd"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("model_fingerprint", b"x" * 32), ("dtype", "bfloat16"), ("rope_regime", b"y" * 32), ("layers", 4)],
)
async def test_who_differs_is_left_out_by_field_whoever_answers_first(slow: str, field: str, value: object) -> None:
    decode, prefill, odd = FakeWorker("d", DECODE), FakeWorker("p", PREFILL), FakeWorker("odd", PREFILL)
    odd.compatibility = compatibility(**{field: value})
    {"decode": decode, "prefill": prefill, "odd": odd}[slow].delay = 0.05
    async with looking(decode, prefill, odd) as cluster:
        assert usable(cluster) == ["d", "p"]
        assert details(cluster)["odd"] == f"differs from the other workers in {field}"
        states = {status.worker_id: status.state for status in cluster.statuses()}
        assert states["odd"] == ProcessState.PROCESS_STATE_UNUSABLE


async def test_the_model_may_change_when_no_worker_holds_the_old_one() -> None:
    decode, prefill = FakeWorker("d", DECODE), FakeWorker("p", PREFILL)
    async with looking(decode, prefill) as cluster:
        decode.compatibility = prefill.compatibility = compatibility(model_fingerprint=b"n" * 32)
        await cluster.look()
        assert usable(cluster) == ["d", "p"]
        assert cluster.info.compatibility.model_fingerprint == b"n" * 32


async def test_while_one_holds_the_old_model_a_new_one_waits() -> None:
    old, new = FakeWorker("old", DECODE), FakeWorker("new", DECODE)
    async with looking(old, new) as cluster:
        new.compatibility = compatibility(model_fingerprint=b"n" * 32)
        await cluster.look()
        assert usable(cluster) == ["old"]
        old.state = ProcessState.PROCESS_STATE_DRAINING
        await cluster.look()
        await cluster.look()
        assert usable(cluster) == ["new"]


async def test_who_drains_gets_nothing_new_and_another_role_is_told() -> None:
    draining, confused = FakeWorker("draining", DECODE), FakeWorker("confused", DECODE)
    draining.state = ProcessState.PROCESS_STATE_DRAINING
    async with serving_workers(draining, confused):
        cluster = Cluster(
            "model", [draining.address], [confused.address], poll_seconds=1.0, tokenizer_fingerprint=TOKENIZER
        )
        await cluster.look()
        assert usable(cluster) == []
        assert details(cluster) == {"draining": "draining", "confused": "is a PROCESS_ROLE_DECODE"}
        with pytest.raises(DrystoneError, match="draining: draining") as caught:
            _ = cluster.info
        assert caught.value.reason is Reason.NO_DECODE_WORKER
        assert caught.value.retry_after_ms == 1000
        await cluster.close()


async def test_who_does_not_answer_is_unreachable_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.1)
    decode = FakeWorker("d", DECODE)
    async with looking(decode) as cluster:
        decode.delay = 1.0
        await cluster.look()
        assert usable(cluster) == []
        [status] = cluster.statuses()
        assert status.state == ProcessState.PROCESS_STATE_UNREACHABLE
        assert "DEADLINE_EXCEEDED" in status.detail
        assert status.worker_id == "d"
        decode.delay = 0.0
        await cluster.look()
        assert usable(cluster) == ["d"]


async def test_a_restarted_worker_is_known_to_hold_nothing() -> None:
    decode = FakeWorker("d", DECODE)
    async with looking(decode) as cluster:
        [worker] = cluster.decode_workers
        worker.remember([(b"k" * 32, 5)])
        await cluster.look()
        assert worker.resident == {b"k" * 32: 5}
        decode.identity.incarnation = 2
        await cluster.look()
        assert worker.resident == {}


async def test_no_worker_at_all() -> None:
    cluster = Cluster("model", [], [], poll_seconds=1.0, tokenizer_fingerprint=TOKENIZER)
    await cluster.look()
    with pytest.raises(DrystoneError, match="none is configured"):
        _ = cluster.info
    await cluster.close()


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_REMEMBERED_KEYS", 3)
    worker = worker_module.Worker("a:1", DECODE, None)  # type: ignore[arg-type] # no call is made
    worker.remember([(bytes([number]), number) for number in range(4)])
    worker.remember([(bytes([1]), 1), (bytes([9]), 9)])
    assert list(worker.resident) == [bytes([3]), bytes([1]), bytes([9])]
