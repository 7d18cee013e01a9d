"""The kernel on a real step: the arena, tails and spans of the decode worker, against what it computes without it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from decode_worker.arena import Arena
from decode_worker.attention.flash import FlashAttention
from decode_worker.attention.triton_plan import SegmentPiece
from decode_worker.attention.triton_segments import Limits, TritonSegmentAttention
from decode_worker.step import Placement, RowSpan, StepPlan
from decode_worker.tail import Tail
from shared.engine.probe import LayerGeometry
from shared.kv.layout import KvShape
from tests.kernels.scenes import rotation

LAYERS, KV_HEADS, GROUP, HEAD_DIM = 2, 2, 3, 16


def pieces_of(plan: StepPlan) -> list[SegmentPiece]:
    """The step's pieces as the kernel takes them: causality follows from positions there."""
    return [SegmentPiece(p.first, p.stride, p.keys, p.rows, p.bases, local=p.local) for p in plan.pieces]


def make_spans(arena: Arena, lengths: Sequence[int], asks: Sequence[tuple[Sequence[int], int, int]]) -> list[RowSpan]:
    blocks = []
    for length in lengths:
        extent = arena.allocate(length)
        assert extent is not None
        blocks.append(extent)
    spans = []
    for laid, filled, rows in asks:
        placements, offset = [], 0
        for index in laid:
            placements.append(Placement(bytes([index]), blocks[index], offset))
            offset += lengths[index]
        tail = Tail.reserve(arena, offset, filled + rows)
        assert tail is not None
        tail.filled = filled
        spans.append(RowSpan([1] * rows, placements, tail))
    return spans


@pytest.mark.parametrize(("dtype", "window"), [("float32", None), ("float32", 50), ("bfloat16", None)])
def test_equals_the_step_of_the_worker(device: torch.device, dtype: str, window: int | None) -> None:
    if device.type != "cpu":
        pytest.skip("the worker's own attention is the CPU's")
    shape = KvShape(LAYERS, KV_HEADS, HEAD_DIM, dtype)
    arena = Arena(shape, shape.extent_bytes(900), device)
    arena.records.normal_(generator=torch.Generator(device).manual_seed(1))
    # A chunk over a tail's segments, two decoding rows that share its blocks, and a block laid twice.
    asks = [([0, 1, 2], 58, 9), ([2, 0], 100, 1), ([1, 2, 1], 3, 1)]
    spans = make_spans(arena, [70, 1, 33], asks)
    turn = rotation(rotary_dim=HEAD_DIM)
    plan = StepPlan(spans)
    step = FlashAttention(arena, [LayerGeometry(turn, window)] * LAYERS).begin(plan)
    pieces, positions = pieces_of(plan), plan.positions.tolist()
    stacked = sum(len(piece.rows) for piece in pieces)
    attention = TritonSegmentAttention(
        arena.records,
        heads=KV_HEADS * GROUP,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rotations=[turn] * LAYERS,
        limits=Limits(len(positions), stacked, 2 * stacked),
        processors=2,
    )
    attention.prepare(pieces, positions)
    generator = torch.Generator(device).manual_seed(2)
    for layer in range(LAYERS):
        q, k, v = (
            torch.randn(1, heads, len(positions), HEAD_DIM, generator=generator, device=device).to(arena.records.dtype)
            for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
        )
        expected = step.attend(layer, q, k, v, HEAD_DIM**-0.5, window)
        out = attention.attend(layer, q[0], HEAD_DIM**-0.5, window)[None]
        assert out.dtype == expected.dtype
        distance = float((out.float() - expected.float()).norm() / expected.float().norm())
        assert distance < (2e-6 if dtype == "float32" else 8e-3)
