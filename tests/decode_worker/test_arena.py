"""The arena as a state machine: extents never overlap, free and held tile it exactly."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from decode_worker.arena import Arena, Extent
from shared.kv.layout import KvShape
from tests.support.decode_parts import SHAPE, make_arena

CAPACITY_TOKENS = 40


class ArenaMachine(RuleBasedStateMachine):
    """Allocates and frees; every extent is filled with its own number and must keep it."""

    extents = Bundle("extents")

    def __init__(self) -> None:
        super().__init__()
        self.arena = make_arena(CAPACITY_TOKENS)
        self.held: dict[Extent, float] = {}
        self.marks = 0.0

    @rule(target=extents, tokens=st.integers(1, CAPACITY_TOKENS + 3), high=st.booleans())
    def allocate(self, tokens: int, *, high: bool = False) -> object:
        extent = self.arena.allocate(tokens, high=high)
        if extent is None:
            assert self.arena.longest_free_records == self.longest_free_run() < SHAPE.extent_records(tokens)
            return multiple()
        assert (extent.tokens, extent.records) == (tokens, SHAPE.extent_records(tokens))
        self.marks += 1
        self.arena.view(extent).fill_(self.marks)
        self.held[extent] = self.marks
        return extent

    @rule(extent=consumes(extents))
    def free(self, extent: Extent) -> None:
        self.arena.free(extent)
        del self.held[extent]
        before = self.arena.free_records
        with pytest.raises(ValueError, match="not handed out"):
            self.arena.free(extent)
        assert self.arena.free_records == before

    @rule(target=extents, extent=consumes(extents))
    def free_and_take_again(self, extent: Extent) -> object:
        self.free(extent)
        return self.allocate(extent.tokens)

    @rule(target=extents, tokens=st.integers(1, CAPACITY_TOKENS + 3))
    def make_room(self, tokens: int) -> object:
        fits = SHAPE.extent_records(tokens) <= self.arena.free_records
        assert self.arena.make_room(tokens) == fits
        assert (self.arena.longest_free_records >= SHAPE.extent_records(tokens)) == fits
        return self.allocate(tokens)

    @invariant()
    def tiles(self) -> None:
        self.arena.check_integrity(list(self.held))
        used = sum(extent.records for extent in self.held)
        assert self.arena.free_records + used == self.arena.capacity_records
        assert self.arena.used_bytes == used * SHAPE.record_bytes

    @invariant()
    def nobody_writes_into_another(self) -> None:
        for extent, mark in self.held.items():
            assert bool((self.arena.view(extent) == mark).all())

    def longest_free_run(self) -> int:
        taken = torch.zeros(self.arena.capacity_records, dtype=torch.bool)
        for extent in self.held:
            assert not bool(taken[extent.start : extent.start + extent.records].any())
            taken[extent.start : extent.start + extent.records] = True
        longest = run = 0
        for used in taken.tolist():
            run = 0 if used else run + 1
            longest = max(longest, run)
        return longest


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=40, stateful_step_count=30)


def test_views_share_the_memory_in_the_one_layout() -> None:
    arena = make_arena(8)
    arena.allocate(2)
    extent = arena.allocate(3)
    assert extent is not None
    view = arena.view(extent)
    assert view.shape == (SHAPE.layers, 3, 2, SHAPE.kv_heads, SHAPE.head_dim)
    assert view.is_contiguous()
    view[1, 2, 1, 0, 3] = 5.0
    element = ((1 * 3 + 2) * 2 + 1) * SHAPE.kv_heads * SHAPE.head_dim + 3
    raw = arena.bytes_of(extent)
    assert raw.numel() == SHAPE.extent_bytes(3)
    assert raw.view(torch.float32)[element] == 5.0
    assert view[..., 0, :, :].stride() == view[..., 1, :, :].stride()


def test_capacity_is_rounded_down_to_records() -> None:
    arena = Arena(SHAPE, SHAPE.record_bytes * 5 + 1, torch.device("cpu"))
    assert arena.capacity_records == 5
    assert arena.capacity_bytes == SHAPE.record_bytes * 5
    nothing = Arena(SHAPE, 0, torch.device("cpu"))
    assert nothing.allocate(1) is None
    nothing.check_integrity([])


def test_integrity_names_what_does_not_tile() -> None:
    arena = make_arena(8)
    extent = arena.allocate(2)
    assert extent is not None
    with pytest.raises(AssertionError, match="1 extents are handed out, and 0 are held"):
        arena.check_integrity([])
    with pytest.raises(AssertionError, match="and 2 are held"):
        arena.check_integrity([extent, extent])
    extent.start += 1
    with pytest.raises(AssertionError, match="does not tile"):
        arena.check_integrity([extent])


def test_what_fits_by_bytes_gets_a_run_with_nine_tenths_of_the_arena_held_in_random_sizes() -> None:
    draw = random.Random(7)
    arena = make_arena(4000)
    held = {}
    while (extent := arena.allocate(draw.randint(1, 120), high=draw.random() < 0.3)) is not None:
        held[extent] = float(len(held) + 1)
        arena.view(extent).fill_(held[extent])
    while arena.free_records < 0.1 * arena.capacity_records:
        extent = draw.choice(list(held))
        arena.free(extent)
        del held[extent]
    tokens = arena.free_records // SHAPE.layers
    assert arena.longest_free_records < arena.free_records
    assert arena.allocate(tokens) is None
    assert arena.make_room(tokens)
    big = arena.allocate(tokens)
    assert big is not None
    arena.check_integrity([*held, big])
    assert all(bool((arena.view(extent) == mark).all()) for extent, mark in held.items())
    assert not arena.make_room(tokens)


def test_moving_closes_up_the_stretch_with_the_fewest_records() -> None:
    arena = make_arena(40)
    held = [arena.allocate(tokens) for tokens in (2, 20, 2, 4, 2, 10)]
    for index in (0, 2, 4):
        extent = held[index]
        assert extent is not None
        arena.free(extent)
    assert arena.make_room(4)
    assert arena.moved_bytes == SHAPE.extent_bytes(4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_type_has_its_own_size(dtype: str) -> None:
    shape = KvShape(layers=2, kv_heads=1, head_dim=8, dtype=dtype)
    arena = make_arena(4, shape)
    extent = arena.allocate(4)
    assert extent is not None
    assert arena.records.dtype == getattr(torch, dtype)
    assert arena.bytes_of(extent).numel() == shape.extent_bytes(4) == arena.capacity_bytes
