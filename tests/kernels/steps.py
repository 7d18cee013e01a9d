"""Steps of the decode worker for the backends' tests: an arena with blocks and tails, spans, and queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from decode_worker.arena import Arena
from decode_worker.attention.base import SegmentAttention
from decode_worker.step import Placement, RowSpan, StepPlan
from decode_worker.tail import SEGMENT_TOKENS, Tail, segments_for
from shared.engine.probe import LayerGeometry
from shared.kv.layout import KvShape
from tests.kernels.scenes import dense, rotation

# Indexes of blocks, tokens of the tail already written, and new rows.
Asked = tuple[Sequence[int], int, int]


@dataclass
class Step:
    """A step on a device.

    Attributes:
        arena: Holds blocks and tails, all random.
        plan: What the backends are given.
        layers: Geometry of each layer.
        heads: Query heads.
        spans: Of what the plan was made.
    """

    arena: Arena
    plan: StepPlan
    layers: list[LayerGeometry]
    heads: int
    spans: Sequence[RowSpan]

    @classmethod
    def make(
        cls,
        device: torch.device,
        lengths: Sequence[int],
        asks: Sequence[Asked],
        *,
        shape: KvShape,
        group: int = 3,
        layers: Sequence[LayerGeometry] = (),
        share: bool = True,
    ) -> Step:
        tokens = sum(lengths) + sum(SEGMENT_TOKENS * segments_for(filled + rows) for _, filled, rows in asks)
        arena = Arena(shape, shape.extent_bytes(tokens), device)
        arena.records.normal_(generator=torch.Generator(device).manual_seed(1))
        extents = [arena.allocate(length) for length in lengths]
        spans = []
        for laid, filled, rows in asks:
            placements, offset = [], 0
            for index in laid:
                extent = extents[index]
                assert extent is not None
                placements.append(Placement(index.to_bytes(4, "big"), extent, offset))
                offset += lengths[index]
            own = [arena.allocate(SEGMENT_TOKENS, high=True) for _ in range(segments_for(filled + rows))]
            tail = Tail(arena, offset, own=[extent for extent in own if extent is not None], filled=filled)
            assert len(tail.own) == len(own)
            spans.append(RowSpan([1] * rows, placements, tail))
        turned = rotation(rotary_dim=shape.head_dim)
        geometry = list(layers) or [LayerGeometry(turned, None)] * shape.layers
        return cls(arena, StepPlan(spans, share=share), geometry, shape.kv_heads * group, spans)

    def queries(self, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of a layer as a model's attention gives them."""
        shape, device = self.arena.shape, self.arena.records.device
        generator = torch.Generator(device).manual_seed(seed)
        sizes = [(1, heads, len(self.plan.positions), shape.head_dim) for heads in (self.heads, *[shape.kv_heads] * 2)]
        q, k, v = (torch.randn(size, generator=generator, device=device).to(self.arena.records.dtype) for size in sizes)
        return q, k, v

    def check(self, backend: SegmentAttention, tolerance: float) -> float:
        """Every layer of a backend against dense float64 attention over what it left; gives the largest distance."""
        worst = 0.0
        context, scale = backend.begin(self.plan), self.arena.shape.head_dim**-0.5
        for layer, geometry in enumerate(self.layers):
            q, k, v = self.queries(layer)
            out = context.attend(layer, q, k, v, scale, geometry.window)
            written = self.arena.records[self.plan.slots.to(q.device) + layer * SEGMENT_TOKENS]
            assert torch.equal(written.unflatten(1, (2, -1, k.shape[3])), torch.stack((k[0], v[0])).permute(2, 0, 1, 3))
            positions = self.plan.positions.tolist()
            expected = dense(
                self.arena.records, self.plan.pieces, positions, q[0], geometry.rotation, layer, scale, geometry.window
            )
            assert out.dtype == q.dtype
            assert out.shape == (1, *expected.shape)
            distance = float((out[0].cpu().double() - expected).norm() / expected.norm())
            assert distance <= tolerance, f"layer {layer}: relative distance {distance:.1e}"
            worst = max(worst, distance)
        return worst
