"""Workers that say what they should not: each is left out by itself, with the reason in words."""

from __future__ import annotations

import asyncio

import pytest

from drystone.v1.operations_pb2 import ProcessRole, ProcessState
from gateway.cluster import Cluster
from shared.enums import enum_name
from tests.support.fake_workers import DECODE, PREFILL, TOKENIZER, FakeWorker, serving_workers


def cluster_of(*workers: FakeWorker) -> Cluster:
    decode = [worker.address for worker in workers if worker.role != PREFILL]
    prefill = [worker.address for worker in workers if worker.role == PREFILL]
    return Cluster("model", decode, prefill, poll_seconds=0.01, tokenizer_fingerprint=TOKENIZER)


def details(cluster: Cluster) -> list[str]:
    return [worker.detail for worker in cluster.workers]


@pytest.mark.parametrize("other", [b"o" * 32, b""])
async def test_a_worker_with_another_tokenizer_is_left_out(other: bytes) -> None:
    sound, odd, prefill = FakeWorker("d", DECODE), FakeWorker("odd", DECODE), FakeWorker("p", PREFILL)
    odd.tokenizer = prefill.tokenizer = other
    async with serving_workers(sound, odd, prefill):
        cluster = cluster_of(sound, odd, prefill)
        await cluster.look()
        said = "differs from the gateway in tokenizer_fingerprint"
        assert details(cluster) == ["", said, said]
        odd.tokenizer = TOKENIZER
        await cluster.look()
        assert details(cluster) == ["", "", said]
        await cluster.close()


async def test_enum_values_of_a_newer_version_harm_only_their_worker() -> None:
    sound, state, role = FakeWorker("d", DECODE), FakeWorker("state", DECODE), FakeWorker("role", DECODE)
    state.state, role.role = ProcessState.ValueType(99), ProcessRole.ValueType(77)
    async with serving_workers(sound, state, role):
        cluster = Cluster(
            "model",
            [sound.address, state.address, role.address],
            [],
            poll_seconds=0.01,
            tokenizer_fingerprint=TOKENIZER,
        )
        running = asyncio.create_task(cluster.run())
        await asyncio.sleep(0.2)
        assert not running.done()
        assert details(cluster) == ["", "value 99", "is a value 77"]
        running.cancel()
        await cluster.close()


async def test_a_look_that_fails_leaves_only_that_worker_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sound, odd = FakeWorker("d", DECODE), FakeWorker("odd", PREFILL)
    async with serving_workers(sound, odd):
        cluster = cluster_of(sound, odd)
        judge = cluster._differs

        def broken(worker: object, info: object) -> str:
            if worker is cluster.workers[1]:
                raise ZeroDivisionError("oops")
            return judge(worker, info)  # type: ignore[arg-type] # passed on as they came

        monkeypatch.setattr(cluster, "_differs", broken)
        await cluster.look()
        assert details(cluster) == ["", "cannot be judged: ZeroDivisionError: oops"]
        await cluster.close()


async def test_the_second_worker_of_an_id_is_left_out_while_the_first_is_used() -> None:
    first, second, prefill = FakeWorker("same", DECODE), FakeWorker("same", DECODE), FakeWorker("same", PREFILL)
    second.delay = 0.05
    async with serving_workers(first, second, prefill):
        cluster = cluster_of(first, second, prefill)
        await cluster.look()
        assert details(cluster) == ["", f"has the worker id of {first.address}", ""]
        first.state = ProcessState.PROCESS_STATE_DRAINING
        await cluster.look()
        assert details(cluster) == ["draining", "", ""]
        await cluster.close()


def test_names_of_enum_values() -> None:
    assert enum_name(ProcessState, ProcessState.PROCESS_STATE_READY) == "PROCESS_STATE_READY"
    assert enum_name(ProcessState, ProcessState.ValueType(99)) == "value 99"
