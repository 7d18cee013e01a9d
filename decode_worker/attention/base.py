"""Attention of a step, behind one small interface; backends are found by name.

flash      CPU: torch's flash attention with log-sum-exp, one call for each piece and layer
native     CPU with a C++ compiler: the kernels of `shared/engine/native`, `flash` for layers with a window
varlen     CUDA: torch's variable-length flash attention, one call for each layer (two while a question is read)
triton     CUDA, or a CPU in Triton's interpreter: our own kernel, one launch for each layer and one that merges
"""

from __future__ import annotations

from typing import Protocol

import torch

from decode_worker.arena import Arena
from decode_worker.step import StepPlan
from decode_worker.tail import SEGMENT_TOKENS
from shared.engine.seam import AttentionContext
from shared.engine.served_model import ServedModel
from shared.model.catalog import cache_dir

NAMES = ("auto", "flash", "native", "varlen", "triton")


class SegmentAttention(Protocol):
    """One way of attending to pieces. Used by the engine thread alone.

    Attributes:
        name: Its name in settings and logs.
    """

    name: str

    def begin(self, plan: StepPlan) -> AttentionContext:
        """Prepares a step. The context writes the rows' own KV into their tails and attends, layer by layer."""
        ...


class OwnKv:
    """Where a step's rows leave their own KV.

    Args:
        records: The arena's tensor.
        plan: The step.
        layers: Layers of the model.
    """

    def __init__(self, records: torch.Tensor, plan: StepPlan, layers: int) -> None:
        self._records = records
        # All layers at once: one copy to the device for the step, and no arithmetic between the layers.
        slots = plan.slots + torch.arange(layers)[:, None] * SEGMENT_TOKENS
        self._slots = slots.to(records.device, non_blocking=True)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes one layer's keys and values, each [1, kv_heads, rows, head_dim], into the arena."""
        own = torch.cat((k[0], v[0])).transpose(0, 1).reshape(k.shape[2], -1)
        self._records.index_copy_(0, self._slots[layer], own)


def make(name: str, model: ServedModel, arena: Arena) -> SegmentAttention:
    """The backend of a name; "auto" takes the fastest that this machine can run.

    Raises:
        ValueError: Unknown, or not to be had here.
    """
    if name not in NAMES:
        raise ValueError(f"attention: {name!r} is none of {', '.join(NAMES)}")
    on_cpu = arena.records.device.type == "cpu"
    if name == "triton" or (name == "auto" and not on_cpu):
        try:
            return _triton(model, arena)
        except ValueError:
            if name == "triton":
                raise
    if name == "varlen" or not on_cpu:
        if name not in ("auto", "varlen"):
            raise ValueError(f"attention: {name!r} attends on a CPU, and the KV is on {arena.records.device}")
        from decode_worker.attention.varlen import VarlenAttention

        return VarlenAttention(arena, model.geometry.layers, model.geometry.heads)
    return _cpu(name, model, arena)


def _cpu(name: str, model: ServedModel, arena: Arena) -> SegmentAttention:
    from decode_worker.attention import native
    from decode_worker.attention.flash import FlashAttention

    layers = model.geometry.layers
    kernel = native.load(cache_dir() / "kernels") if name in ("auto", "native") else None
    if kernel is not None:
        return native.NativeAttention(arena, layers, kernel)
    if name == "native":
        raise ValueError("attention: 'native' cannot be had here; the log says why")
    return FlashAttention(arena, layers)


def _triton(model: ServedModel, arena: Arena) -> SegmentAttention:
    from decode_worker.attention.triton_backend import TritonAttention
    from decode_worker.attention.triton_segments import TritonUnavailableError

    try:
        return TritonAttention(arena, model.geometry.layers, model.geometry.heads)
    except TritonUnavailableError as error:
        raise ValueError(f"attention: 'triton' cannot be had here: {error}") from error
