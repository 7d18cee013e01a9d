"""Attention of a step, behind one small interface; backends are found by name.

flash      any CPU: torch's flash attention with log-sum-exp, one call for each piece and layer
native     CPU with a C++ compiler: the kernel of `cpu_kernel.cpp` where rows are few, `flash` elsewhere
varlen     CUDA: torch's variable-length flash attention, one call for each layer
triton     CUDA, or Triton's interpreter: our own kernel
"""

from __future__ import annotations

from typing import Protocol

from decode_worker.arena import Arena
from decode_worker.step import StepPlan
from shared.engine.seam import AttentionContext
from shared.engine.served_model import ServedModel
from shared.model.catalog import cache_dir

NAMES = ("auto", "flash", "native")


class SegmentAttention(Protocol):
    """One way of attending to pieces. Used by the engine thread alone.

    Attributes:
        name: Its name in settings and logs.
    """

    name: str

    def begin(self, plan: StepPlan) -> AttentionContext:
        """Prepares a step. The context writes the rows' own KV into their tails and attends, layer by layer."""
        ...


def make(name: str, model: ServedModel, arena: Arena) -> SegmentAttention:
    """The backend of a name; "auto" takes the fastest that this machine can run.

    Raises:
        ValueError: Unknown, or not to be had here.
    """
    from decode_worker.attention import native
    from decode_worker.attention.flash import FlashAttention

    layers = model.geometry.layers
    if name not in NAMES:
        raise ValueError(f"attention: {name!r} is none of {', '.join(NAMES)}")
    kernel = native.load(cache_dir() / "kernels") if name in ("auto", "native") else None
    if kernel is not None:
        return native.NativeAttention(arena, layers, kernel)
    if name == "native":
        raise ValueError("attention: 'native' cannot be had here; the log says why")
    return FlashAttention(arena, layers)
