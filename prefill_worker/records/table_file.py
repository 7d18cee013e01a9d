"""The SQLite file behind the table: opened, given its schema, and set aside when it is damaged.

    meta         name → value: schema version, key space
    records      one row a record, found by key
    record_tags  (tag, record): the search index of records.tags, written with them
    tally        how many records there are, kept by triggers

One connection, used by one thread. The connection holds the file alone: two processes never share a table.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shared import logs

T = TypeVar("T")

SCHEMA_VERSION = 1

_BUSY_S = 5.0
_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
# A commit is in the file's log before it is confirmed, so that the process may be killed at any moment. What the
# machine's own loss may take are the newest commits, whole; never the file.
_SETTINGS = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA foreign_keys = ON;
PRAGMA temp_store = MEMORY;
"""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (
    id INTEGER PRIMARY KEY,
    key BLOB NOT NULL UNIQUE,
    token_ids BLOB NOT NULL,   -- uint32, little-endian
    tenant TEXT NOT NULL,
    tenant_salt BLOB NOT NULL,
    tags TEXT NOT NULL,        -- JSON list
    expires_at REAL,           -- Unix seconds
    pinned INTEGER NOT NULL,
    mirrored INTEGER NOT NULL  -- the mirror holds this very content
);
CREATE INDEX IF NOT EXISTS records_by_tenant ON records (tenant, key);
CREATE INDEX IF NOT EXISTS records_by_end ON records (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS records_pinned ON records (key) WHERE pinned;
CREATE INDEX IF NOT EXISTS records_unmirrored ON records (key) WHERE NOT mirrored;
CREATE TABLE IF NOT EXISTS record_tags (
    tag TEXT NOT NULL,
    record INTEGER NOT NULL REFERENCES records (id) ON DELETE CASCADE,
    PRIMARY KEY (tag, record)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS record_tags_by_record ON record_tags (record);
CREATE TABLE IF NOT EXISTS tally (only INTEGER PRIMARY KEY CHECK (only = 0), records INTEGER NOT NULL);
INSERT OR IGNORE INTO tally VALUES (0, 0);
CREATE TRIGGER IF NOT EXISTS record_in AFTER INSERT ON records BEGIN UPDATE tally SET records = records + 1; END;
CREATE TRIGGER IF NOT EXISTS record_out AFTER DELETE ON records BEGIN UPDATE tally SET records = records - 1; END;
CREATE TEMP TABLE wanted_tags (tag TEXT PRIMARY KEY) WITHOUT ROWID;
"""


class _OtherTableError(sqlite3.DatabaseError):
    """The file is sound and holds something else."""


class TableFile:
    """Owns the connection and the file.

    Args:
        path: The file; its folder is made. None: memory.
        space: Name of the key space whose records it holds.
        damaged: Called for each file that is set aside.

    Attributes:
        busy_s: Longest wait for another process that still holds the file.
    """

    def __init__(self, path: Path | None, space: str, damaged: Callable[[], None]) -> None:
        self._path = path
        self._space = space
        self._damaged = damaged
        self.busy_s = _BUSY_S
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Opens the file or begins one.

        Raises:
            OSError: The folder cannot be made, or a damaged file not be moved.
            sqlite3.Error: The file cannot be opened, or another process holds it.
        """
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connect()
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                self.close()
                raise
            self._begin_afresh(error)

    def close(self) -> None:
        """Closes the file; what was committed stays."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Does work wholly or not at all; on a damaged file once more, on a fresh one.

        Raises:
            sqlite3.Error: The file could not be read or written; nothing was changed.
        """
        try:
            return self._transacted(work)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            self._begin_afresh(error)
        return self._transacted(work)

    def _transacted(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._connection is None:
            raise sqlite3.ProgrammingError("the table is not open")
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            done = work(connection)
            connection.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back by itself after some errors (disk full, damage).
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return done

    def _connect(self) -> None:
        target = ":memory:" if self._path is None else str(self._path)
        # Transactions are begun and ended above, never by the driver.
        self._connection = sqlite3.connect(target, timeout=self.busy_s, isolation_level=None)
        self._connection.executescript(_SETTINGS)
        self._connection.executescript(_SCHEMA)
        told = {"schema": str(SCHEMA_VERSION), "space": self._space}
        self._connection.executemany("INSERT OR IGNORE INTO meta VALUES (?, ?)", told.items())
        found = dict(self._connection.execute("SELECT name, value FROM meta"))
        if found != told:
            raise _OtherTableError(f"the table says {found}, and {told} was expected")

    def _begin_afresh(self, error: sqlite3.DatabaseError) -> None:
        """Moves the file aside, where one such file is kept for whoever wants to look, and begins an empty one."""
        self.close()
        self._damaged()
        if self._path is not None:
            logs.get("records").error("record_table_set_aside", path=str(self._path), error=str(error))
            # The log first: a fresh file must never meet the log of the old one.
            for suffix in ("-wal", "-shm", ""):
                part = self._path.with_name(self._path.name + suffix)
                if part.exists():
                    part.replace(part.with_name(f"{self._path.name}.damaged{suffix}"))
        self._connect()


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    # Extended codes have the plain one in their low byte; errors of the driver itself have none.
    return isinstance(error, _OtherTableError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE
