"""Partials of every device against float64: what encoding and the probe attend with."""

from __future__ import annotations

import pytest
import torch

from shared.engine.partials import causal_partial, dense_partial, masked_partial, merge_partials

# Outputs and log-sum-exps, absolute; values are normal and outputs at most about 3.
ABSOLUTE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
CASES = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
if torch.cuda.is_available():
    CASES += [("cuda", dtype) for dtype in ABSOLUTE]


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (x.cpu().double().repeat_interleave(len(q) // k.shape[1], dim=1).transpose(0, 1) for x in (k, v))
    scores = (q.cpu().double() @ keys.transpose(1, 2) * 0.3).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize(("device", "dtype"), CASES)
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 300), (70, 70), (37, 5), (5, 37), (130, 257)])
def test_partials_and_their_merge(device: str, dtype: torch.dtype, rows: int, keys: int) -> None:
    draw = torch.Generator().manual_seed(5)
    q = torch.randn(6, rows, 32, generator=draw).to(device, dtype)
    # Strided as in an extent: keys and values side by side in a record.
    kv = torch.randn(keys, 2, 2, 32, generator=draw).to(device, dtype)
    k, v = kv.unbind(1)
    corner = torch.ones(rows, keys, dtype=torch.bool).tril()
    every = torch.ones(rows, keys, dtype=torch.bool)
    got = {
        "causal": (causal_partial(q, k, v, 0.3), expected(q, k, v, corner)),
        "dense": (dense_partial(q, k, v, 0.3), expected(q, k, v, every)),
        "masked": (masked_partial(q, k, v, 0.3, corner.to(device)), expected(q, k, v, corner)),
    }
    for name, ((out, lse), (out_expected, lse_expected)) in got.items():
        assert lse.dtype == torch.float32
        for made, wanted in ((out, out_expected), (lse, lse_expected)):
            error = float((made.cpu().double() - wanted).abs().max())
            assert error < ABSOLUTE[dtype], name
    (out, lse), _ = got["dense"]
    twice = torch.cat((out.float(), out.float(), torch.zeros_like(out[:, :1], dtype=torch.float32)), dim=1)
    lses = torch.cat((lse, lse, torch.full_like(lse[:, :1], float("-inf"))), dim=1)
    table = torch.stack((torch.arange(rows), torch.arange(rows) + rows, torch.full((rows,), 2 * rows)), dim=1)
    merged = merge_partials(twice, lses, table.to(device))
    torch.testing.assert_close(merged, out.float(), rtol=1e-5, atol=1e-5)
