"""Blocks of known content and tiers over folders and buckets; no torch, so that processes with them start fast."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.block_file import FileIdentity, file_bytes
from prefill_worker.tiers.ledger import Ledger
from prefill_worker.tiers.locations import Patience, open_location
from prefill_worker.tiers.object_tier import ObjectTier
from prefill_worker.tiers.pace import Pace
from shared.internal.v1.common_pb2 import ShipSource
from shared.kv.birth import BIRTH_ID_BYTES, Birth, chunk_checksum, chunk_plan
from shared.kv.keys import KeySpace
from shared.kv.layout import LAYOUT_VERSION, KvShape

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SHAPE = KvShape(layers=2, kv_heads=2, head_dim=8, dtype="float32")
TOKENS = 40
KEYS = KeySpace(bytes(range(32)), SHAPE.dtype, LAYOUT_VERSION, bytes(32))
IDENTITY = FileIdentity.of(KEYS, SHAPE)
FILE_BYTES = file_bytes(TOKENS, IDENTITY)
QUICK = Patience(
    connect_seconds=0.5,
    look_seconds=0.5,
    read_seconds=0.5,
    write_seconds=1.0,
    delete_seconds=0.5,
    list_seconds=0.5,
    retries=0,
)


class Clock:
    """Time that a test moves by hand."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def make_block(number: int, tokens: int = TOKENS, *, shape: KvShape = SHAPE, tenant: str = "") -> StoredBlock:
    """The block of this number: the same tokens, KV and birth wherever it is made."""
    token_ids = tuple((number + 7 * place) % 32_000 for place in range(tokens))
    key = KEYS.key(token_ids)
    data = memoryview(random.Random(number).randbytes(shape.extent_bytes(tokens)))
    birth_id = random.Random(number + (1 << 20)).randbytes(BIRTH_ID_BYTES)
    sums = tuple(
        chunk_checksum(key, birth_id, shape, tokens, one, data[one.offset : one.offset + one.length])
        for one in chunk_plan(shape, tokens)
    )
    return StoredBlock(key, token_ids, data, Birth(birth_id, tokens, sums), tenant)


def same(one: StoredBlock | None, other: StoredBlock) -> bool:
    """Equal in all that is kept of a block."""
    return one is not None and (one.key, one.token_ids, one.data, one.birth, one.tenant) == (
        other.key,
        other.token_ids,
        other.data,
        other.birth,
        other.tenant,
    )


def make_tier(
    store: ObjectStore | Path,
    *,
    budget: int | None = None,
    shared: bool = False,
    identity: FileIdentity = IDENTITY,
    encode_seconds: Callable[[int], float | None] = lambda _: None,
    ledger_clock: Callable[[], float] | None = None,
    ttl_seconds: float | None = None,
    **options: Any,
) -> ObjectTier:
    """A tier that is not open yet; a path stands for a folder of its own."""
    clock = {} if ledger_clock is None else {"clock": ledger_clock}
    ledger = Ledger(budget, float, ttl_seconds=ttl_seconds, **clock)
    return ObjectTier(
        "object" if shared else "disk",
        ShipSource.SHIP_SOURCE_OBJECT_STORE if shared else ShipSource.SHIP_SOURCE_DISK,
        open_location(str(store)) if isinstance(store, Path) else store,
        identity,
        ledger,
        Pace(identity.shape.token_bytes, encode_seconds),
        shared=shared,
        setting="disk_path",
        **options,
    )


def block_files(folder: Path) -> list[Path]:
    """Files under the folder's blocks, leftovers of writers too."""
    return sorted(path for path in (folder / "blocks").rglob("*") if path.is_file())
