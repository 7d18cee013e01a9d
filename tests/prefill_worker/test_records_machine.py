"""Records against a plain dict, under any order of changes, restarts, lost tables and passing time."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from obstore.store import LocalStore

from prefill_worker.records.mirror import Mirror
from prefill_worker.records.record import BlockRecord
from prefill_worker.records.records import Records
from tests.support.records import SPACE, Clock, record

T = TypeVar("T")

NUMBERS = st.integers(0, 11)
TENANTS = st.sampled_from(["", "a", "b"])
SALTS = {"": b"", "a": b"", "b": b"salt of b"}
TAGS = st.lists(st.sampled_from(["x", "y", "z", "", "x\0", "ü"]), max_size=3)
LIVES = st.one_of(st.none(), st.integers(-5, 50))
NAMES = st.lists(st.tuples(NUMBERS, TENANTS), max_size=5)


def made(number: int, tenant: str, tags: list[str], life: int | None, now: float, *, pinned: bool) -> BlockRecord:
    ends = None if life is None else now + life
    return record(number, tenant=tenant, salt=SALTS[tenant], tags=tuple(tags), expires_at=ends, pinned=pinned)


def keys_of(names: list[tuple[int, str]]) -> list[bytes]:
    return [record(number, salt=SALTS[tenant]).key for number, tenant in names]


class RecordsMachine(RuleBasedStateMachine):
    """One worker with a table and a mirror; `model` holds what was kept, as it was said to be."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        self.clock = Clock()
        self.model: dict[bytes, BlockRecord] = {}
        self.records = self.opened()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def opened(self) -> Records:
        mirror = Mirror(LocalStore(self.folder / "shared", mkdir=True), SPACE)
        records = Records(self.folder / "own", mirror, key_space=SPACE, clock=self.clock)
        self.run(records.open())
        return records

    def live(self) -> dict[bytes, BlockRecord]:
        now = self.clock.now
        return {key: one for key, one in self.model.items() if one.expires_at is None or one.expires_at > now}

    @rule(items=st.lists(st.tuples(NUMBERS, TENANTS, TAGS, LIVES, st.booleans()), max_size=4))
    def keep(self, items: list[tuple[int, str, list[str], int | None, bool]]) -> None:
        records = [made(*item[:4], self.clock.now, pinned=item[4]) for item in items]
        before, after = self.live(), dict(self.live())
        for one in records:
            if one.expires_at is not None and one.expires_at <= self.clock.now:
                continue
            old = after.get(one.key, one)
            ends = None if None in {old.expires_at, one.expires_at} else max(old.expires_at, one.expires_at)  # type: ignore[type-var]
            tags = tuple(sorted({*old.tags, *one.tags}))
            after[one.key] = replace(old, tags=tags, expires_at=ends, pinned=old.pinned or one.pinned)
        changed = self.run(self.records.keep(records))
        assert changed == sum(before.get(key) != one for key, one in after.items())
        self.model = after

    @rule(names=NAMES)
    def get(self, names: list[tuple[int, str]]) -> None:
        keys = keys_of(names)
        assert self.run(self.records.get(keys)) == {key: self.live()[key] for key in keys if key in self.live()}

    @rule(names=NAMES, pinned=st.booleans())
    def set_pinned(self, names: list[tuple[int, str]], *, pinned: bool) -> None:
        live = self.live()
        wanted = {key for key in keys_of(names) if key in live and live[key].pinned != pinned}
        changed = self.run(self.records.set_pinned(keys_of(names), pinned=pinned))
        assert sorted(changed) == sorted(wanted)
        self.model |= {key: replace(live[key], pinned=pinned) for key in wanted}

    @rule(names=NAMES)
    def delete(self, names: list[tuple[int, str]]) -> None:
        keys = list(dict.fromkeys(keys_of(names)))
        assert self.run(self.records.delete(keys)) == [key for key in keys if key in self.live()]
        for key in keys:
            self.model.pop(key, None)

    @rule(seconds=st.integers(1, 30))
    def time_passes(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def expire(self) -> None:
        gone = self.run(self.records.expire())
        assert not set(gone) & set(self.live())
        assert len(self.records) == len(self.live())

    @rule()
    def restart(self) -> None:
        self.run(self.records.close())
        self.records = self.opened()

    @rule()
    def lose_the_table(self) -> None:
        self.run(self.records.close())
        shutil.rmtree(self.folder / "own")
        self.records = self.opened()
        self.run(self.records.refresh())
        assert len(self.records) == len(self.live())

    @rule(
        names=NAMES,
        prefix=st.integers(0, 3),
        tags=TAGS,
        tenant=st.one_of(st.none(), TENANTS),
        limit=st.integers(1, 4),
    )
    def select(
        self, names: list[tuple[int, str]], prefix: int, tags: list[str], tenant: str | None, limit: int
    ) -> None:
        keys = keys_of(names)
        start = keys[0].hex()[:prefix] if keys else ""
        expected = [
            one
            for key, one in sorted(self.live().items())
            if key.hex().startswith(start) and (not tags or set(tags) & set(one.tags)) and tenant in {None, one.tenant}
        ]
        found: list[BlockRecord] = []
        while page := self.run(
            self.records.select(
                key_prefix=start,
                tags=tags,
                tenant=tenant,
                after_key=found[-1].key if found else b"",
                limit=limit,
            )
        ):
            assert len(page) <= limit
            found += page
        assert found == expected

    @invariant()
    def everything_agrees(self) -> None:
        live = sorted(self.live().items())
        assert self.run(self.records.select()) == [one for _, one in live]
        assert self.run(self.records.pinned_keys()) == [key for key, one in live if one.pinned]
        figures = self.records.figures
        assert (figures.damaged_rows, figures.damaged_tables, figures.damaged_objects) == (0, 0, 0)
        assert (figures.mirror_failures, figures.table_failures) == (0, 0)

    def teardown(self) -> None:
        self.run(self.records.close())
        self.runner.close()
        shutil.rmtree(self.folder)


TestRecordsMachine = RecordsMachine.TestCase
TestRecordsMachine.settings = settings(max_examples=20, stateful_step_count=25)
