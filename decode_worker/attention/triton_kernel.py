"""Segment attention on the GPU: block pieces and tails of a whole step in one launch, merged in a second.

    records  [slots, 2, kv_heads, head_dim]     the arena; `items` says which runs, for which rows
    q        [heads, R, head_dim]               any strides but the last; gathered and turned here

    segment_partials   one program per (item, KV head); for each run of the item
        q rows of the tile, turned back in float32    row m of the tile = stacked row m // G, head m % G
        ┌───────────┐   for each tile of keys:
        │ s0 h0     │     scores = q · Kᵀ             [tile_rows, tile_keys], float32
        │ s0 h1     │     hide by limit and window
        │ s1 h0     │     running maximum and sum, out = out · shrink + p · V
        │ s1 h1     │   the G heads of a KV head share its K and V: read once
        └───────────┘
        outs [partials, heads, head_dim], lses [partials, heads]     float32; base-2 log-sum-exp
    merge_rows         one program per (query row, head)
        merged [R, heads, head_dim]

Numbers for Llama-3.1-8B in bfloat16 (32 layers, 32 heads, 8 KV heads of 128) on an H200 (4.3 TB/s copied):

    a key in a layer   2 · 8 · 128 · 2 B = 4 KiB;  4 · 32 · 128 = 16,384 operations for each row that sees it
    32,768 keys        134 MB a layer: 31 µs;  4.29 GB a step: 1.00 ms, the floor for all rows together
    arithmetic         4 operations a byte for each stacked row: memory bounds up to about 50 rows
    tiles of 16 rows   one row of 4 heads wastes 12 of 16 lines: still 16 operations a byte
    partials           16.5 KB written and read again for each row and item: 64 rows over 200 blocks
                       would move three times the keys' bytes; joined into items of 2,000 keys, a quarter
    angles             2 · 512 B for each distinct offset, made once a step in float64

The kernel reads each tile of 64 keys of one KV head as 64 runs of 256 B, 4 KiB apart; programs of
neighbouring KV heads are neighbours in the grid, so that together they read whole records.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# ruff: noqa: ANN001, ANN201, ANN202, N803 - a kernel's arguments have no Python types; its constants are in capitals

from __future__ import annotations

import triton
import triton.language as tl

from decode_worker.attention.triton_plan import ITEM_FIELDS, RUN_FIELDS

_ITEM_FIELDS = tl.constexpr(ITEM_FIELDS)
_RUN_FIELDS = tl.constexpr(RUN_FIELDS)
# Decided when triton was imported: its own library functions are interpreted or compiled for good.
INTERPRETED = not isinstance(tl.max, triton.JITFunction)


@triton.jit(do_not_specialize=["layer", "window"])
def segment_partials(  # noqa: PLR0915 - one kernel is one loop with what it carries
    records,
    q,
    cosines,
    sines,
    items,
    runs,
    rows,
    turns,
    limits,
    reaches,
    outs,
    lses,
    layer,
    window,
    scale_log2,
    q_head_stride,
    q_row_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WINDOWED: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
):
    """Partial output and log-sum-exp of one item for one KV head.

    Args:
        records: The arena, [slots, 2 * KV_HEADS * HEAD_DIM].
        q: Queries of the step after the model's RoPE.
        cosines: float32 [turns, ROTARY_DIM]; `sines` likewise, signed for the rotation's direction.
        sines: See `cosines`.
        items: Tables of the step, int32; see `triton_plan`. So are those up to `reaches`.
        runs: See `items`.
        rows: See `items`.
        turns: See `items`.
        limits: See `items`.
        reaches: See `items`.
        outs: float32 [partials, heads, HEAD_DIM], written where a row saw a key.
        lses: float32 [partials, heads], written for every row; -inf where it saw none.
        layer: Layer of the model.
        window: Tokens of the sliding window; read only when WINDOWED.
        scale_log2: Scale of the scores times log2(e).
        q_head_stride: Elements from one head to the next in `q`.
        q_row_stride: Elements from one row to the next in `q`.
        KV_HEADS: KV heads.
        GROUP: Query heads of a KV head.
        HEAD_DIM: Elements of a head.
        BLOCK_DIM: HEAD_DIM or the next power of two.
        ROTARY_DIM: Elements of a head that turn; 0 when the layer has no rotation.
        INTERLEAVED: Pairs are neighbours; else they are half of ROTARY_DIM apart.
        WINDOWED: The layer has a sliding window.
        FLOAT32_DOT: Multiply in float32 whatever the storage; for the interpreter, whose bfloat16 product is wrong.
        TILE_ROWS: Lines of a tile: stacked rows times GROUP, rounded up.
        TILE_KEYS: Keys read at a time.
    """
    program = tl.program_id(0)
    kv_head = program % KV_HEADS
    item = items + program // KV_HEADS * _ITEM_FIELDS
    count = tl.load(item + 3)
    if count == 0:
        return
    run_begin = tl.load(item)
    run_end = tl.load(item + 1)
    row_first = tl.load(item + 2)
    partial_first = tl.load(item + 4)

    lines = tl.arange(0, TILE_ROWS)
    columns = tl.arange(0, BLOCK_DIM)
    row_of_item = lines // GROUP
    # Lines past the last whole row of a tile count as rows past the item's last one.
    alive = row_of_item < count
    head = kv_head * GROUP + lines % GROUP
    within = (columns < HEAD_DIM)[None, :]
    peak = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    out = tl.zeros([TILE_ROWS, BLOCK_DIM], tl.float32)
    for run in range(run_begin, run_end):
        run_at = runs + run * _RUN_FIELDS
        first = tl.load(run_at).to(tl.int64) + layer * tl.load(run_at + 1).to(tl.int64)
        begin = tl.load(run_at + 2)
        end = tl.load(run_at + 3)
        stacked = tl.load(run_at + 4) + row_first + row_of_item
        # The loop's bounds come from the run alone, so that its first loads wait for nothing else. A tile that begins
        # where the window does may reach past the run's end, into keys of the next one.
        limit = tl.minimum(tl.load(limits + stacked, mask=alive, other=0), end)
        lowest = tl.zeros([TILE_ROWS], tl.int32)
        if WINDOWED:
            lowest = tl.load(reaches + stacked, mask=alive, other=0) - window + 1
            begin = tl.maximum(begin, tl.min(tl.where(alive, lowest, end), axis=0))
        # Read anew for each run, though they are the same rows: kept, they would push `out` out of the registers.
        query_row = tl.load(rows + stacked, mask=alive, other=0).to(tl.int64)
        query_at = q + query_row * q_row_stride + head.to(tl.int64) * q_head_stride
        query = tl.load(query_at[:, None] + columns[None, :], mask=alive[:, None] & within, other=0.0)
        if ROTARY_DIM > 0:
            turn = tl.load(turns + stacked, mask=alive, other=0)
            query = _turned(query, query_at, turn, alive, columns, cosines, sines, ROTARY_DIM, INTERLEAVED)
        if FLOAT32_DOT:
            query = query.to(tl.float32)

        keys_at = records + first * (2 * KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
        for start in range(begin, end, TILE_KEYS):
            key = start + tl.arange(0, TILE_KEYS)
            tile_at = keys_at + key.to(tl.int64)[:, None] * (2 * KV_HEADS * HEAD_DIM) + columns[None, :]
            tile_mask = (key < end)[:, None] & within
            keys = tl.load(tile_at, mask=tile_mask, other=0.0)
            if FLOAT32_DOT:
                keys = keys.to(tl.float32)
            scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale_log2
            visible = key[None, :] < limit[:, None]
            if WINDOWED:
                visible = visible & (key[None, :] >= lowest[:, None])
            scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            # A row that has seen nothing yet stays at -inf; it must not become -inf minus -inf.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - shift[:, None])
            shrink = tl.exp2(peak - shift)
            total = total * shrink + tl.sum(weights, axis=1)
            values = tl.load(tile_at + KV_HEADS * HEAD_DIM, mask=tile_mask, other=0.0)
            weights = weights.to(values.dtype)
            if FLOAT32_DOT:
                weights = weights.to(tl.float32)
                values = values.to(tl.float32)
            out = tl.dot(weights, values, out * shrink[:, None], input_precision="ieee")
            peak = higher

    seen = total > 0.0
    whole = tl.where(seen, total, 1.0)
    partial = (partial_first + row_of_item).to(tl.int64) * (KV_HEADS * GROUP) + head
    tl.store(lses + partial, tl.where(seen, peak + tl.log2(whole), float("-inf")), mask=alive)
    out_at = outs + partial[:, None] * HEAD_DIM + columns[None, :]
    tl.store(out_at, out / whole[:, None], mask=(alive & seen)[:, None] & within)


@triton.jit
def _turned(query, query_at, turn, alive, columns, cosines, sines, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Queries turned in float32, rounded to their own type: each element with its pair's, read once more."""
    if INTERLEAVED:
        pair = columns ^ 1
        sign = tl.where(columns % 2 == 0, -1.0, 1.0)
    else:
        pair = tl.where(columns < ROTARY_DIM // 2, columns + ROTARY_DIM // 2, columns - ROTARY_DIM // 2)
        sign = tl.where(columns < ROTARY_DIM // 2, -1.0, 1.0)
    turning = alive[:, None] & (columns < ROTARY_DIM)[None, :]
    angle_at = turn[:, None] * ROTARY_DIM + columns[None, :]
    cosine = tl.load(cosines + angle_at, mask=turning, other=1.0)
    sine = tl.load(sines + angle_at, mask=turning, other=0.0)
    other = tl.load(query_at[:, None] + pair[None, :], mask=turning, other=0.0).to(tl.float32)
    return (query.to(tl.float32) * cosine + other * sign[None, :] * sine).to(query.dtype)


@triton.jit
def merge_rows(
    outs,
    lses,
    offsets,
    members,
    merged,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE_PARTIALS: tl.constexpr,
):
    """Merges the partials of one query row and head by log-sum-exp; zeros for a row that saw no key.

    Args:
        outs: float32 [partials, HEADS, HEAD_DIM]; not read where the log-sum-exp is -inf.
        lses: float32 [partials, HEADS], base 2.
        offsets: int32 [rows + 1].
        members: int32 [partials].
        merged: [rows, HEADS, HEAD_DIM] of the queries' dtype.
        HEADS: Query heads.
        HEAD_DIM: Elements of a head.
        BLOCK_DIM: HEAD_DIM or the next power of two.
        TILE_PARTIALS: Partials read at a time.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK_DIM)
    within = columns < HEAD_DIM
    peak = float("-inf")
    total = 0.0
    out = tl.zeros([BLOCK_DIM], tl.float32)
    end = tl.load(offsets + row + 1)
    for start in range(tl.load(offsets + row), end, TILE_PARTIALS):
        at = start + tl.arange(0, TILE_PARTIALS)
        partial = tl.load(members + at, mask=at < end, other=0).to(tl.int64) * HEADS + head
        lse = tl.load(lses + partial, mask=at < end, other=float("-inf"))
        seen = (lse > float("-inf"))[:, None] & within[None, :]
        part = tl.load(outs + partial[:, None] * HEAD_DIM + columns[None, :], mask=seen, other=0.0)
        higher = tl.maximum(peak, tl.max(lse, axis=0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(lse - shift)
        shrink = tl.exp2(peak - shift)
        total = total * shrink + tl.sum(weights, axis=0)
        out = out * shrink + tl.sum(part * weights[:, None], axis=0)
        peak = higher
    out = out / tl.where(total > 0.0, total, 1.0)
    at = (row.to(tl.int64) * HEADS + head) * HEAD_DIM + columns
    tl.store(merged + at, out.to(merged.dtype.element_ty), mask=within)
