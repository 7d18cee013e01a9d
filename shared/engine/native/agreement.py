"""Whether two computations of one thing agree: the measure by which fused code is proved against the model itself."""

from __future__ import annotations

import torch

# Relative RMS distance allowed beside what rounding explains.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}
_ROUNDINGS = 5


def excess(one: torch.Tensor, other: torch.Tensor, ours: torch.Tensor, dtype: torch.dtype) -> float:
    """How far `ours` is from `one`, over what rounding explains; at most 1 when they agree.

    Rounding grows from layer to layer, in bfloat16 to a tenth and more. What it explains is measured: `one` and `other`
    are results of transformers' own forward that are equal but for rounding.

    Args:
        one: Any shape and type.
        other: The same.
        ours: The same.
        dtype: In which the model computes: float32 or bfloat16.
    """
    return distance(ours, one) / (_ROUNDINGS * distance(other, one) + _TOLERANCE[dtype])


def distance(given: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative RMS distance; NaN when either holds one."""
    given, wanted = given.to(torch.float32), wanted.to(torch.float32)
    return float((given - wanted).norm() / wanted.norm().clamp_min(1e-12))
