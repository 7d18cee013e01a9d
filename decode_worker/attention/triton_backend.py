"""Segment attention by our own Triton kernel: on a GPU, or on a CPU in Triton's interpreter (for tests)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from decode_worker.arena import Arena
from decode_worker.attention.base import OwnKv
from decode_worker.attention.triton_cut import StepTooLargeError
from decode_worker.attention.triton_segments import PreparedStep, TritonSegmentAttention
from decode_worker.step import Piece, StepPlan
from shared.engine.probe import LayerGeometry
from shared.engine.seam import AttentionContext

_FLOAT32_BYTES = 4


class TritonAttention:
    """One kernel launch for all pieces of a layer, and one that merges.

    Args:
        arena: Memory of all KV.
        layers: Rotation and window of each layer.
        heads: Query heads.
        workspace_bytes: Most that partials may take. A step that needs more attends in several passes over its rows.

    Raises:
        TritonUnavailableError: The kernel cannot run here.
        ValueError: It does not take the arena's dtype.
    """

    name = "triton"

    def __init__(
        self, arena: Arena, layers: Sequence[LayerGeometry], heads: int, *, workspace_bytes: int = 256 << 20
    ) -> None:
        shape = arena.shape
        self._arena = arena
        self._layers = len(layers)
        self._kernel = TritonSegmentAttention(
            arena.records,
            heads=heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            rotations=[layer.rotation for layer in layers],
            most_partials=workspace_bytes // (heads * (shape.head_dim + 1) * _FLOAT32_BYTES),
        )

    def begin(self, plan: StepPlan) -> AttentionContext:
        """A step by this backend; `StepTooLargeError` when the workspace is too small for a single row."""
        passes = self._passes(plan.pieces, plan.positions.tolist(), 0)
        return TritonStep(self._kernel, OwnKv(self._arena.records, plan, self._layers), passes)

    def _passes(self, pieces: Sequence[Piece], positions: Sequence[int], first: int) -> list[tuple[int, PreparedStep]]:
        """Prepared passes and the first query row of each: one if the workspace holds it, else the rows halved."""
        try:
            return [(first, self._kernel.prepare(pieces, positions))]
        except StepTooLargeError:
            middle = len(positions) // 2
            if not middle:
                raise
        low, high = (_only(pieces, part) for part in (range(middle), range(middle, len(positions))))
        return [
            *self._passes(low, positions[:middle], first),
            *self._passes(high, positions[middle:], first + middle),
        ]


class TritonStep:
    """One step: an attention context."""

    def __init__(self, kernel: TritonSegmentAttention, own: OwnKv, passes: Sequence[tuple[int, PreparedStep]]) -> None:
        self._kernel = kernel
        self._own = own
        self._passes = passes

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Writes the rows' own KV into their tails, then attends to blocks and tails."""
        self._own.write(layer, k, v)
        outs = [
            self._kernel.attend(step, layer, q[0, :, first : first + step.counts.rows], scale, window)
            for first, step in self._passes
        ]
        return (outs[0] if len(outs) == 1 else torch.cat(outs))[None]


def _only(pieces: Sequence[Piece], kept: range) -> list[Piece]:
    """Pieces with the rows in `kept` alone, counted from its first."""
    made = []
    for piece in pieces:
        pairs = [(row - kept.start, base) for row, base in zip(piece.rows, piece.bases, strict=True) if row in kept]
        if pairs:
            rows, bases = map(list, zip(*pairs, strict=True))
            made.append(replace(piece, rows=rows, bases=bases))
    return made
