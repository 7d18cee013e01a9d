"""Memory: a budget that holds, the first of equal keys stays, what goes is handed on."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from prefill_worker.tiers.block import StoredBlock
from prefill_worker.tiers.ledger import Ledger
from prefill_worker.tiers.ram import RamTier
from tests.support.tier_parts import SIZE, cost, key_of, tiny_block


def tier(blocks: int, gone: list[StoredBlock] | None = None, ttl: float | None = None) -> RamTier:
    made = RamTier(Ledger(blocks * SIZE, cost, ttl_seconds=ttl))
    if gone is not None:
        made.on_evicted = gone.append
    return made


def test_evicted_blocks_are_handed_on() -> None:
    gone: list[StoredBlock] = []
    ram = tier(2, gone)
    blocks = [tiny_block(number) for number in range(3)]
    assert all(ram.put_now(block, pinned=False) for block in blocks)
    assert gone == [blocks[0]]
    assert ram.peek(key_of(0)) is None
    assert (ram.meter.evictions, ram.meter.written_bytes) == (1, 3 * SIZE)


def test_pinned_blocks_stay_and_what_does_not_fit_is_refused() -> None:
    ram = tier(2)
    assert ram.put_now(tiny_block(1), pinned=True)
    assert ram.put_now(tiny_block(2), pinned=False)
    assert not ram.put_now(tiny_block(3, tokens=3), pinned=False)
    assert ram.put_now(tiny_block(4), pinned=False)
    assert [ram.peek(key_of(number)) is not None for number in (1, 2, 3, 4)] == [True, False, False, True]


def test_the_first_birth_of_a_key_stays() -> None:
    ram = tier(2)
    first = tiny_block(1)
    ram.put_now(first, pinned=False)
    assert ram.put_now(tiny_block(1), pinned=False)
    assert ram.peek(key_of(1)) is first
    assert ram.delete_now(key_of(1)) == SIZE
    assert ram.delete_now(key_of(1)) == 0


def test_uses_are_counted_and_looks_are_not() -> None:
    ram = tier(2)
    ram.put_now(tiny_block(1), pinned=False)
    assert ram.get_now(key_of(1)) is ram.peek(key_of(1))
    assert ram.get_now(key_of(2)) is None
    entry = ram.ledger.get(key_of(1))
    assert entry is not None
    assert (entry.hits, ram.meter.hits, ram.meter.misses, ram.meter.read_bytes) == (1, 1, 1, SIZE)


@pytest.mark.parametrize("pinned", [True, False])
async def test_what_nobody_uses_expires(*, pinned: bool) -> None:
    ram = tier(2, ttl=0)
    await ram.write(tiny_block(1), pinned=pinned)
    await ram.sweep()
    assert await ram.holds(key_of(1)) == pinned
    assert ram.meter.expirations == (not pinned)
    assert (await ram.read(key_of(1)) is not None) == pinned
    assert await ram.delete(key_of(1)) == pinned * SIZE
    await ram.close()
    assert ram.ledger.used_bytes == 0


@given(st.lists(st.tuples(st.sampled_from("pgd"), st.integers(0, 6), st.integers(1, 4)), max_size=30))
def test_books_and_blocks_agree(steps: list[tuple[str, int, int]]) -> None:
    ram = tier(4)
    for step, number, tokens in steps:
        match step:
            case "p":
                ram.put_now(tiny_block(number, tokens), pinned=number == 0)
            case "g":
                ram.get_now(key_of(number))
            case _:
                ram.delete_now(key_of(number))
        ram.ledger.check_integrity()
        assert {entry.key: entry.bytes for entry in ram.ledger.entries()} == {
            key: block.bytes for key, block in ram._blocks.items()
        }
