"""The weights of attention, or their mean over the heads, after its forward pass."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fmkernels.ops._triton.launch import launch
from fmkernels.ops._triton.primitives import dot
from fmkernels.ops.attention import triton_configs as configs
from fmkernels.ops.attention.schema import Options, empty_weights
from fmkernels.ops.attention.triton import Problem, sdpa_forward, strides_of
from fmkernels.ops.attention.triton_tiles import (
    LOG2_E,
    NEGATIVE_INFINITY,
    POSITIVE_INFINITY,
    Scoring,
    Span,
    add_mask,
    hide,
    keep_tile,
    load_dropout,
    load_mask_base,
    load_rows,
    load_slope,
    matrix_at,
    score_tile,
)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "left", "right", "threshold"])
def attention_weights_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    weights_ptr,
    mask_ptr,
    slopes_ptr,
    seed_ptr,
    q_strides,  # batch, head, row
    k_strides,
    mask_strides,  # batch, head, query, key
    slope_strides,  # batch, head
    num_queries,
    num_keys,
    left,
    right,
    scale,
    softcap,
    threshold,
    keep_factor,
    AVERAGE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: a (BLOCK_M, BLOCK_N) tile of the weights (B, H, M, N) of one head, or of their
    mean (B, M, N), for which it goes through the heads in order.

    The scores are computed anew from q (B, H, M, D) and k (B, H / GROUP, N, D), by strides with
    unit last stride, and the weights are ``exp(score - lse)``; lse (B, H, M) and the weights are
    contiguous. Absent options are None.
    """
    blocks_m, blocks_n = tl.cdiv(num_queries, BLOCK_M), tl.cdiv(num_keys, BLOCK_N)
    pid = tl.program_id(0)
    n = pid % blocks_n * BLOCK_N
    m = pid // blocks_n % blocks_m * BLOCK_M
    matrix = pid // blocks_n // blocks_m
    if AVERAGE:
        batch, first_head, end_head = matrix, matrix * 0, matrix * 0 + HEADS
    else:
        batch, first_head, end_head = matrix // HEADS, matrix % HEADS, matrix % HEADS + 1
    queries = Span(batch, batch, batch * 0, num_queries)
    dropout = load_dropout(seed_ptr, threshold, keep_factor)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    inside = m + rows < num_queries
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for head in tl.range(first_head, end_head):
        slope = load_slope(slopes_ptr, slope_strides, batch, head)
        scoring = Scoring(scale, softcap, slope, left, right, num_keys)
        mask = load_mask_base(mask_ptr, mask_strides, queries, head)
        q_base = matrix_at(q_ptr, q_strides, batch, head, 0)
        k_base = matrix_at(k_ptr, k_strides, batch, head // GROUP, 0)
        q = load_rows(q_base, m, q_strides[2], num_queries, HEAD_DIM, BLOCK_M, BLOCK_D)
        k = load_rows(k_base, n, k_strides[2], num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
        first_lse = tl.cast(batch * HEADS + head, tl.int64) * num_queries + m
        lse = tl.load(lse_ptr + first_lse + rows, mask=inside, other=NEGATIVE_INFINITY)
        # A row that sees no key has no weights: exp2(-inf - inf) instead of exp2(-inf + inf).
        lse = tl.where(lse == NEGATIVE_INFINITY, POSITIVE_INFINITY, lse * LOG2_E)
        products = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        positions, keys = m + rows[:, None], n + columns[None, :]
        scores, derivative = score_tile(products, positions, keys, scoring)
        if mask_ptr is not None:
            scores = add_mask(
                scores, mask, m, n, rows[:, None], columns[None, :], num_queries, num_keys
            )
        scores = hide(scores, positions, keys, scoring)
        weights = tl.exp2(scores - lse[:, None])
        if seed_ptr is not None:
            kept = keep_tile(dropout, first_lse, n, BLOCK_M, BLOCK_N)
            weights = tl.where(kept, weights * keep_factor, 0.0)
        total += weights
    if AVERAGE:
        total *= 1.0 / HEADS
    start = (tl.cast(matrix, tl.int64) * num_queries + m) * num_keys + n
    offsets = tl.cast(rows, tl.int64)[:, None] * num_keys + columns[None, :]
    tl.store(
        weights_ptr + start + offsets,
        total.to(weights_ptr.dtype.element_ty),
        mask=inside[:, None] & (n + columns < num_keys)[None, :],
    )


def sdpa_weights(
    query: Tensor, key: Tensor, value: Tensor, *options_and_average: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *options, average = options_and_average
    output, lse = sdpa_forward(query, key, value, *options)
    return output, weights_from_lse(query, key, lse, Options(*options), average), lse


def weights_from_lse(
    query: Tensor, key: Tensor, lse: Tensor, given: Options, average: bool
) -> Tensor:
    problem = Problem(query, key, key, given)
    weights = empty_weights(query, key, average)
    mask, mask_strides = problem.mask()
    config = problem.config(configs.FORWARD)
    tiles = triton.cdiv(problem.queries, config["BLOCK_M"])
    tiles *= triton.cdiv(problem.keys, config["BLOCK_N"])
    constants = ("HEADS", "GROUP", "HEAD_DIM", "BLOCK_D", "PRECISION")
    launch(
        attention_weights_kernel,
        (tiles * problem.batch * (1 if average else problem.heads),),
        config,
        problem.query,
        problem.key,
        lse,
        weights,
        mask,
        given.alibi_slopes,
        given.dropout_seed,
        strides_of(problem.query),
        strides_of(problem.key),
        mask_strides,
        problem.slope_strides(),
        problem.queries,
        problem.keys,
        *problem.scalars(),
        AVERAGE=average,
        **{name: problem.constants[name] for name in constants},
    )
    return weights
