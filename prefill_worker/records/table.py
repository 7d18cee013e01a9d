"""Records on this machine, in an SQLite file. Every call blocks, and all are made by one thread.

Invariant: what a call confirmed is in the file, and a call that raises has changed nothing. A row is believed only
when its tokens make its key; another is dropped and counted.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

from prefill_worker.records.figures import RecordFigures
from prefill_worker.records.record import BlockRecord, space_name
from prefill_worker.records.rows import COLUMNS, Row, from_row, to_row
from prefill_worker.records.selection import Selection
from prefill_worker.records.table_file import TableFile
from shared import logs
from shared.errors import DrystoneError, Reason
from shared.kv.keys import KeySpace

T = TypeVar("T")

# Of a record among those that end: when it does, and its number.
Place: TypeAlias = tuple[float, int]
FIRST_PLACE: Place = (-math.inf, 0)

_LIVE = "(expires_at IS NULL OR expires_at > :now)"
# Nothing but names of columns and our own conditions is ever put into a statement; values are bound.
_SELECT = f"SELECT {COLUMNS} FROM records WHERE "  # noqa: S608
_FIND = f"{_SELECT} key = :key AND {_LIVE}"
_PUT = (
    f"INSERT INTO records ({COLUMNS}, mirrored) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "  # noqa: S608
    "ON CONFLICT (key) DO UPDATE SET token_ids = excluded.token_ids, tenant = excluded.tenant, "
    "tenant_salt = excluded.tenant_salt, tags = excluded.tags, expires_at = excluded.expires_at, "
    "pinned = excluded.pinned, mirrored = excluded.mirrored RETURNING id"
)


class Table:
    """Owns the records that this worker keeps.

    Args:
        folder: Where the file lies. None: memory.
        space: Everything but salt and tokens that keys are made with; each space has a file of its own.
        max_records: Most records whose time is not up.
        figures: Counters to write to.
    """

    def __init__(self, folder: Path | None, space: KeySpace, max_records: int, figures: RecordFigures) -> None:
        name = space_name(space)
        path = None if folder is None else folder / f"records-{name}.sqlite"
        self._file = TableFile(path, name, self._damaged)
        self._space = space
        self._max_records = max_records
        self._figures = figures
        self._count = 0

    def open(self) -> None:
        """Opens the file; see `TableFile.open`."""
        self._file.open()
        self._transact(lambda _: None)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @property
    def count(self) -> int:
        """Records in the file, those included whose time is up and which `expire` has not removed yet."""
        return self._count

    def keep(self, records: Sequence[BlockRecord], now: float, *, mirrored: bool) -> list[BlockRecord]:
        """Unites records with those that are there; the ones that changed, as they are now.

        Args:
            records: Records of this key space; those of the same key are united in turn.
            now: Unix seconds.
            mirrored: The mirror holds these very records.

        Raises:
            DrystoneError: RECORDS_FULL; none was kept.
        """

        def work(connection: sqlite3.Connection) -> list[BlockRecord]:
            changed: dict[bytes, BlockRecord] = {}
            before = _live_count(connection, now)
            for record in records:
                there = self._found(connection, record.key, now)
                wanted = record.settled() if there is None else there.united(record)
                if wanted != there:
                    _put(connection, wanted, mirrored=mirrored)
                    changed[wanted.key] = wanted
            # A bound that was lowered since leaves what there is as it is.
            if _live_count(connection, now) > max(before, self._max_records):
                raise DrystoneError(
                    Reason.RECORDS_FULL,
                    f"{self._max_records} records of blocks are kept, and no more may be; delete some",
                    metadata={"limit": str(self._max_records)},
                )
            return list(changed.values())

        return self._transact(work)

    def get(self, keys: Iterable[bytes], now: float) -> dict[bytes, BlockRecord]:
        """Records by key; those that are not here or have ended are left out."""

        def work(connection: sqlite3.Connection) -> dict[bytes, BlockRecord]:
            found = ((key, self._found(connection, key, now)) for key in keys)
            return {key: record for key, record in found if record is not None}

        return self._transact(work)

    def lacks(self, keys: Iterable[bytes], now: float) -> list[bytes]:
        """Those of some keys that `get` would leave out; their tokens are not read."""

        def work(connection: sqlite3.Connection) -> list[bytes]:
            query = f"SELECT 1 FROM records WHERE key = :key AND {_LIVE}"  # noqa: S608 - see _SELECT
            return [key for key in keys if connection.execute(query, {"key": key, "now": now}).fetchone() is None]

        return self._transact(work)

    def select(self, selection: Selection, now: float) -> list[BlockRecord]:
        """Records that match, in the order of their keys."""
        low, high = selection.key_range
        conditions = [_LIVE, "key BETWEEN :low AND :high", "key > :after"]
        if selection.tags:
            conditions.append(
                "id IN (SELECT record FROM record_tags WHERE tag IN (SELECT tag FROM wanted_tags))",
            )
        if selection.tenant is not None:
            conditions.append("tenant = :tenant")
        query = _SELECT + " AND ".join(conditions) + " ORDER BY key LIMIT :limit"
        bound = {
            "now": now,
            "low": low,
            "high": high,
            "after": selection.after_key,
            "tenant": selection.tenant,
            "limit": selection.limit or -1,
        }

        def work(connection: sqlite3.Connection) -> list[BlockRecord]:
            connection.execute("DELETE FROM wanted_tags")
            connection.executemany("INSERT OR IGNORE INTO wanted_tags VALUES (?)", ((tag,) for tag in selection.tags))
            return self._sound(connection, connection.execute(query, bound).fetchall())

        return self._transact(work)

    def set_pinned(self, keys: Iterable[bytes], now: float, *, pinned: bool) -> list[BlockRecord]:
        """Pins or unpins records; the ones that changed, as they are now. The mirror does not know of it yet."""
        query = (
            "UPDATE records SET pinned = :pinned, mirrored = 0 "  # noqa: S608 - see _SELECT
            f"WHERE key = :key AND pinned <> :pinned AND {_LIVE} RETURNING {COLUMNS}"
        )

        def work(connection: sqlite3.Connection) -> list[BlockRecord]:
            bound = ({"key": key, "now": now, "pinned": pinned} for key in keys)
            return self._sound(connection, [row for one in bound for row in connection.execute(query, one).fetchall()])

        return self._transact(work)

    def pinned_keys(self, now: float) -> list[bytes]:
        """Keys of pinned records, in their order."""
        query = f"SELECT key FROM records WHERE pinned AND {_LIVE} ORDER BY key"  # noqa: S608 - see _SELECT
        return self._transact(lambda connection: [row[0] for row in connection.execute(query, {"now": now})])

    def delete(self, keys: Iterable[bytes]) -> int:
        """Removes records; how many there were, whether or not their time was up."""

        def work(connection: sqlite3.Connection) -> int:
            return sum(connection.execute("DELETE FROM records WHERE key = ?", (key,)).rowcount for key in keys)

        return self._transact(work)

    def ended(self, now: float, after: Place, limit: int) -> list[tuple[bytes, Place]]:
        """Keys of records whose time is up, at most `limit`, each with its place in the order of their ends.

        Args:
            now: Unix seconds.
            after: Only records after this place.
            limit: Most keys.
        """
        query = (
            "SELECT key, expires_at, id FROM records WHERE expires_at <= :now AND (expires_at, id) > (:ends, :id) "
            "ORDER BY expires_at, id LIMIT :limit"
        )
        bound = {"now": now, "ends": after[0], "id": after[1], "limit": limit}
        return self._transact(
            lambda connection: [(row[0], (row[1], row[2])) for row in connection.execute(query, bound)]
        )

    def drop_ended(self, keys: Iterable[bytes], now: float) -> list[bytes]:
        """Removes those of some records whose time is up; their keys."""
        query = "DELETE FROM records WHERE key = ? AND expires_at <= ?"

        def work(connection: sqlite3.Connection) -> list[bytes]:
            return [key for key in keys if connection.execute(query, (key, now)).rowcount]

        return self._transact(work)

    def unmirrored(self, after_key: bytes, limit: int, now: float) -> list[bytes]:
        """Keys of records that the mirror lacks, in their order after one."""
        query = (
            "SELECT key FROM records WHERE NOT mirrored AND key > :after "  # noqa: S608 - see _SELECT
            f"AND {_LIVE} ORDER BY key LIMIT :limit"
        )
        bound = {"after": after_key, "limit": limit, "now": now}
        return self._transact(lambda connection: [row[0] for row in connection.execute(query, bound)])

    def mark(self, keys: Iterable[bytes], *, mirrored: bool) -> None:
        """Remembers whether the mirror holds records as they are now."""
        query = "UPDATE records SET mirrored = ? WHERE key = ?"
        self._transact(lambda connection: connection.executemany(query, [(mirrored, key) for key in keys]))

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        done, self._count = self._file.transact(lambda connection: (work(connection), _count(connection)))
        return done

    def _found(self, connection: sqlite3.Connection, key: bytes, now: float) -> BlockRecord | None:
        rows = connection.execute(_FIND, {"key": key, "now": now}).fetchall()
        return next(iter(self._sound(connection, rows)), None)

    def _sound(self, connection: sqlite3.Connection, rows: Iterable[Row]) -> list[BlockRecord]:
        """The records in rows; damaged rows are removed."""
        sound = []
        for row in rows:
            try:
                record = from_row(row)
                if not record.belongs(self._space):
                    raise ValueError("the key is not of the tokens")  # noqa: TRY301 - both kinds of damage end alike
            except (TypeError, ValueError) as error:
                self._figures.damaged_rows += 1
                logs.get("records").error("record_row_damaged", key=repr(row[0]), error=str(error))
                connection.execute("DELETE FROM records WHERE key = ?", (row[0],))
            else:
                sound.append(record)
        return sound

    def _damaged(self) -> None:
        self._figures.damaged_tables += 1


def _put(connection: sqlite3.Connection, record: BlockRecord, *, mirrored: bool) -> None:
    ((number,),) = connection.execute(_PUT, (*to_row(record), mirrored)).fetchall()
    connection.execute("DELETE FROM record_tags WHERE record = ?", (number,))
    connection.executemany("INSERT INTO record_tags VALUES (?, ?)", [(tag, number) for tag in record.tags])


def _count(connection: sqlite3.Connection) -> int:
    ((count,),) = connection.execute("SELECT records FROM tally").fetchall()
    return int(count)


def _live_count(connection: sqlite3.Connection, now: float) -> int:
    query = "SELECT count(*) FROM records WHERE expires_at <= ?"
    ((ended,),) = connection.execute(query, (now,)).fetchall()
    return _count(connection) - int(ended)
