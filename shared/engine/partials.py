"""Partial attention with log-sum-exp, and the exact merge of partials.

Attention over a concatenation of key runs equals the log-sum-exp weighted mean of the attention
over each run (FlashDecoding; Milakov & Gimelshein, arXiv 1805.02867). Every partial here returns
`out` [heads, rows, head_dim] and `lse` float32 [heads, rows]; rows that see no key have lse = -inf.
Heads are grouped: query head h reads KV head h // (heads / kv_heads).
"""

from __future__ import annotations

import torch

# CPU flash attention with log-sum-exp; takes grouped heads and strided K and V without a copy.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - the public wrapper hides the lse
_MERGE_ELEMENTS = 1 << 22


def dense_partial(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row sees every key. q [heads, rows, d]; k, v [tokens, kv_heads, d], any strides."""
    heads, rows, width = q.shape
    kv_heads = k.shape[1]
    # The query heads of a KV head become rows of it, so that its keys are read once.
    packed = q.reshape(1, kv_heads, heads // kv_heads * rows, width)
    out, lse = _flash(packed, k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=scale)
    return out.reshape(heads, rows, width), lse.reshape(heads, rows)


def causal_partial(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row i sees keys 0..i; rows past the last key see all. Shapes as in `dense_partial`."""
    out, lse = _flash(q[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], is_causal=True, scale=scale)
    return out[0], lse[0]


def masked_partial(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row i sees the keys with `visible[i, j]` (bool [rows, tokens]); float32 throughout.

    For runs that a sliding window cuts: rare, and the only place where rows may see nothing.
    """
    heads, rows, width = q.shape
    kv_heads = k.shape[1]
    grouped = q.to(torch.float32).reshape(kv_heads, heads // kv_heads, rows, width)
    keys, values = (x.to(torch.float32).transpose(0, 1)[:, None] for x in (k, v))
    scores = grouped @ keys.transpose(-1, -2) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.clamp_min(torch.finfo(torch.float32).min)[..., None]).exp()
    return (weights @ values).reshape(heads, rows, width), lse.reshape(heads, rows)


def merge_partials(outs: torch.Tensor, lses: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Merges partials of the same query row.

    Args:
        outs: float32 [heads, partials + 1, d]; the last partial is the empty one, all zeros.
        lses: float32 [heads, partials + 1]; the last is -inf.
        table: int64 [rows, most]: the partials of each row, padded with the empty one.

    Returns:
        float32 [heads, rows, d].
    """
    heads, _, width = outs.shape
    rows, most = table.shape
    step = max(1, _MERGE_ELEMENTS // (heads * most * width))
    merged = torch.empty(heads, rows, width, dtype=torch.float32, device=outs.device)
    for start in range(0, rows, step):
        part = table[start : start + step]
        weights = torch.softmax(lses[:, part], dim=-1)
        torch.matmul(weights[:, :, None], outs[:, part], out=merged[:, start : start + step, None])
    return merged
