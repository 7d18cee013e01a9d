"""The arena as a state machine: extents never overlap, free and held tile it exactly."""

from __future__ import annotations

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

    @rule(target=extents, tokens=st.integers(1, CAPACITY_TOKENS + 3))
    def allocate(self, tokens: int) -> object:
        extent = self.arena.allocate(tokens)
        if extent is None:
            assert self.longest_free_run() < SHAPE.extent_records(tokens)
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
        with pytest.raises(ValueError, match="already free"):
            self.arena.free(extent)
        assert self.arena.free_records == before

    @rule(target=extents, extent=consumes(extents))
    def free_and_take_again(self, extent: Extent) -> object:
        self.free(extent)
        return self.allocate(extent.tokens)

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
    with pytest.raises(AssertionError, match="does not tile"):
        arena.check_integrity([])
    with pytest.raises(AssertionError, match="does not tile"):
        arena.check_integrity([extent, extent])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_type_has_its_own_size(dtype: str) -> None:
    shape = KvShape(layers=2, kv_heads=1, head_dim=8, dtype=dtype)
    arena = make_arena(4, shape)
    extent = arena.allocate(4)
    assert extent is not None
    assert arena.records.dtype == getattr(torch, dtype)
    assert arena.bytes_of(extent).numel() == shape.extent_bytes(4) == arena.capacity_bytes
