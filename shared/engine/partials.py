"""Partial attention with log-sum-exp, and the exact merge of partials.

Attention over a concatenation of key runs equals the log-sum-exp weighted mean of the attention
over each run (FlashDecoding; Milakov & Gimelshein, arXiv 1805.02867). Every partial here returns
`out` [heads, rows, head_dim] and `lse` float32 [heads, rows]; rows that see no key have lse = -inf.
Heads are grouped: query head h reads KV head h // (heads / kv_heads).
"""

from __future__ import annotations

import torch

# Those of a CPU, CUDA's for half precision, CUDA's for float32. The public wrapper hides the log-sum-exp.
_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
_cuda_flash = torch.ops.aten._flash_attention_forward  # noqa: SLF001
_cuda_exact = torch.ops.aten._scaled_dot_product_efficient_attention  # noqa: SLF001
# Elements gathered at once: what a CPU's cache likes, and what a GPU has to spare.
_MERGE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}


def dense_partial(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row sees every key. q [heads, rows, d]; k, v [tokens, kv_heads, d], any strides."""
    heads, rows, width = q.shape
    kv_heads = k.shape[1]
    # The query heads of a KV head become rows of it, so that its keys are read once.
    packed = q.reshape(kv_heads, heads // kv_heads * rows, width)
    out, lse = _attend(packed, k.transpose(0, 1), v.transpose(0, 1), scale, causal=False)
    return out.reshape(heads, rows, width), lse.reshape(heads, rows)


def causal_partial(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row i sees keys 0..i; rows past the last key see all. Shapes as in `dense_partial`."""
    if q.is_cuda and q.shape[1] != len(k):
        # CUDA's kernels disagree about where the corner of the mask lies when it is not square.
        keys = min(q.shape[1], len(k))
        out, lse = causal_partial(q[:, :keys], k[:keys], v[:keys], scale)
        if q.shape[1] == keys:
            return out, lse
        past = dense_partial(q[:, keys:], k, v, scale)
        return torch.cat((out, past[0]), dim=1), torch.cat((lse, past[1]), dim=1)
    return _attend(q, k.transpose(0, 1), v.transpose(0, 1), scale, causal=True)


def causal_runs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """Several sequences packed end to end, each causal within itself, by CUDA's variable-length flash attention.

    Args:
        q: [heads, rows, d], half precision, on CUDA.
        k: [rows, kv_heads, d], any row stride.
        v: As `k`.
        bounds: int32 [runs + 1]: where each begins, and the end.
        scale: Factor of the scores.
        window: Keys at this distance or farther are not seen; None for no window.

    Returns:
        [heads, rows, d].
    """
    most, left = q.shape[1], -1 if window is None else window - 1
    sides = {"window_size_left": left, "window_size_right": 0}
    by_rows = q.transpose(0, 1)
    out: torch.Tensor = _cuda_flash(
        by_rows, k, v, bounds, bounds, most, most, 0.0, is_causal=True, return_debug_mask=False, scale=scale, **sides
    )[0]
    return out.transpose(0, 1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call over q [heads, rows, d] and k, v [kv_heads, tokens, d].

    Query heads are grouped only where causal; on CUDA there are as many causal rows as keys.
    """
    if not q.is_cuda:
        out, lse, *_ = _cpu_flash(q[None], k[None], v[None], is_causal=causal, scale=scale)
        return out[0], lse[0]
    if q.dtype is not torch.float32:
        by_rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        sizes = (q.shape[1], k.shape[1])
        out, lse, *_ = _cuda_flash(*by_rows, None, None, *sizes, 0.0, causal, return_debug_mask=False, scale=scale)
        return out[0].transpose(0, 1), lse[0]
    if len(k) != len(q):
        k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
    out, lse, *_ = _cuda_exact(q[None], k[None], v[None], None, compute_log_sumexp=True, is_causal=causal, scale=scale)
    return out[0], lse[0, :, : q.shape[1]]  # its log-sum-exp is padded to whole tiles


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
    step = max(1, _MERGE_ELEMENTS[outs.device.type] // (heads * most * width))
    merged = torch.empty(heads, rows, width, dtype=torch.float32, device=outs.device)
    for start in range(0, rows, step):
        part = table[start : start + step]
        weights = torch.softmax(lses[:, part], dim=-1)
        torch.matmul(weights[:, :, None], outs[:, part], out=merged[:, start : start + step, None])
    return merged
