"""The merge alone: equal to the torch merge, and deaf to partials that saw nothing."""

from __future__ import annotations

import math

import pytest
import torch

from decode_worker.attention.triton_cut import padded_dim
from decode_worker.attention.triton_segments import load_kernels
from shared.engine.partials import merge_partials


def merged(
    device: torch.device, outs: torch.Tensor, lses: torch.Tensor, members: list[list[int]], dtype: torch.dtype
) -> torch.Tensor:
    heads, width = outs.shape[1:]
    offsets = torch.tensor([0, *(len(part) for part in members)]).cumsum(0)
    flat = torch.tensor([*(partial for part in members for partial in part), 0])
    out = torch.full((len(members), heads, width), float("nan"), dtype=dtype, device=device)
    load_kernels(device).merge_rows[(len(members), heads)](
        outs.to(device),
        lses.to(device),
        offsets.to(device, torch.int32),
        flat.to(device, torch.int32),
        out,
        HEADS=heads,
        HEAD_DIM=width,
        BLOCK_DIM=padded_dim(width),
        TILE_PARTIALS=16,
    )
    return out.cpu()


@pytest.mark.parametrize("width", [24, 64])
def test_equals_the_torch_merge(device: torch.device, width: int) -> None:
    generator = torch.Generator().manual_seed(3)
    members = [[0], [5, 1, 2], list(range(6, 43)), [3, 4], [43, 44]]
    outs = torch.randn(45, 3, width, generator=generator)
    # A wide spread: some partials weigh nothing beside others.
    lses = torch.randn(45, 3, generator=generator) * 30
    got = merged(device, outs, lses, members, torch.float32)
    most = max(len(part) for part in members)
    table = torch.tensor([[*part, *[45] * (most - len(part))] for part in members])
    natural = torch.cat((lses * math.log(2), torch.full((1, 3), float("-inf")))).T
    expected = merge_partials(torch.cat((outs, torch.zeros(1, 3, width))).transpose(0, 1), natural, table)
    torch.testing.assert_close(got, expected.transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_partials_that_saw_nothing_are_not_read(device: torch.device) -> None:
    outs = torch.full((20, 2, 16), float("nan"))
    lses = torch.full((20, 2), float("-inf"))
    outs[18], lses[18] = 2.0, -900.0
    got = merged(device, outs, lses, [list(range(19)), [0, 1], []], torch.bfloat16)
    assert got[0].eq(2.0).all()
    assert got[1:].eq(0.0).all(), "a row that saw no key comes out as zeros"
