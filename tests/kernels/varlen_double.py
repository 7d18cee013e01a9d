"""What torch's variable-length attention computes, in float64 and one sequence at a time."""

from __future__ import annotations

import torch

from decode_worker.attention.varlen_plan import Sequences


def varlen_double(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences,
    layer: int,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `decode_worker.attention.varlen.torch_varlen`; refuses what the kernel would read wrongly."""
    assert k.stride(-1) == 1
    assert sequences.cum_rows.dtype == sequences.begins.dtype == sequences.keys.dtype == torch.int32
    rows, heads, width = q.shape
    group = heads // k.shape[1]
    bounds = sequences.cum_rows.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == rows
    assert len(sequences.begins[layer]) == len(sequences.keys) + 1
    out = torch.full((rows, heads, width), float("nan"), dtype=torch.float64, device=q.device)
    lse = torch.full((heads, rows), float("nan"), device=q.device)
    begins, counts = sequences.begins[layer].tolist(), sequences.keys.tolist()
    for first, last, begin, count in zip(bounds, bounds[1:], begins, counts, strict=False):
        assert 0 < last - first <= sequences.most_rows
        assert 0 < count <= sequences.most_keys
        keys, values = (
            x[begin : begin + count].double().repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v)
        )
        scores = q[first:last].double().transpose(0, 1) @ keys.transpose(1, 2) * scale
        if sequences.causal:
            assert last - first == count, "where the corner lies is only certain in a square"
            distance = torch.arange(count)[:, None] - torch.arange(count)
            hidden = (distance < 0) | (distance >= (window or count + 1))
            scores = scores.masked_fill(hidden.to(q.device), float("-inf"))
        out[first:last] = (scores.softmax(-1) @ values).transpose(0, 1)
        lse[:, first:last] = scores.logsumexp(-1)
    assert not out.isnan().any(), "every row belongs to a sequence"
    return out.to(q.dtype), lse
