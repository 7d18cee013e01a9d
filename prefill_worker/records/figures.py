"""What happened to records, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RecordFigures:
    """Counters of one worker's records; they only grow.

    Attributes:
        kept: Records that were new or changed.
        taken_in: Records read from the mirror into the table.
        not_taken_in: Records read from the mirror for which the table had no room.
        deleted: Records removed by name.
        expired: Records removed because their time was up.
        not_expired: Blocks whose KV could not be removed when their records' time was up; tried again.
        damaged_rows: Rows whose tokens did not make their key; dropped.
        damaged_tables: Table files that could not be read; set aside.
        table_failures: Calls that the table could not answer.
        damaged_objects: Objects of the mirror that did not hold what was written.
        mirror_writes: Objects written.
        mirror_failures: Operations of the mirror that failed or took too long.
        mirror_skips: Batches not tried, because the mirror had failed a moment before.
    """

    kept: int = 0
    taken_in: int = 0
    not_taken_in: int = 0
    deleted: int = 0
    expired: int = 0
    not_expired: int = 0
    damaged_rows: int = 0
    damaged_tables: int = 0
    table_failures: int = 0
    damaged_objects: int = 0
    mirror_writes: int = 0
    mirror_failures: int = 0
    mirror_skips: int = 0
