"""Flash attention forward (Dao et al. 2022; online softmax of Milakov and Gimelshein 2018)."""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops._triton.primitives import dot
from fmkernels.ops.attention.triton_tiles import (
    LN_2,
    LOG2_E,
    NEGATIVE_INFINITY,
    Scoring,
    add_mask,
    count_blocks,
    hide,
    keep_tile,
    load_dropout,
    load_mask_base,
    load_rows,
    load_slope,
    load_whole_rows,
    matrix_at,
    other_span,
    place_block,
    score_tile,
    store_rows,
)


@triton.jit
def _attend(
    state,  # weighted values (BLOCK_M, BLOCK_E), running maximum and sum (BLOCK_M)
    q,  # (BLOCK_M, BLOCK_D)
    k_base,
    v_base,
    k_stride,
    v_stride,
    first_key,
    last_key,
    first_query,
    num_queries,
    first_lse,  # index of the first query in lse
    scoring,
    mask,
    dropout,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Keys [first_key, last_key) join the online softmax; EDGE: some of them may be hidden."""
    acc, running_max, running_sum = state
    rows = tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    for n in tl.range(first_key, last_key, BLOCK_N):
        if EDGE:
            k = load_rows(k_base, n, k_stride, scoring.num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
            v = load_rows(v_base, n, v_stride, scoring.num_keys, VALUE_DIM, BLOCK_N, BLOCK_E)
        else:
            k = load_whole_rows(k_base, n, k_stride, HEAD_DIM, BLOCK_N, BLOCK_D)
            v = load_whole_rows(v_base, n, v_stride, VALUE_DIM, BLOCK_N, BLOCK_E)
        products = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        scores, _ = score_tile(products, first_query + rows, n + columns, scoring)
        if mask[0] is not None:
            scores = add_mask(
                scores, mask, first_query, n, rows, columns, num_queries, scoring.num_keys
            )
        if EDGE:
            scores = hide(scores, first_query + rows, n + columns, scoring)
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        # A row that has seen no key yet: subtract 0, because -inf - -inf would be NaN.
        pivot = tl.where(new_max == NEGATIVE_INFINITY, 0.0, new_max)
        weights = tl.exp2(scores - pivot[:, None])
        decay = tl.exp2(running_max - pivot)
        running_sum = running_sum * decay + tl.sum(weights, 1)
        if dropout.seed is not None:
            kept = keep_tile(dropout, first_lse, n, BLOCK_M, BLOCK_N)
            weights = tl.where(kept, weights, 0.0)
        acc = acc * decay[:, None]
        acc = dot(weights.to(v.dtype), v, acc, PRECISION)
        running_max = new_max
    return acc, running_max, running_sum


@triton.jit
def key_range(first_query, scoring, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys that BLOCK_M queries can see at all, and up to where (from 0) each sees every one."""
    low = 0
    high = scoring.num_keys
    whole = scoring.num_keys
    if scoring.right is not None:
        beyond = first_query + scoring.right + 1
        whole = tl.minimum(whole, beyond)
        high = tl.minimum(high, beyond + BLOCK_M - 1)
    if scoring.left is not None:
        low = tl.maximum(first_query - scoring.left, 0) // BLOCK_N * BLOCK_N
    return low, tl.maximum(high, 0), tl.maximum(whole, 0) // BLOCK_N * BLOCK_N


@triton.jit(
    do_not_specialize=["num_queries", "num_keys", "num_sequences", "left", "right", "threshold"]
)
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    mask_ptr,
    slopes_ptr,
    sinks_ptr,
    cu_q_ptr,
    cu_k_ptr,
    seed_ptr,
    q_strides,  # batch, head, row
    k_strides,
    v_strides,
    out_strides,
    lse_strides,
    mask_strides,  # batch, head, query, key
    slope_strides,  # sequence, head
    num_queries,
    num_keys,
    num_sequences,
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
    SEQUENCES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M queries of one head against all the keys they see.

    q, out: (B, H, M, D or E) and k, v: (B, H / GROUP, N, D or E) by strides, unit last stride; lse
    (B, H, M) fp32, natural logarithm. Absent options are None. SEQUENCES: 0, or for packed
    sequences (B = 1) at least their number, a power of two.
    """
    blocks = count_blocks(num_queries, num_sequences, BLOCK_M, SEQUENCES)
    pid = tl.program_id(0)
    head = pid // blocks % HEADS
    # Under a causal mask the last queries see the most keys: they start first.
    block = blocks - 1 - pid % blocks
    queries, first_query = place_block(
        cu_q_ptr, block, pid // blocks // HEADS, num_queries, num_sequences, BLOCK_M, SEQUENCES
    )
    if first_query >= queries.count:
        return
    keys = other_span(cu_k_ptr, queries, num_keys, SEQUENCES)
    slope = load_slope(slopes_ptr, slope_strides, queries.sequence, head)
    scoring = Scoring(scale, softcap, slope, left, right, keys.count)
    dropout = load_dropout(seed_ptr, threshold, keep_factor)
    mask = load_mask_base(mask_ptr, mask_strides, queries, head)
    q_base = matrix_at(q_ptr, q_strides, queries.batch, head, queries.first)
    k_base = matrix_at(k_ptr, k_strides, keys.batch, head // GROUP, keys.first)
    v_base = matrix_at(v_ptr, v_strides, keys.batch, head // GROUP, keys.first)
    lse_base = matrix_at(lse_ptr, lse_strides, queries.batch, head, queries.first)
    first_lse = tl.cast(queries.batch * HEADS + head, tl.int64) * num_queries
    first_lse = first_lse + queries.first + first_query
    q = load_rows(q_base, first_query, q_strides[2], queries.count, HEAD_DIM, BLOCK_M, BLOCK_D)

    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    running_max = tl.full((BLOCK_M,), NEGATIVE_INFINITY, tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    if sinks_ptr is not None:
        # The sink is one more logit, of a key without a value.
        running_max = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_ptr + head) * LOG2_E
        running_sum = tl.where(running_max == NEGATIVE_INFINITY, 0.0, 1.0)
    state = (acc, running_max, running_sum)
    low, high, whole = key_range(first_query, scoring, BLOCK_M, BLOCK_N)
    if left is None:
        state = _attend(
            state, q, k_base, v_base, k_strides[2], v_strides[2], 0, whole, first_query,
            queries.count, first_lse, scoring, mask, dropout, HEAD_DIM, VALUE_DIM, BLOCK_M,
            BLOCK_N, BLOCK_D, BLOCK_E, PRECISION, False,
        )  # fmt: skip
        low = whole
    state = _attend(
        state, q, k_base, v_base, k_strides[2], v_strides[2], low, high, first_query,
        queries.count, first_lse, scoring, mask, dropout, HEAD_DIM, VALUE_DIM, BLOCK_M,
        BLOCK_N, BLOCK_D, BLOCK_E, PRECISION, True,
    )  # fmt: skip
    acc, running_max, running_sum = state
    empty = running_sum == 0.0
    divisor = tl.where(empty, 1.0, running_sum)
    acc = acc / divisor[:, None]
    if seed_ptr is not None:
        acc = acc * keep_factor
    out_base = matrix_at(out_ptr, out_strides, queries.batch, head, queries.first)
    store_rows(
        out_base, acc, first_query, out_strides[2], queries.count, VALUE_DIM, BLOCK_M, BLOCK_E
    )
    lse = tl.where(empty, NEGATIVE_INFINITY, (running_max + tl.log2(divisor)) * LN_2)
    rows = first_query + tl.arange(0, BLOCK_M)
    tl.store(lse_base + rows * lse_strides[2], lse, mask=rows < queries.count)
