"""Warming a block: on the first worker of its order, on the next when that fails, later when all are gone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from drystone.v1.operations_pb2 import ProcessRole
from gateway import block_warmer
from gateway.block_warmer import BlockWarmer
from gateway.cluster import Cluster
from gateway.routing import rendezvous_order
from gateway.tenants import Tenant
from gateway.worker import Worker
from shared.errors import DrystoneError, Reason
from shared.internal.v1.common_pb2 import BlockRef, WorkerIdentity
from shared.internal.v1.prefill_pb2 import BlockDone
from shared.internal.v1.worker_pb2 import GetInfoResponse
from tests.support.fake_workers import compatibility

REF = BlockRef(key=b"k" * 32, token_ids=[1, 2], store=True)
NAMES = ["a", "b", "c"]
ORDER = rendezvous_order(REF.key, NAMES)


def worker(name: str) -> Worker:
    info = GetInfoResponse(worker=WorkerIdentity(worker_id=name), compatibility=compatibility())
    return Worker(name, ProcessRole.PROCESS_ROLE_PREFILL, None, info=info, detail="")  # type: ignore[arg-type] # no call


class Warmer(BlockWarmer):
    """Asks nobody: answers come from a script, one for each attempt."""

    def __init__(self, script: dict[str, list[Reason | None]], patience: float = 60.0) -> None:
        cluster = Cluster("model", [], [], poll_seconds=1.0, tokenizer_fingerprint=b"")
        cluster.workers = [worker(name) for name in script]
        super().__init__(
            cluster,
            compatibility(),
            request_id="w",
            traceparent="",
            tenant=Tenant(),
            tags=(),
            ttl_seconds=None,
            pin=False,
            places=asyncio.Semaphore(4),
            timeout_seconds=9.0,
            patience_seconds=patience,
        )
        self.script = script
        self.asked: list[str] = []
        self.copied: list[str] = []

    async def _ask(self, worker: Worker, ref: BlockRef, *, recorded: bool) -> BlockDone:
        del recorded
        self.asked.append(worker.worker_id)
        reason = self.script[worker.worker_id].pop(0)
        if reason is not None:
            raise DrystoneError(reason, "as the script says", retry_after_ms=1)
        return BlockDone(key=ref.key)

    async def _copy_record(self, ref: BlockRef, holder: str) -> None:
        del ref
        self.copied.append(holder)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_warmer, "_AGAIN_SECONDS", 0.001)


async def warmed_by(warmer: Warmer, **how: Any) -> str:
    [block] = await warmer.warm([REF, REF], **how)
    return block.worker_id


async def test_the_first_of_the_order_has_it_and_its_record_is_copied() -> None:
    warmer = Warmer({name: [None] for name in NAMES})
    assert await warmed_by(warmer) == ORDER[0]
    assert (warmer.asked, warmer.copied) == ([ORDER[0]], [ORDER[0]])


async def test_what_has_no_key_for_the_caller_leaves_no_record() -> None:
    warmer = Warmer({name: [None] for name in NAMES})
    await warmed_by(warmer, recorded=False)
    assert warmer.copied == []


async def test_a_full_worker_is_asked_again_and_one_that_fails_is_not() -> None:
    script: dict[str, list[Reason | None]] = {
        ORDER[0]: [Reason.ENCODE_QUEUE_FULL, Reason.ENCODE_QUEUE_FULL, Reason.BLOCK_UNAVAILABLE],
        ORDER[1]: [None],
        ORDER[2]: [],
    }
    warmer = Warmer(script)
    assert await warmed_by(warmer) == ORDER[1]
    assert warmer.asked == [ORDER[0]] * 3 + [ORDER[1]]


async def test_workers_that_are_gone_are_waited_for() -> None:
    warmer = Warmer({"a": [Reason.WORKER_LOST, Reason.WORKER_LOST, None]})
    assert await warmed_by(warmer) == "a"


@pytest.mark.parametrize(
    ("reason", "attempts"), [(Reason.INTERNAL, 1), (Reason.RECORDS_FULL, 1), (Reason.BLOCK_UNAVAILABLE, 1)]
)
async def test_what_will_not_pass_fails_at_once(reason: Reason, attempts: int) -> None:
    warmer = Warmer({"a": [reason] * 9})
    with pytest.raises(DrystoneError, match="no prefill worker could keep the block; a: as the script says") as caught:
        await warmer.warm([REF])
    assert (caught.value.reason, len(warmer.asked)) == (reason, attempts)


async def test_patience_ends() -> None:
    with pytest.raises(DrystoneError) as caught:
        await Warmer({}, patience=0.01).warm([REF])
    assert caught.value.reason is Reason.NO_PREFILL_WORKER
