"""Attention to a key/value cache: split over the keys, merged in a second kernel (flash decoding).

A few queries meet a long cache, so the rows of a tile are all the queries of all the heads that
share a key head, and every split of the keys is a program of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops._triton.primitives import dot
from fmkernels.ops.attention.triton_tiles import (
    LN_2,
    LOG2_E,
    NEGATIVE_INFINITY,
    Scoring,
    hide,
    score_tile,
)


@triton.jit
def _cache_rows(
    cache_ptr, strides, table_ptr, table_stride, batch, head, positions, held, PAGE, PAGES
):
    """Pointers (N, 1) to the cache's rows at ``positions``; strides are those of page, head, row.

    held: which positions are in the cache; the page table may hold anything elsewhere.
    """
    page = tl.zeros_like(positions) + batch
    row = positions
    if table_ptr is not None:
        page = tl.load(table_ptr + batch * table_stride + positions // PAGE, mask=held, other=0)
        page = tl.minimum(tl.maximum(page, 0), PAGES - 1)
        row = positions % PAGE
    offset = page.to(tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    return cache_ptr + (offset + row.to(tl.int64) * strides[2])[:, None]


@triton.jit(
    do_not_specialize=[
        "num_queries",
        "capacity",
        "page_size",
        "num_pages",
        "left",
        "right",
        "splits",
    ]
)
def attention_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    table_ptr,
    slopes_ptr,
    sinks_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    q_strides,  # batch, head, row
    k_strides,  # batch or page, head, row
    v_strides,
    table_stride,
    slope_strides,  # batch, head
    num_queries,
    capacity,
    page_size,
    num_pages,
    left,
    right,
    scale,
    softcap,
    splits,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: one split of the keys for BLOCK_M (query, head) pairs of one shared head.

    acc: (B, H, M, splits, E) fp32, not normalised; max and sum: (B, H, M, splits), base 2.
    """
    rows_of_head = num_queries * GROUP
    blocks = tl.cdiv(rows_of_head, BLOCK_M)
    pid = tl.program_id(0)
    split = pid % splits
    block = pid // splits % blocks
    shared_head = pid // splits // blocks % (HEADS // GROUP)
    batch = pid // splits // blocks // (HEADS // GROUP)

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows_of_head
    query = row // GROUP
    head = shared_head * GROUP + row % GROUP
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), capacity)
    position = length - num_queries + query
    lanes = tl.arange(0, BLOCK_D)
    value_lanes = tl.arange(0, BLOCK_E)
    offset = tl.cast(batch, tl.int64) * q_strides[0] + head.to(tl.int64) * q_strides[1]
    offset = offset + query.to(tl.int64) * q_strides[2]
    q = tl.load(
        q_ptr + offset[:, None] + lanes[None, :],
        mask=inside[:, None] & (lanes < HEAD_DIM)[None, :],
        other=0.0,
    )
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(
            slopes_ptr + batch * slope_strides[0] + head * slope_strides[1], mask=inside, other=0.0
        )[:, None]
    scoring = Scoring(scale, softcap, slope, left, right, length)

    low = 0
    if left is not None:
        first_position = length - num_queries + block * BLOCK_M // GROUP
        low = tl.maximum(first_position - left, 0) // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(tl.maximum(length - low, 0), BLOCK_N), splits) * BLOCK_N
    low = low + split * share
    high = tl.minimum(low + share, length)

    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    running_max = tl.full((BLOCK_M,), NEGATIVE_INFINITY, tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    if sinks_ptr is not None:
        # The first split's: one more logit, of a key without a value.
        sinks = tl.load(sinks_ptr + head, mask=inside, other=0.0) * LOG2_E
        running_max = tl.where(split == 0, sinks, NEGATIVE_INFINITY)
        running_sum = tl.where(running_max == NEGATIVE_INFINITY, 0.0, 1.0)
    for n in tl.range(low, high, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        held = columns < length
        k_rows = _cache_rows(
            k_ptr, k_strides, table_ptr, table_stride, batch, shared_head, columns, held,
            page_size, num_pages,
        )  # fmt: skip
        v_rows = _cache_rows(
            v_ptr, v_strides, table_ptr, table_stride, batch, shared_head, columns, held,
            page_size, num_pages,
        )  # fmt: skip
        k = tl.load(
            k_rows + lanes[None, :],
            mask=held[:, None] & (lanes < HEAD_DIM)[None, :],
            other=0.0,
        )
        v = tl.load(
            v_rows + value_lanes[None, :],
            mask=held[:, None] & (value_lanes < VALUE_DIM)[None, :],
            other=0.0,
        )
        products = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        scores, _ = score_tile(products, position[:, None], columns[None, :], scoring)
        scores = hide(scores, position[:, None], columns[None, :], scoring)
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        pivot = tl.where(new_max == NEGATIVE_INFINITY, 0.0, new_max)
        weights = tl.exp2(scores - pivot[:, None])
        decay = tl.exp2(running_max - pivot)
        running_sum = running_sum * decay + tl.sum(weights, 1)
        acc = dot(weights.to(v.dtype), v, acc * decay[:, None], PRECISION)
        running_max = new_max
    lse_row = (tl.cast(batch * HEADS, tl.int64) + head) * num_queries + query
    part = lse_row * splits + split
    tl.store(max_ptr + part, running_max, mask=inside)
    tl.store(sum_ptr + part, running_sum, mask=inside)
    tl.store(
        acc_ptr + (part * VALUE_DIM)[:, None] + value_lanes[None, :],
        acc,
        mask=inside[:, None] & (value_lanes < VALUE_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["num_queries", "splits"])
def attention_merge_kernel(
    acc_ptr,
    max_ptr,
    sum_ptr,
    out_ptr,
    lse_ptr,
    out_strides,  # batch, head, row
    num_queries,
    splits,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program: the splits of one query and head become its output and lse."""
    lse_row = tl.cast(tl.program_id(0), tl.int64)
    query = lse_row % num_queries
    head = lse_row // num_queries % HEADS
    batch = lse_row // num_queries // HEADS
    part = tl.arange(0, SPLITS)
    lanes = tl.arange(0, BLOCK_E)
    known = part < splits
    maxima = tl.load(max_ptr + lse_row * splits + part, mask=known, other=NEGATIVE_INFINITY)
    sums = tl.load(sum_ptr + lse_row * splits + part, mask=known, other=0.0)
    acc = tl.load(
        acc_ptr + (lse_row * splits + part)[:, None] * VALUE_DIM + lanes[None, :],
        mask=known[:, None] & (lanes < VALUE_DIM)[None, :],
        other=0.0,
    )
    maximum = tl.max(maxima, 0)
    pivot = tl.where(maximum == NEGATIVE_INFINITY, 0.0, maximum)
    factors = tl.exp2(maxima - pivot)
    total = tl.sum(sums * factors, 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    out = tl.sum(acc * factors[:, None], 0) / divisor
    offset = batch * out_strides[0] + head * out_strides[1] + query * out_strides[2]
    tl.store(out_ptr + offset + lanes, out.to(out_ptr.dtype.element_ty), mask=lanes < VALUE_DIM)
    lse = tl.where(total == 0.0, NEGATIVE_INFINITY, (pivot + tl.log2(divisor)) * LN_2)
    tl.store(lse_ptr + lse_row, lse)


@triton.jit(do_not_specialize=["new_rows", "capacity", "page_size", "num_pages"])
def attention_append_kernel(
    new_ptr,
    cache_ptr,
    lengths_ptr,
    table_ptr,
    new_strides,  # batch, head, row, feature
    cache_strides,  # batch or page, head, row, feature
    table_stride,
    heads,
    new_rows,
    capacity,
    page_size,
    num_pages,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """BLOCK_M rows of one head go to the end of their sequence; none past the capacity."""
    blocks = tl.cdiv(new_rows, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // blocks % heads
    batch = pid // blocks // heads
    rows = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, COLUMNS)
    positions = tl.load(lengths_ptr + batch) + rows
    fits = (rows < new_rows) & (positions >= 0) & (positions < capacity)
    page = tl.zeros_like(positions) + batch
    row = positions
    if table_ptr is not None:
        page = tl.load(
            table_ptr + batch * table_stride + positions // page_size, mask=fits, other=0
        )
        fits = fits & (page >= 0) & (page < num_pages)
        row = positions % page_size
    source = tl.cast(batch, tl.int64) * new_strides[0] + tl.cast(head, tl.int64) * new_strides[1]
    source = source + rows.to(tl.int64) * new_strides[2]
    target = page.to(tl.int64) * cache_strides[0] + tl.cast(head, tl.int64) * cache_strides[1]
    target = target + row.to(tl.int64) * cache_strides[2]
    mask = fits[:, None] & (columns < WIDTH)[None, :]
    values = tl.load(
        new_ptr + source[:, None] + columns[None, :] * new_strides[3], mask=mask, other=0.0
    )
    tl.store(cache_ptr + target[:, None] + columns[None, :] * cache_strides[3], values, mask=mask)
