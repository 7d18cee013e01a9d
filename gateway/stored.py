"""Blocks that callers name by key: which tokens they are, as prefill workers remember them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from gateway.cluster import Cluster
from gateway.worker import Worker
from shared.errors import DrystoneError, Reason
from shared.internal.v1.prefill_pb2 import DescribeStoredRequest, StoredBlock
from shared.kv.keys import KeySpace

_ASK_SECONDS = 5.0


async def token_ids_of(cluster: Cluster, keys: KeySpace, named: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Token ids by block key (lower case), as far as a prefill worker knows them. All are asked at once.

    Args:
        cluster: The workers.
        keys: What keys are made of; an answer whose tokens do not make its key is not believed.
        named: Block keys, 64 hexadecimal digits each.

    Raises:
        DrystoneError: BLOCK_UNAVAILABLE: a key is not known to those that answered, and not all did.
    """
    if not named:
        return {}
    wanted = DescribeStoredRequest(keys=[bytes.fromhex(key) for key in named], with_token_ids=True)
    answers = await asyncio.gather(*(_stored_on(worker, wanted) for worker in cluster.prefill_workers))
    found = {
        bytes(block.key).hex(): tuple(block.token_ids)
        for blocks in answers
        for block in blocks or ()
        if block.token_ids and keys.key(block.token_ids) == bytes(block.key)
    }
    unknown = next((key for key in named if key not in found), None)
    if unknown is not None and None in answers:
        raise DrystoneError(
            Reason.BLOCK_UNAVAILABLE,
            f"block {unknown} is not known to the prefill workers that answered, and not all did; ask again",
            retry_after_ms=1000,
        )
    return found


async def _stored_on(worker: Worker, wanted: DescribeStoredRequest) -> Sequence[StoredBlock] | None:
    try:
        answer = await worker.prefill().DescribeBlocks(wanted, timeout=_ASK_SECONDS)
    except grpc.aio.AioRpcError:
        return None  # the cluster's next look will say what is wrong with it
    return answer.blocks
