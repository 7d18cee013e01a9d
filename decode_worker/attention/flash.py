"""Segment attention by torch's CPU flash attention: one call for each piece and layer, partials merged exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from decode_worker.arena import Arena
from decode_worker.attention.base import OwnKv
from decode_worker.step import Piece, StepPlan
from shared.engine.partials import causal_partial, dense_partial, masked_partial, merge_partials
from shared.engine.probe import LayerGeometry
from shared.engine.rotation import Rotation
from shared.engine.seam import AttentionContext


class FlashAttention:
    """The backend that runs wherever torch does.

    Args:
        arena: Memory of all KV.
        layers: Rotation and window of each layer.
    """

    name = "flash"

    def __init__(self, arena: Arena, layers: Sequence[LayerGeometry]) -> None:
        self._arena = arena
        self._layers = layers

    def begin(self, plan: StepPlan) -> AttentionContext:
        """A step by this backend."""
        return FlashStep(self._arena, self._layers, plan, Angles(plan))


class Angles:
    """Cosines and sines of a step's turned rows, made once for each distinct rotation."""

    def __init__(self, plan: StepPlan) -> None:
        self._deltas = -plan.bases[: plan.turned]
        # Layers with equal rotations share one Rotation object (probe), hence identity as the key.
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables float32 [turned, rotary_dim]."""
        if id(rotation) not in self._tables:
            self._tables[id(rotation)] = rotation.tables(self._deltas)
        return self._tables[id(rotation)]


class FlashStep:
    """One step: an attention context."""

    def __init__(self, arena: Arena, layers: Sequence[LayerGeometry], plan: StepPlan, angles: Angles) -> None:
        self._records, self._kv_heads = arena.records, arena.shape.kv_heads
        self._own = OwnKv(arena.records, plan, len(layers))
        self._layers = layers
        self._plan = plan
        self._angles = angles
        self._table = plan.merge_table()

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Writes the rows' own KV into their tails, then attends to blocks and tails."""
        self._own.write(layer, k, v)
        queries = self._stacked_queries(layer, q[0])
        heads, partials, width = queries.shape
        outs = torch.zeros(heads, partials + 1, width, dtype=torch.float32)
        lses = torch.full((heads, partials + 1), float("-inf"))
        start = 0
        for piece in self._plan.pieces:
            end = start + len(piece.rows)
            keys, values = piece.view(self._records, layer, self._kv_heads)
            part = queries[:, start:end]
            if window is None or not self._cut(start, end, window):
                partial = causal_partial if piece.causal else dense_partial
                outs[:, start:end], lses[:, start:end] = partial(part, keys, values, scale)
            else:
                visible = self._visible(piece, start, end, window)
                if bool(visible.any()):
                    outs[:, start:end], lses[:, start:end] = masked_partial(part, keys, values, scale, visible)
            start = end
        merged = merge_partials(outs, lses, self._table)
        return merged.transpose(0, 1)[None].to(q.dtype)

    def _stacked_queries(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        plan, rotation = self._plan, self._layers[layer].rotation
        stacked = q[:, plan.rows]
        if plan.turned and rotation.rotary_dim:
            cos, sin = self._angles.of(rotation)
            stacked[:, : plan.turned] = rotation.apply(stacked[:, : plan.turned], cos, sin).to(q.dtype)
        return stacked

    def _cut(self, start: int, end: int, window: int) -> bool:
        """True when some row is too far from the piece's first key to see all of it."""
        plan = self._plan
        farthest = plan.positions[plan.rows[start:end]] - plan.bases[start:end]
        return int(farthest.max()) >= window

    def _visible(self, piece: Piece, start: int, end: int, window: int) -> torch.Tensor:
        plan = self._plan
        rows = plan.positions[plan.rows[start:end]][:, None]
        keys = plan.bases[start:end, None] + torch.arange(piece.keys)
        return (rows - keys < window) & (rows >= keys)
