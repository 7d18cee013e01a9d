"""The segment kernel against dense float64 attention: sharing, splits, causality, windows, rotations, dtypes."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import decode_worker.attention
from decode_worker.attention.triton_cut import StepTooLargeError, Tiling, choose_tiling
from decode_worker.attention.triton_plan import Counts
from decode_worker.attention.triton_segments import (
    TritonSegmentAttention,
    TritonUnavailableError,
    load_kernels,
)
from shared.engine.rotation import RotationKind
from tests.kernels.scenes import NONE, Ask, Heads, Scene, assert_near, dense, rotation

SHARED = [Ask([0, 1, 2], filled=5), Ask([2, 0], filled=0, rows=3), Ask([1], filled=20)]
LENGTHS = [37, 1, 22]


@pytest.mark.parametrize(("kv_heads", "group"), [(2, 1), (1, 3), (2, 4), (1, 8), (3, 1), (1, 20)])
def test_head_groups(device: torch.device, kv_heads: int, group: int) -> None:
    Scene(SHARED, LENGTHS, Heads(kv_heads, group), device=device).check()


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 128), (24, 24), (80, 32), (16, 4)])
@pytest.mark.parametrize("kind", [RotationKind.HALF, RotationKind.INTERLEAVED])
def test_head_sizes_and_partial_rotation(
    device: torch.device, head_dim: int, rotary_dim: int, kind: RotationKind
) -> None:
    Scene(SHARED[:2], LENGTHS, Heads(1, 2, head_dim), rotation(kind, rotary_dim), device=device).check()


@pytest.mark.parametrize("kind", list(RotationKind))
def test_rotation_kinds_at_long_offsets(device: torch.device, kind: RotationKind) -> None:
    Scene(SHARED, LENGTHS, turn=rotation(kind), start=100_003, device=device).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 30])
def test_half_precision_storage(device: torch.device, dtype: torch.dtype, window: int | None) -> None:
    Scene(SHARED, LENGTHS, Heads(2, 2, 32), rotation(rotary_dim=32), dtype, start=777, device=device).check(
        window=window
    )


def test_a_block_laid_twice_in_one_prompt(device: torch.device) -> None:
    Scene([Ask([0, 1, 0], filled=3, rows=2), Ask([1, 1], rows=1)], [30, 9], device=device).check()


@pytest.mark.parametrize("join", [True, False])
def test_a_long_block_is_split(device: torch.device, *, join: bool) -> None:
    scene = Scene([Ask([0], filled=2), Ask([1, 0], filled=1)], [300, 8], device=device)
    attention = scene.attention(200)
    step = attention.prepare(scene.pieces, scene.positions, tiling=Tiling(16, 16, 24, min_keys=16, join=join))
    assert step.counts.items >= 10
    for layer in range(2):
        assert_near(attention.attend(step, layer, scene.q, scene.scale, None), scene.expected(layer), scene.dtype)


@pytest.mark.parametrize("window", [None, 25, 130])
def test_blocks_of_the_same_rows_leave_few_partials(device: torch.device, window: int | None) -> None:
    """One request's 20 short blocks are read by three items, each turned again for every block."""
    lengths = [3 + 5 * (index % 4) for index in range(20)]
    scene = Scene([Ask(range(20), filled=3, rows=3), Ask([4], filled=3)], lengths, start=31, device=device)
    attention = scene.attention(60)
    step = attention.prepare(scene.pieces, scene.positions, tiling=Tiling(16, 16, 6, min_keys=16))
    assert step.counts.runs >= 20 + 2
    assert step.counts.partials <= 25
    assert_near(attention.attend(step, 1, scene.q, scene.scale, window), scene.expected(1, window), scene.dtype)


@pytest.mark.parametrize(("filled", "rows"), [(0, 1), (0, 40), (15, 1), (16, 1), (15, 2), (9, 30), (30, 19)])
def test_question_chunks_are_causal_across_tail_segments(device: torch.device, filled: int, rows: int) -> None:
    Scene([Ask([0], filled, rows), Ask([], 3, 2)], [5], Heads(1, 3), device=device).check()


@pytest.mark.parametrize("window", [1, 2, 9, 17, 33, 64, 10_000])
def test_windows_cut_and_pass_over_pieces(device: torch.device, window: int) -> None:
    asks = [Ask([0, 1, 2], filled=18), Ask([2, 0], filled=3, rows=9)]
    Scene(asks, [40, 12, 7], start=50, device=device).check(window=window)


def test_a_window_applies_across_splits(device: torch.device) -> None:
    scene = Scene([Ask([0], filled=2, rows=3)], [200], device=device)
    attention = scene.attention(200)
    step = attention.prepare(scene.pieces, scene.positions, tiling=Tiling(16, 16, programs=16, min_keys=16))
    for window in (20, 70):
        assert_near(attention.attend(step, 1, scene.q, scene.scale, window), scene.expected(1, window), scene.dtype)


@settings(max_examples=12)
@given(st.data())
def test_random_steps(device: torch.device, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    ask = st.builds(
        Ask,
        st.lists(st.integers(0, len(lengths) - 1), max_size=3),
        filled=st.integers(0, 20),
        rows=st.one_of(st.just(1), st.integers(1, 12)),
    )
    asks = data.draw(st.lists(ask, min_size=1, max_size=3))
    heads = data.draw(st.builds(Heads, st.integers(1, 2), st.sampled_from([1, 3, 4]), st.sampled_from([16, 24])))
    turn = rotation(data.draw(st.sampled_from(RotationKind)), 16)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    scene = Scene(
        asks, lengths, heads, turn, dtype, data.draw(st.integers(0, 999)), data.draw(st.integers(0, 9000)), device
    )
    attention = scene.attention(1000)
    tiling = data.draw(st.sampled_from([None, Tiling(16, 16, 8, min_keys=16), Tiling(32, 32, 2, min_keys=32)]))
    window = data.draw(st.one_of(st.none(), st.integers(1, 80)))
    step = attention.prepare(scene.pieces, scene.positions, tiling=tiling)
    assert_near(attention.attend(step, 1, scene.q, scene.scale, window), scene.expected(1, window), scene.dtype)


def test_a_captured_launch_serves_any_step_that_fits(device: torch.device) -> None:
    big = Scene(SHARED, LENGTHS, device=device)
    counts = Counts(rows=8, stacked=40, runs=40, items=20, partials=60, turns=10)
    attention = big.attention(60)
    step = attention.prepare(big.pieces, big.positions, counts=counts, tiling=Tiling(16, 16, 8, min_keys=16))
    small = [piece for piece in big.pieces if 2 not in piece.rows]
    addresses = [view.data_ptr() for view in step.views.values()]
    for pieces in (big.pieces, small, [], big.pieces):
        assert attention.prepare(pieces, big.positions, into=step) is step
        q = torch.cat((big.q, torch.full_like(big.q[:, :3], float("nan"))), dim=1)
        out = attention.attend(step, 0, q, big.scale, None)
        rows = len(big.positions)
        expected = dense(big.records, pieces, big.positions, big.q, big.turn, 0, big.scale, None)
        torch.testing.assert_close(out[:rows].cpu().double(), expected, rtol=1e-4, atol=1e-5)
        assert out[rows:].eq(0).all(), "rows past the step's own are zeros"
    assert addresses == [view.data_ptr() for view in step.views.values()]


def test_two_steps_may_be_prepared_at_once(device: torch.device) -> None:
    scenes = [Scene(SHARED, LENGTHS, device=device), Scene(SHARED[:1], LENGTHS, device=device)]
    attention = scenes[0].attention()
    steps = [attention.prepare(scene.pieces, scene.positions) for scene in scenes]
    for scene, step in zip(scenes, steps, strict=True):
        expected = dense(scenes[0].records, scene.pieces, scene.positions, scene.q, scene.turn, 1, scene.scale, None)
        assert_near(attention.attend(step, 1, scene.q, scene.scale, None), expected, scene.dtype)


def test_the_workspace_grows_with_the_step(device: torch.device) -> None:
    scene = Scene(SHARED, LENGTHS, device=device)
    attention = scene.attention()
    attention.reserve(1)
    step = attention.prepare(scene.pieces, scene.positions)
    assert step.counts.partials <= len(attention._outs) <= 2 * step.counts.partials
    assert_near(attention.attend(step, 0, scene.q, scene.scale, None), scene.expected(0), scene.dtype)


def test_queries_of_any_strides(device: torch.device) -> None:
    scene = Scene(SHARED, LENGTHS, device=device)
    attention = scene.attention()
    step = attention.prepare(scene.pieces, scene.positions)
    packed = attention.attend(step, 0, scene.q, scene.scale, None)
    by_rows = scene.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(attention.attend(step, 0, by_rows, scene.scale, None), packed)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    scene = Scene(SHARED, LENGTHS, device=device)
    with pytest.raises(StepTooLargeError, match="room is for 3"):
        scene.attention(3).prepare(scene.pieces, scene.positions)
    attention = scene.attention()
    tight = Counts(rows=2, stacked=40, runs=40, items=40, partials=40, turns=40)
    with pytest.raises(StepTooLargeError, match="does not fit a launch"):
        attention.prepare(scene.pieces, scene.positions, counts=tight)
    step = attention.prepare(scene.pieces, scene.positions)
    with pytest.raises(ValueError, match="prepared for 5 rows"):
        attention.attend(step, 0, scene.q[:, :2], scene.scale, None)
    with pytest.raises(ValueError, match="do not fit records"):
        TritonSegmentAttention(scene.records, heads=4, kv_heads=3, head_dim=16, rotations=[NONE], most_partials=1)


def test_tilings_hold_a_whole_group() -> None:
    for group in (1, 3, 4, 8, 20, 71):
        for rows in (1, 2, 7, 512):
            for item_bytes in (2, 4):
                tiling = choose_tiling(group, 128, item_bytes, rows, processors=132)
                assert tiling.tile_rows >= max(16, group)
                assert tiling.tile_rows & (tiling.tile_rows - 1) == 0
    assert choose_tiling(4, 128, 2, 1, 132).tile_rows == 16
    assert choose_tiling(4, 128, 2, 256, 132).tile_rows == 64


def test_without_triton_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "decode_worker.attention.triton_kernel"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(decode_worker.attention, "triton_kernel", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(TritonUnavailableError, match="needs triton"):
        load_kernels(torch.device("cpu"))
