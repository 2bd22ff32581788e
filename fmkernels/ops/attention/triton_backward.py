"""Flash attention backward: row sums, then keys and values, then queries (Dao et al. 2022, B.4).

Every gradient is summed by one program in a fixed order, so the same inputs give the same bits.
With p the weights, dp = dout v^T (dropped and rescaled like p was) and
delta = rowsum(dout * out) - dlse, the gradient of a score is ``ds = p * (dp - delta)``. As out is
rounded, delta is only as exact as its dtype: see :func:`_row_gradients`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops._triton.primitives import dot
from fmkernels.ops.attention.triton_forward import key_range
from fmkernels.ops.attention.triton_rows import held_rows, row_products, take_rows
from fmkernels.ops.attention.triton_tiles import (
    LOG2_E,
    NEGATIVE_INFINITY,
    POSITIVE_INFINITY,
    Scoring,
    add_mask,
    count_blocks,
    hide,
    keep_tile,
    load_dropout,
    load_mask_base,
    load_rows,
    load_slope,
    matrix_at,
    other_span,
    place_block,
    score_tile,
    store_rows,
)


@triton.jit(do_not_specialize=["num_queries", "num_sequences"])
def attention_bwd_preprocess_kernel(
    dout_ptr,
    out_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    dout_strides,  # batch, head, row
    out_strides,
    num_queries,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta, like lse: contiguous, fp32."""
    blocks = tl.cdiv(num_queries, BLOCK_M)
    pid = tl.program_id(0)
    head = pid // blocks % HEADS
    batch = pid // blocks // HEADS
    first_query = pid % blocks * BLOCK_M
    dout_base = matrix_at(dout_ptr, dout_strides, batch, head, 0)
    out_base = matrix_at(out_ptr, out_strides, batch, head, 0)
    dout = load_rows(
        dout_base, first_query, dout_strides[2], num_queries, VALUE_DIM, BLOCK_M, BLOCK_E
    )
    out = load_rows(
        out_base, first_query, out_strides[2], num_queries, VALUE_DIM, BLOCK_M, BLOCK_E
    )
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    rows = first_query + tl.arange(0, BLOCK_M)
    inside = rows < num_queries
    start = tl.cast(pid // blocks, tl.int64) * num_queries
    lse = tl.load(lse_ptr + start + rows, mask=inside, other=NEGATIVE_INFINITY)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + start + rows, mask=inside, other=0.0)
    # A row without a visible key passes no gradient on, whatever comes in.
    delta = tl.where(lse == NEGATIVE_INFINITY, 0.0, delta)
    tl.store(delta_ptr + start + rows, delta, mask=inside)


@triton.jit
def row_statistics(lse_base, delta_base, first_query, num_queries, BLOCK_M: tl.constexpr):
    """Base-2 lse, +inf (so that all weights are 0) for rows past the end or empty, and delta."""
    rows = first_query + tl.arange(0, BLOCK_M)
    inside = rows < num_queries
    lse = tl.load(lse_base + rows, mask=inside, other=NEGATIVE_INFINITY)
    lse = tl.where(lse == NEGATIVE_INFINITY, POSITIVE_INFINITY, lse * LOG2_E)
    return lse, tl.load(delta_base + rows, mask=inside, other=0.0)


@triton.jit(
    do_not_specialize=["num_queries", "num_keys", "num_sequences", "left", "right", "threshold"]
)
def attention_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    mask_ptr,
    slopes_ptr,
    cu_q_ptr,
    cu_k_ptr,
    seed_ptr,
    dk_ptr,
    dv_ptr,
    q_strides,  # batch, head, row
    k_strides,
    v_strides,
    dout_strides,
    mask_strides,  # batch, head, query, key
    slope_strides,  # sequence, head
    dk_strides,
    dv_strides,
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
    CHUNK: tl.constexpr = 0,
):
    """One program: dk and dv of BLOCK_N keys of one shared head, over the queries that see them.

    Scores are held transposed, (BLOCK_N, BLOCK_M), so that both products take them as they are.
    lse and delta: (B, H, M), contiguous. CHUNK: see row_products.
    """
    blocks = count_blocks(num_keys, num_sequences, BLOCK_N, SEQUENCES)
    pid = tl.program_id(0)
    shared_head = pid // blocks % (HEADS // GROUP)
    keys, first_key = place_block(
        cu_k_ptr, pid % blocks, pid // blocks // (HEADS // GROUP), num_keys, num_sequences,
        BLOCK_N, SEQUENCES,
    )  # fmt: skip
    if first_key >= keys.count:
        return
    queries = other_span(cu_q_ptr, keys, num_queries, SEQUENCES)
    dropout = load_dropout(seed_ptr, threshold, keep_factor)
    k_base = matrix_at(k_ptr, k_strides, keys.batch, shared_head, keys.first)
    v_base = matrix_at(v_ptr, v_strides, keys.batch, shared_head, keys.first)
    k = take_rows(k_base, first_key, k_strides[2], keys.count, HEAD_DIM, BLOCK_N, BLOCK_D, CHUNK)
    v = take_rows(v_base, first_key, v_strides[2], keys.count, VALUE_DIM, BLOCK_N, BLOCK_E, CHUNK)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    low = 0
    high = queries.count
    if right is not None:
        low = tl.maximum(first_key - right, 0) // BLOCK_M * BLOCK_M
    if left is not None:
        high = tl.minimum(high, first_key + BLOCK_N + left)
    rows = tl.arange(0, BLOCK_M)[None, :]
    columns = tl.arange(0, BLOCK_N)[:, None]
    for member in tl.range(0, GROUP):
        head = shared_head * GROUP + member
        slope = load_slope(slopes_ptr, slope_strides, keys.sequence, head)
        scoring = Scoring(scale, softcap, slope, left, right, keys.count)
        mask = load_mask_base(mask_ptr, mask_strides, queries, head)
        q_base = matrix_at(q_ptr, q_strides, queries.batch, head, queries.first)
        dout_base = matrix_at(dout_ptr, dout_strides, queries.batch, head, queries.first)
        first_lse = tl.cast(queries.batch * HEADS + head, tl.int64) * num_queries + queries.first
        for m in tl.range(low, high, BLOCK_M):
            q = take_rows(
                q_base, m, q_strides[2], queries.count, HEAD_DIM, BLOCK_M, BLOCK_D, CHUNK
            )
            dout = take_rows(
                dout_base, m, dout_strides[2], queries.count, VALUE_DIM, BLOCK_M, BLOCK_E, CHUNK
            )
            lse, delta = row_statistics(
                lse_ptr + first_lse, delta_ptr + first_lse, m, queries.count, BLOCK_M
            )
            products = row_products(k, q, HEAD_DIM, BLOCK_N, BLOCK_M, CHUNK, PRECISION)
            scores, derivative = score_tile(products, m + rows, first_key + columns, scoring)
            if mask_ptr is not None:
                scores = add_mask(
                    scores, mask, m, first_key, rows, columns, queries.count, keys.count
                )
            scores = hide(scores, m + rows, first_key + columns, scoring)
            weights = tl.exp2(scores - lse[None, :])
            dweights = row_products(v, dout, VALUE_DIM, BLOCK_N, BLOCK_M, CHUNK, PRECISION)
            dropped = weights
            if seed_ptr is not None:
                kept = tl.trans(keep_tile(dropout, first_lse + m, first_key, BLOCK_M, BLOCK_N))
                dropped = tl.where(kept, weights * keep_factor, 0.0)
                dweights = tl.where(kept, dweights * keep_factor, 0.0)
            dout_tile = held_rows(dout, VALUE_DIM, BLOCK_M, BLOCK_E)
            dv = dot(dropped.to(dout_tile.dtype), dout_tile, dv, PRECISION)
            dproducts = weights * (dweights - delta[None, :]) * derivative
            q_tile = held_rows(q, HEAD_DIM, BLOCK_M, BLOCK_D)
            dk = dot(dproducts.to(q_tile.dtype), q_tile, dk, PRECISION)
    dk_base = matrix_at(dk_ptr, dk_strides, keys.batch, shared_head, keys.first)
    dv_base = matrix_at(dv_ptr, dv_strides, keys.batch, shared_head, keys.first)
    store_rows(
        dk_base, dk * scale, first_key, dk_strides[2], keys.count, HEAD_DIM, BLOCK_N, BLOCK_D
    )
    store_rows(dv_base, dv, first_key, dv_strides[2], keys.count, VALUE_DIM, BLOCK_N, BLOCK_E)


@triton.jit
def score_gradient(
    q,  # Rows: BLOCK_M of HEAD_DIM features
    k,  # BLOCK_N of HEAD_DIM
    v,  # BLOCK_N of VALUE_DIM
    dout,  # BLOCK_M of VALUE_DIM
    lse,
    delta,
    first_query,
    first_key,
    num_queries,
    first_lse,  # index of the first query in lse
    scoring,
    mask,
    dropout,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The weights of a tile, the gradient of its scores (that is, of the mask), and the softcap's
    derivative."""
    rows = tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    products = row_products(q, k, HEAD_DIM, BLOCK_M, BLOCK_N, CHUNK, PRECISION)
    scores, derivative = score_tile(products, first_query + rows, first_key + columns, scoring)
    if mask[0] is not None:
        scores = add_mask(
            scores, mask, first_query, first_key, rows, columns, num_queries, scoring.num_keys
        )
    scores = hide(scores, first_query + rows, first_key + columns, scoring)
    weights = tl.exp2(scores - lse[:, None])
    dweights = row_products(dout, v, VALUE_DIM, BLOCK_M, BLOCK_N, CHUNK, PRECISION)
    if dropout.seed is not None:
        kept = keep_tile(dropout, first_lse, first_key, BLOCK_M, BLOCK_N)
        dweights = tl.where(kept, dweights * dropout.factor, 0.0)
    return weights, weights * (dweights - delta[:, None]), derivative


@triton.jit
def _row_gradients(
    weight,  # sums over the keys: p,
    weight_distance,  # p times the distance beyond the nearest key's,
    grad,  # p * (dp - delta)
    grad_distance,  # and that times this distance
    nearest,
    lse,  # as from row_statistics
    delta,
    dlse,
    sink,  # None: there are none
):
    """The gradients of each row's slope and of its sink.

    delta is replaced by what the same weights give, exact = rowsum(p * dp) - dlse, for its error
    would be multiplied by every distance. Weights and the sink's share of the softmax are divided
    by their sum, for a rounded lse is a factor that all have in common.
    """
    share = tl.zeros_like(weight)
    if sink is not None:
        share = tl.exp2(sink * LOG2_E - lse)
    total = weight + share
    total = tl.where(total > 0.0, total, 1.0)  # a row without a visible key: all sums are 0
    excess = (delta * share - grad) / total + dlse  # delta - exact
    dsink = (excess - delta) * (share / total)
    dslope = -((grad_distance + excess * weight_distance) / total + nearest * (dlse - dsink))
    return dslope, dsink


@triton.jit(
    do_not_specialize=["num_queries", "num_keys", "num_sequences", "left", "right", "threshold"]
)
def attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    mask_ptr,
    slopes_ptr,
    sinks_ptr,
    cu_q_ptr,
    cu_k_ptr,
    seed_ptr,
    dq_ptr,
    dmask_ptr,
    dslopes_ptr,
    dsinks_ptr,
    q_strides,  # batch, head, row
    k_strides,
    v_strides,
    dout_strides,
    mask_strides,  # batch, head, query, key
    slope_strides,  # sequence, head
    dq_strides,
    dmask_strides,
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
    CHUNK: tl.constexpr = 0,
):
    """One program: dq of BLOCK_M queries of one head.

    With dmask_ptr also the gradient of their part of a mask that is not broadcast (zeroed before:
    hidden blocks are skipped); with dslopes_ptr and dsinks_ptr their shares of these gradients,
    one number per row: (B, H, M) like lse. dlse_ptr and sinks_ptr serve these two alone. CHUNK:
    see row_products.
    """
    ROW_SUMS: tl.constexpr = dslopes_ptr is not None or dsinks_ptr is not None
    blocks = count_blocks(num_queries, num_sequences, BLOCK_M, SEQUENCES)
    pid = tl.program_id(0)
    head = pid // blocks % HEADS
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
    dout_base = matrix_at(dout_ptr, dout_strides, queries.batch, head, queries.first)
    first_lse = tl.cast(queries.batch * HEADS + head, tl.int64) * num_queries + queries.first
    q = take_rows(
        q_base, first_query, q_strides[2], queries.count, HEAD_DIM, BLOCK_M, BLOCK_D, CHUNK
    )
    dout = take_rows(
        dout_base, first_query, dout_strides[2], queries.count, VALUE_DIM, BLOCK_M, BLOCK_E, CHUNK
    )
    lse, delta = row_statistics(
        lse_ptr + first_lse, delta_ptr + first_lse, first_query, queries.count, BLOCK_M
    )
    rows = first_query + tl.arange(0, BLOCK_M)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    weight_distance = tl.zeros((BLOCK_M,), tl.float32)
    grad = tl.zeros((BLOCK_M,), tl.float32)
    grad_distance = tl.zeros((BLOCK_M,), tl.float32)
    nearest = tl.maximum(rows - (keys.count - 1), 0)
    low, high, _ = key_range(first_query, scoring, BLOCK_M, BLOCK_N)
    for n in tl.range(low, high, BLOCK_N):
        k = take_rows(k_base, n, k_strides[2], keys.count, HEAD_DIM, BLOCK_N, BLOCK_D, CHUNK)
        v = take_rows(v_base, n, v_strides[2], keys.count, VALUE_DIM, BLOCK_N, BLOCK_E, CHUNK)
        weights, dscores, derivative = score_gradient(
            q, k, v, dout, lse, delta, first_query, n, queries.count, first_lse + first_query,
            scoring, mask, dropout, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, CHUNK, PRECISION,
        )  # fmt: skip
        columns = n + tl.arange(0, BLOCK_N)
        if dmask_ptr is not None:
            dmask_base = matrix_at(dmask_ptr, dmask_strides, queries.batch, head, first_query)
            offsets = tl.arange(0, BLOCK_M)[:, None] * dmask_strides[2] + columns[None, :]
            inside = (rows < queries.count)[:, None] & (columns < keys.count)[None, :]
            tl.store(dmask_base + offsets, dscores.to(dmask_ptr.dtype.element_ty), mask=inside)
        if dslopes_ptr is not None:
            distance = tl.abs(rows[:, None] - columns[None, :]) - nearest[:, None]
            weight_distance += tl.sum(weights * distance, 1)
            grad_distance += tl.sum(dscores * distance, 1)
        if ROW_SUMS:
            weight += tl.sum(weights, 1)
            grad += tl.sum(dscores, 1)
        k_tile = held_rows(k, HEAD_DIM, BLOCK_N, BLOCK_D)
        dq = dot((dscores * derivative).to(k_tile.dtype), k_tile, dq, PRECISION)
    dq_base = matrix_at(dq_ptr, dq_strides, queries.batch, head, queries.first)
    store_rows(
        dq_base, dq * scale, first_query, dq_strides[2], queries.count, HEAD_DIM, BLOCK_M, BLOCK_D
    )
    if ROW_SUMS:
        inside = rows < queries.count
        dlse, sink = 0.0, None
        if dlse_ptr is not None:
            # A row without a visible key passes no gradient on.
            given = inside & (lse != POSITIVE_INFINITY)
            dlse = tl.load(dlse_ptr + first_lse + rows, mask=given, other=0.0)
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head)
        dslope, dsink = _row_gradients(
            weight, weight_distance, grad, grad_distance, nearest, lse, delta, dlse, sink
        )
        if dslopes_ptr is not None:
            tl.store(dslopes_ptr + first_lse + rows, dslope, mask=inside)
        if dsinks_ptr is not None:
            tl.store(dsinks_ptr + first_lse + rows, dsink, mask=inside)
