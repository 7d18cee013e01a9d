"""Tensors on the CPU as the bytes that travel and are summed."""

from __future__ import annotations

import torch


def raw_bytes(data: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, sharing its memory."""
    return memoryview(data.view(torch.uint8).view(-1).numpy())  # type: ignore[arg-type] # arrays are buffers
