"""Partial attention and its merge against dense attention in float64, over ragged shapes."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from shared.engine.partials import causal_partial, dense_partial, masked_partial, merge_partials

pytestmark = pytest.mark.usefixtures("one_thread")

SCALE = 0.37


@dataclass
class Case:
    """Heads, KV heads, rows, tokens, width."""

    heads: int
    kv_heads: int
    rows: int
    tokens: int
    width: int
    seed: int

    def draw(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [heads, rows, d]; keys and values [tokens, kv_heads, d], strided as in an extent."""
        generator = torch.Generator().manual_seed(self.seed)
        q = torch.randn(self.heads, self.rows, self.width, generator=generator).to(dtype)
        kv = torch.randn(self.tokens, 2, self.kv_heads, self.width, generator=generator).to(dtype)
        return q, kv[:, 0], kv[:, 1]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 3))
    return Case(
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        rows=draw(st.integers(1, 20)),
        tokens=draw(st.integers(1, 40)),
        width=draw(st.sampled_from([8, 16, 24, 64])),
        seed=draw(st.integers(0, 1000)),
    )


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention in float64; rows that see nothing give zeros and minus infinity."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[0] // k.shape[1]
    keys, values = (x.transpose(0, 1).repeat_interleave(group, dim=0) for x in (k, v))
    scores = (q @ keys.transpose(1, 2) * SCALE).masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    return torch.nan_to_num(torch.softmax(scores, -1), nan=0.0) @ values, lse


def assert_close(got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(got[0].double(), expected[0], atol=2e-5, rtol=2e-5)
    assert got[1].dtype == torch.float32
    torch.testing.assert_close(got[1].double(), expected[1], atol=2e-5, rtol=2e-5)


@settings(max_examples=80)
@given(cases())
def test_dense(case: Case) -> None:
    q, k, v = case.draw()
    everything = torch.ones(case.rows, case.tokens, dtype=torch.bool)
    assert_close(dense_partial(q, k, v, SCALE), reference(q, k, v, everything))


@settings(max_examples=80)
@given(cases())
def test_causal_with_more_rows_than_keys_as_well(case: Case) -> None:
    case.rows = max(case.rows, case.tokens)
    q, k, v = case.draw()
    visible = torch.arange(case.rows)[:, None] >= torch.arange(case.tokens)
    assert_close(causal_partial(q, k, v, SCALE), reference(q, k, v, visible))


@settings(max_examples=80)
@given(cases(), st.integers(1, 30), st.integers(0, 30))
def test_masked_by_a_window_with_rows_that_see_nothing(case: Case, window: int, distance: int) -> None:
    q, k, v = case.draw()
    gap = torch.arange(case.rows)[:, None] + distance - torch.arange(case.tokens)
    visible = (gap >= 0) & (gap < window)
    assert_close(masked_partial(q, k, v, SCALE, visible), reference(q, k, v, visible))


@settings(max_examples=60)
@given(cases(), st.lists(st.integers(1, 12), min_size=1, max_size=5), st.booleans(), st.integers(0, 99))
def test_parts_merge_into_the_whole(case: Case, cuts: list[int], windowed: bool, seed: int) -> None:  # noqa: FBT001 - hypothesis
    case.tokens = sum(cuts)
    q, k, v = case.draw()
    draw = torch.Generator().manual_seed(seed)
    visible = torch.rand(case.rows, case.tokens, generator=draw) < 0.7 if windowed else None
    if visible is not None:
        visible[:, 0] = True
    outs, lses, start = [], [], 0
    for cut in cuts:
        part = k[start : start + cut], v[start : start + cut]
        seen = None if visible is None else visible[:, start : start + cut]
        out, lse = dense_partial(q, *part, SCALE) if seen is None else masked_partial(q, *part, SCALE, seen)
        outs.append(out.float())
        lses.append(lse)
        start += cut
    # Rows as partials in any order, padded with the empty one.
    stacked = torch.cat([*outs, torch.zeros(case.heads, 1, case.width)], dim=1)
    sums = torch.cat([*lses, torch.full((case.heads, 1), float("-inf"))], dim=1)
    empty = len(cuts) * case.rows
    table = torch.stack([torch.arange(len(cuts)) * case.rows + row for row in range(case.rows)])
    padded = torch.cat((table[:, torch.randperm(len(cuts), generator=draw)], torch.full((case.rows, 2), empty)), dim=1)
    merged = merge_partials(stacked, sums, padded)
    everything = torch.ones(case.rows, case.tokens, dtype=torch.bool)
    expected, _ = reference(q, k, v, everything if visible is None else visible)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), expected, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_its_inputs(dtype: torch.dtype) -> None:
    q, k, v = Case(8, 2, 7, 33, 64, 1).draw(dtype)
    everything = torch.ones(7, 33, dtype=torch.bool)
    out, lse = dense_partial(q, k, v, SCALE)
    expected, sums = reference(q, k, v, everything)
    assert float((out.double() - expected).norm() / expected.norm()) < 0.01
    torch.testing.assert_close(lse.double(), sums, atol=0.02, rtol=0.02)


def test_a_large_merge_is_cut_into_steps() -> None:
    rows, heads, width = 3000, 2, 64
    outs, lses = torch.randn(heads, 2 * rows + 1, width), torch.randn(heads, 2 * rows + 1)
    table = torch.stack((torch.arange(rows), torch.arange(rows) + rows), dim=1).repeat(1, 9)
    merged = merge_partials(outs, lses, table)
    weights = torch.softmax(lses[:, table[2999]], dim=-1)
    torch.testing.assert_close(merged[:, 2999], (weights[..., None] * outs[:, table[2999]]).sum(1))


def test_scores_far_apart_do_not_overflow() -> None:
    q, k, v = Case(2, 1, 3, 5, 16, 4).draw()
    out, lse = dense_partial(q * 300, k * 300, v, 1.0)
    assert torch.isfinite(out).all()
    stacked = torch.cat((out, out, torch.zeros(2, 1, 16)), dim=1)
    sums = torch.cat((lse, lse - 1e6, torch.full((2, 1), float("-inf"))), dim=1)
    merged = merge_partials(stacked, sums, torch.tensor([[row, row + 3, 6] for row in range(3)]))
    torch.testing.assert_close(merged, out)
