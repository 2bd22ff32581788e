"""The gradient of a mask that is broadcast, the attention backward's last kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops.attention.triton_backward import row_statistics, score_gradient
from fmkernels.ops.attention.triton_rows import take_rows
from fmkernels.ops.attention.triton_tiles import Scoring, load_dropout, load_slope, matrix_at


@triton.jit(
    do_not_specialize=["num_batches", "num_queries", "num_keys", "left", "right", "threshold"]
)
def attention_bwd_dmask_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    mask_ptr,
    slopes_ptr,
    seed_ptr,
    dmask_ptr,
    q_strides,  # batch, head, row
    k_strides,
    v_strides,
    dout_strides,
    mask_strides,  # batch, head, query, key
    slope_strides,  # batch, head
    num_batches,
    num_queries,
    num_keys,
    left,
    right,
    scale,
    softcap,
    threshold,
    keep_factor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    OVER_BATCH: tl.constexpr,
    OVER_HEADS: tl.constexpr,
    OVER_QUERIES: tl.constexpr,
    OVER_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr = 0,
):
    """The gradient of a broadcast mask: dmask (batches, heads, queries, keys), contiguous, with 1
    where OVER_* says that the mask is broadcast. One program owns a tile of it and recomputes the
    scores of everything it was broadcast to, in a fixed order: no atomics, no matrix of scores.
    CHUNK: see row_products.
    """
    blocks_m = tl.cdiv(num_queries, BLOCK_M)
    blocks_n = tl.cdiv(num_keys, BLOCK_N)
    pid = tl.program_id(0)
    own_n, pid = _own(pid, blocks_n, OVER_KEYS)
    own_m, pid = _own(pid, blocks_m, OVER_QUERIES)
    own_head, pid = _own(pid, HEADS, OVER_HEADS)
    first_batch, last_batch = _extent(pid, num_batches, OVER_BATCH)
    first_head, last_head = _extent(own_head, HEADS, OVER_HEADS)
    first_m, last_m = _extent(own_m, blocks_m, OVER_QUERIES)
    first_n, last_n = _extent(own_n, blocks_n, OVER_KEYS)
    dropout = load_dropout(seed_ptr, threshold, keep_factor)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for batch in tl.range(first_batch, last_batch):
        for head in tl.range(first_head, last_head):
            slope = load_slope(slopes_ptr, slope_strides, batch, head)
            scoring = Scoring(scale, softcap, slope, left, right, num_keys)
            mask_base = matrix_at(mask_ptr, mask_strides, batch, head, 0)
            mask = (mask_base, mask_strides[2], mask_strides[3])
            q_base = matrix_at(q_ptr, q_strides, batch, head, 0)
            k_base = matrix_at(k_ptr, k_strides, batch, head // GROUP, 0)
            v_base = matrix_at(v_ptr, v_strides, batch, head // GROUP, 0)
            dout_base = matrix_at(dout_ptr, dout_strides, batch, head, 0)
            first_lse = tl.cast(batch * HEADS + head, tl.int64) * num_queries
            for block_m in tl.range(first_m, last_m):
                m = block_m * BLOCK_M
                q = take_rows(
                    q_base, m, q_strides[2], num_queries, HEAD_DIM, BLOCK_M, BLOCK_D, CHUNK
                )
                dout = take_rows(
                    dout_base, m, dout_strides[2], num_queries, VALUE_DIM, BLOCK_M, BLOCK_E, CHUNK
                )
                lse, delta = row_statistics(
                    lse_ptr + first_lse, delta_ptr + first_lse, m, num_queries, BLOCK_M
                )
                for block_n in tl.range(first_n, last_n):
                    n = block_n * BLOCK_N
                    k = take_rows(
                        k_base, n, k_strides[2], num_keys, HEAD_DIM, BLOCK_N, BLOCK_D, CHUNK
                    )
                    v = take_rows(
                        v_base, n, v_strides[2], num_keys, VALUE_DIM, BLOCK_N, BLOCK_E, CHUNK
                    )
                    _, dscores, _ = score_gradient(
                        q, k, v, dout, lse, delta, m, n, num_queries, first_lse + m, scoring,
                        mask, dropout, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, CHUNK, PRECISION,
                    )  # fmt: skip
                    total += dscores
    rows = first_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first_n * BLOCK_N + tl.arange(0, BLOCK_N)
    own_rows, own_columns = num_queries, num_keys
    if OVER_QUERIES:
        total = tl.sum(total, 0, keep_dims=True)
        rows, own_rows = tl.arange(0, 1), 1
    if OVER_KEYS:
        total = tl.sum(total, 1, keep_dims=True)
        columns, own_columns = tl.arange(0, 1), 1
    matrix = pid * (1 if OVER_HEADS else HEADS) + own_head
    start = tl.cast(matrix, tl.int64) * own_rows * own_columns
    offsets = tl.cast(rows, tl.int64)[:, None] * own_columns + columns[None, :]
    inside = (rows < own_rows)[:, None] & (columns < own_columns)[None, :]
    tl.store(dmask_ptr + start + offsets, total.to(dmask_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _own(pid, count, BROADCAST: tl.constexpr):
    """A program's own index along a dimension of ``count`` (0 if broadcast), and what is left."""
    if BROADCAST:
        return pid * 0, pid
    else:
        return pid % count, pid // count


@triton.jit
def _extent(own, count, BROADCAST: tl.constexpr):
    """The indices a program sums over: all of them where the mask is broadcast."""
    if BROADCAST:
        return own * 0, own * 0 + count
    else:
        return own, own + 1
