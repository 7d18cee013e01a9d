"""Attention by the CPU kernel: one call for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from decode_worker.arena import Arena
from decode_worker.attention.flash import Angles, FlashStep
from decode_worker.step import StepPlan
from decode_worker.tail import SEGMENT_TOKENS
from shared.engine.native import builder
from shared.engine.native.builder import NativeKernel
from shared.engine.native.decoder import KINDS
from shared.engine.probe import LayerGeometry
from shared.engine.seam import AttentionContext

__all__ = ["NativeAttention", "NativeKernel", "load", "pieces_table"]


class NativeAttention:
    """Attention by the kernel; layers with a window by torch's flash attention.

    Args:
        arena: Memory of all KV.
        layers: Rotation and window of each layer.
        kernel: The built kernel.
    """

    name = "native"

    def __init__(self, arena: Arena, layers: Sequence[LayerGeometry], kernel: NativeKernel) -> None:
        self._arena = arena
        self._layers = layers
        self.kernel = kernel

    def begin(self, plan: StepPlan) -> AttentionContext:
        """A step by this backend."""
        return _NativeStep(self._arena, self._layers, self.kernel, plan)


class _NativeStep:
    def __init__(self, arena: Arena, layers: Sequence[LayerGeometry], kernel: NativeKernel, plan: StepPlan) -> None:
        self._arena, self._layers, self._kernel, self._plan = arena, layers, kernel, plan
        self._angles = Angles(plan)
        self._pieces = pieces_table(plan)
        self._flash: FlashStep | None = None

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Writes the rows' own KV into their tails, then attends to blocks and tails."""
        if window is not None or not self._kernel.takes(q.dtype, q.shape[3]):
            if self._flash is None:
                self._flash = FlashStep(self._arena, self._layers, self._plan, self._angles)
            return self._flash.attend(layer, q, k, v, scale, window)
        rotation = self._layers[layer].rotation
        out = self._kernel.step_attention(
            self._arena.records,
            layer,
            *(x[0].transpose(0, 1).contiguous() for x in (q, k, v)),
            self._plan.slots,
            SEGMENT_TOKENS,
            self._pieces,
            self._plan.rows,
            *self._angles.of(rotation),
            KINDS[rotation.kind],
            scale,
        )
        return out[None]


def pieces_table(plan: StepPlan) -> torch.Tensor:
    """The kernel's table of pieces, int64 [n, 6]: first, stride, keys, row_first, rows, own."""
    table, first = [], 0
    for piece in plan.pieces:
        table.append((piece.first, piece.stride, piece.keys, first, len(piece.rows), 0 if piece.causal else -1))
        first += len(piece.rows)
    return torch.tensor(table, dtype=torch.int64)


def load(folder: Path) -> NativeKernel | None:
    """The kernel, built into `folder` if it is not there yet; None where it cannot be had, with the reason logged."""
    return builder.load(folder)
