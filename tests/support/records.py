"""Records for tests: made of a number, with keys that are right."""

from __future__ import annotations

from dataclasses import replace

from prefill_worker.records.record import BlockRecord
from shared.kv.keys import KeySpace

SPACE = KeySpace(b"m" * 32, "float32", 1, b"r" * 32)


class Clock:
    """Unix seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def record(
    number: int,
    *,
    tenant: str = "",
    salt: bytes = b"",
    tags: tuple[str, ...] = (),
    expires_at: float | None = None,
    pinned: bool = False,
    space: KeySpace = SPACE,
) -> BlockRecord:
    tokens = (number, number + 1, 0xFFFF_FFFF)
    key = replace(space, tenant_salt=salt).key(tokens)
    return BlockRecord(key, tokens, tenant, salt, tags, expires_at, pinned)
