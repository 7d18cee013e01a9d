"""A record as a row of the table.

key | token_ids: uint32, little-endian | tenant | tenant_salt | tags: JSON list | expires_at | pinned
"""

from __future__ import annotations

import json
import struct
from typing import Any

from prefill_worker.records.record import BlockRecord

COLUMNS = "key, token_ids, tenant, tenant_salt, tags, expires_at, pinned"

Row = tuple[Any, ...]


def to_row(record: BlockRecord) -> Row:
    """Values of `COLUMNS`."""
    ids = struct.pack(f"<{len(record.token_ids)}I", *record.token_ids)
    tags = json.dumps(record.tags)
    return record.key, ids, record.tenant, record.tenant_salt, tags, record.expires_at, record.pinned


def from_row(row: Row) -> BlockRecord:
    """The record in values of `COLUMNS`.

    Raises:
        ValueError: The row is damaged. A row that reads well may still be: its key tells.
    """
    key, ids, tenant, salt, tags, ends, pinned = row
    if not isinstance(ids, bytes) or len(ids) % 4:
        raise ValueError("token ids are cut")
    token_ids = struct.unpack(f"<{len(ids) // 4}I", ids)
    return BlockRecord(key, token_ids, tenant, salt, tuple(json.loads(tags)), ends, bool(pinned))
