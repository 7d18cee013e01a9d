"""A tier's books against naive ones that look at every entry each time."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prefill_worker.tiers.cost import EncodeCost
from prefill_worker.tiers.ledger import Ledger
from shared.engine.served_model import ServedModel
from tests.support.tier_parts import cost, key_of

TTL = 50.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def ledger(budget: int | None = 100, ttl: float | None = None) -> tuple[Ledger, Clock]:
    clock = Clock()
    return Ledger(budget, cost, ttl_seconds=ttl, clock=clock), clock


def admit(books: Ledger, number: int, *, bytes_: int = 10, tokens: int = 1, pinned: bool = False) -> list[int] | None:
    victims = books.admit(key_of(number), tokens=tokens, bytes_=bytes_, tenant="", pinned=pinned)
    return None if victims is None else [int.from_bytes(victim.key, "big") for victim in victims]


def test_of_equal_blocks_the_least_recently_used_goes() -> None:
    books, _ = ledger(30)
    for number in (1, 2, 3):
        assert admit(books, number) == []
    books.used(key_of(1))
    assert admit(books, 4) == [2]


def test_what_is_used_often_outlives_what_is_new_and_sinks_when_it_is_used_no_more() -> None:
    books, _ = ledger(20)
    admit(books, 1)
    for _ in range(3):
        books.used(key_of(1))
    admit(books, 2)
    gone = [admit(books, number) for number in range(3, 12)]
    assert gone[0] == [2]
    assert [1] in gone


def test_what_costs_more_per_byte_outlives_what_costs_less() -> None:
    books, _ = ledger(20)
    admit(books, 1, tokens=5)
    admit(books, 2, tokens=1)
    assert admit(books, 3, tokens=1) == [2]


def test_a_budget_of_nothing_keeps_nothing_and_none_keeps_everything() -> None:
    nothing, _ = ledger(0)
    assert admit(nothing, 1) is None
    assert admit(nothing, 1, bytes_=0) is None
    everything, _ = ledger(None)
    assert all(admit(everything, number, bytes_=1 << 50) == [] for number in range(50))
    assert len(everything) == 50


def test_a_refused_block_changes_nothing() -> None:
    books, _ = ledger(30)
    admit(books, 1, pinned=True, bytes_=20)
    admit(books, 2)
    assert admit(books, 3, bytes_=11) is None
    assert admit(books, 2, bytes_=11) is None
    assert [entry.key for entry in books.entries()] == [key_of(1), key_of(2)]
    assert (books.used_bytes, books.pinned_bytes) == (30, 20)


def test_admitted_again_it_keeps_its_fame_and_its_pin() -> None:
    books, clock = ledger(30)
    admit(books, 1, pinned=True)
    books.used(key_of(1))
    clock.now += 5
    assert books.admit(key_of(1), tokens=2, bytes_=20, tenant="t", last_used=3.0, hits=0) == []
    entry = books.get(key_of(1))
    assert entry is not None
    assert (entry.hits, entry.last_used, entry.pinned, entry.bytes, entry.tenant) == (1, 1000.0, True, 20, "t")
    assert (books.used_bytes, books.pinned_bytes, len(books)) == (20, 20, 1)


def test_a_pinned_block_makes_room_for_itself() -> None:
    books, _ = ledger(30)
    admit(books, 1, pinned=True, bytes_=20)
    assert admit(books, 1, bytes_=25) == []
    assert (books.used_bytes, books.pinned_bytes) == (25, 25)


def test_a_pin_changes_once() -> None:
    books, _ = ledger()
    assert not books.pin(key_of(1), pinned=True)
    admit(books, 1)
    assert [books.pin(key_of(1), pinned=pinned) for pinned in (True, True, False, False)] == [True, False, True, False]
    assert books.pinned_bytes == 0


def test_stale_places_do_not_pile_up() -> None:
    books, _ = ledger()
    admit(books, 1)
    for _ in range(1000):
        books.used(key_of(1))
    assert len(books._resting) < 100
    books.check_integrity()


def test_the_cost_of_encoding_is_counted_from_the_model(served: ServedModel) -> None:
    cost_of = EncodeCost.of(served)
    module, shape = served.module, served.geometry.shape
    linear = sum(
        one.weight.numel() for name, one in module.named_modules() if hasattr(one, "weight") and "proj" in name
    )
    norms = sum(one.weight.numel() for name, one in module.named_modules() if hasattr(one, "weight") and "norm" in name)
    assert cost_of.linear_flops_per_token == pytest.approx(2 * (linear + norms))
    assert cost_of.attention_flops_per_token_pair == 2 * served.geometry.heads * shape.head_dim * shape.layers
    assert cost_of(10) == 10 * cost_of.linear_flops_per_token + 100 * cost_of.attention_flops_per_token_pair


@dataclass
class Naive:
    tokens: int
    bytes: int
    hits: int
    last_used: float
    pinned: bool
    rank: float
    turn: int


class LedgerAgainstNaive(RuleBasedStateMachine):
    @initialize(budget=st.sampled_from([0, 7, 20, 40, None]), ttl=st.sampled_from([None, TTL]))
    def begin(self, budget: int | None, ttl: float | None) -> None:
        self.books, self.clock = ledger(budget, ttl)
        self.ttl = ttl
        self.naive: dict[bytes, Naive] = {}
        self.age = 0.0
        self.turn = 0

    def rank(self, one: Naive) -> None:
        self.turn += 1
        one.turn = self.turn
        one.rank = self.age + (1 + one.hits) * cost(one.tokens) / max(1, one.bytes)

    @rule(
        number=st.integers(0, 7),
        bytes_=st.integers(0, 12),
        tokens=st.integers(1, 9),
        pinned=st.booleans(),
        hits=st.integers(0, 3),
        ago=st.one_of(st.none(), st.floats(0, 100)),
    )
    def admits(self, number: int, bytes_: int, tokens: int, pinned: bool, hits: int, ago: float | None) -> None:  # noqa: FBT001 - drawn
        key = key_of(number)
        used_at = None if ago is None else self.clock.now - ago
        got = self.books.admit(
            key, tokens=tokens, bytes_=bytes_, tenant="t", pinned=pinned, last_used=used_at, hits=hits
        )
        new = Naive(tokens, bytes_, hits, self.clock.now if used_at is None else used_at, pinned, 0, 0)
        others = dict(self.naive)
        if (old := others.pop(key, None)) is not None:
            new.hits, new.pinned = max(hits, old.hits), pinned or old.pinned
            new.last_used = max(new.last_used, old.last_used)
        budget = self.books.budget_bytes
        if budget is not None and (budget == 0 or bytes_ + sum(o.bytes for o in others.values() if o.pinned) > budget):
            assert got is None
            return
        victims = []
        while budget is not None and bytes_ + sum(one.bytes for one in others.values()) > budget:
            least = min((k for k in others if not others[k].pinned), key=lambda k: (others[k].rank, others[k].turn))
            self.age = others.pop(least).rank
            victims.append(least)
        self.rank(new)
        self.naive = {**others, key: new}
        assert got is not None
        assert [victim.key for victim in got] == victims

    @rule(number=st.integers(0, 7))
    def uses(self, number: int) -> None:
        self.books.used(key_of(number))
        if (one := self.naive.get(key_of(number))) is not None:
            one.hits += 1
            one.last_used = self.clock.now
            self.rank(one)

    @rule(number=st.integers(0, 7), pinned=st.booleans())
    def pins(self, number: int, pinned: bool) -> None:  # noqa: FBT001 - drawn
        one = self.naive.get(key_of(number))
        changes = one is not None and one.pinned != pinned
        assert self.books.pin(key_of(number), pinned=pinned) == changes
        if one is not None and changes:
            one.pinned = pinned
            self.rank(one)

    @rule(number=st.integers(0, 7))
    def removes(self, number: int) -> None:
        removed = self.books.remove(key_of(number))
        assert (removed is None) == (self.naive.pop(key_of(number), None) is None)

    @rule(seconds=st.floats(0, TTL))
    def waits(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.naive)
    @rule()
    def expires(self) -> None:
        gone = {entry.key for entry in self.books.expired()}
        old = {
            key
            for key, one in self.naive.items()
            if self.ttl is not None and not one.pinned and one.last_used <= self.clock.now - self.ttl
        }
        assert gone == old
        self.naive = {key: one for key, one in self.naive.items() if key not in old}

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "books"):
            return
        self.books.check_integrity()
        found = {
            e.key: Naive(e.tokens, e.bytes, e.hits, e.last_used, e.pinned, e.rank, e.turn) for e in self.books.entries()
        }
        assert found == self.naive
        assert self.books.used_bytes == sum(one.bytes for one in self.naive.values())


TestLedgerAgainstNaive = LedgerAgainstNaive.TestCase
TestLedgerAgainstNaive.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
