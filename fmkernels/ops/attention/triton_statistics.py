"""Where each query looks, and how sharply: statistics of the softmax's rows, in one pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.ops._triton.launch import launch
from fmkernels.ops._triton.primitives import dot
from fmkernels.ops.attention import triton_configs as configs
from fmkernels.ops.attention.schema import Options
from fmkernels.ops.attention.triton import Problem, strides_of
from fmkernels.ops.attention.triton_forward import key_range
from fmkernels.ops.attention.triton_tiles import (
    LN_2,
    LOG2_E,
    NEGATIVE_INFINITY,
    Scoring,
    Span,
    add_mask,
    hide,
    load_mask_base,
    load_rows,
    load_slope,
    matrix_at,
    score_tile,
)


@triton.jit
def _surprise(scores, pivot, weights):
    """``weights * (scores - pivot)``; 0, its limit, where a weight is 0."""
    return weights * tl.where(weights == 0.0, 0.0, scores - pivot)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "left", "right"])
def attention_statistics_kernel(
    q_ptr,
    k_ptr,
    entropy_ptr,
    top_key_ptr,
    top_weight_ptr,
    lse_ptr,
    mask_ptr,
    slopes_ptr,
    sinks_ptr,
    q_strides,  # batch, head, row
    k_strides,
    row_strides,  # of the four results
    mask_strides,  # batch, head, query, key
    slope_strides,  # sequence, head
    num_queries,
    num_keys,
    left,
    right,
    scale,
    softcap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M queries of one head against all the keys they see.

    q: (B, H, M, D) and k: (B, H / GROUP, N, D) by strides, unit last stride; the results
    (B, H, M), fp32 but for top_key, which is int64. Absent options are None. With s the base-2
    scores, m their running maximum and w = 2^(s - m), the entropy in bits is
    log2(sum w) - sum w (s - m) / sum w.
    """
    blocks = tl.cdiv(num_queries, BLOCK_M)
    pid = tl.program_id(0)
    head, batch = pid // blocks % HEADS, pid // blocks // HEADS
    first_query = (blocks - 1 - pid % blocks) * BLOCK_M
    queries = Span(batch, batch, batch * 0, num_queries)
    slope = load_slope(slopes_ptr, slope_strides, batch, head)
    scoring = Scoring(scale, softcap, slope, left, right, num_keys)
    mask = load_mask_base(mask_ptr, mask_strides, queries, head)
    q_base = matrix_at(q_ptr, q_strides, batch, head, 0)
    k_base = matrix_at(k_ptr, k_strides, batch, head // GROUP, 0)
    q = load_rows(q_base, first_query, q_strides[2], num_queries, HEAD_DIM, BLOCK_M, BLOCK_D)

    running_max = tl.full((BLOCK_M,), NEGATIVE_INFINITY, tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    surprise = tl.zeros((BLOCK_M,), tl.float32)  # sum of w (s - m)
    if sinks_ptr is not None:
        # The sink is one more outcome, but no key.
        running_max = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_ptr + head) * LOG2_E
        running_sum = tl.where(running_max == NEGATIVE_INFINITY, 0.0, 1.0)
    best = tl.full((BLOCK_M,), NEGATIVE_INFINITY, tl.float32)
    best_key = tl.full((BLOCK_M,), -1, tl.int32)
    rows = tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    # All by name: what a loop assigns may not change its type, and `_` would.
    low, high, whole = key_range(first_query, scoring, BLOCK_M, BLOCK_N)
    for n in tl.range(low, high, BLOCK_N):
        k = load_rows(k_base, n, k_strides[2], num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
        products = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
        scores, derivative = score_tile(products, first_query + rows, n + columns, scoring)
        if mask_ptr is not None:
            scores = add_mask(scores, mask, first_query, n, rows, columns, num_queries, num_keys)
        scores = hide(scores, first_query + rows, n + columns, scoring)
        highest = tl.max(scores, 1)
        # The first of equals: later tiles must be larger.
        better = highest > best
        best_key = tl.where(better, n + tl.argmax(scores, 1).to(tl.int32), best_key)
        best = tl.maximum(best, highest)
        new_max = tl.maximum(running_max, highest)
        # A row that has seen nothing yet: subtract 0, because -inf - -inf would be NaN.
        pivot = tl.where(new_max == NEGATIVE_INFINITY, 0.0, new_max)
        weights = tl.exp2(scores - pivot[:, None])
        decay = tl.exp2(running_max - pivot)
        surprise = surprise * decay + _surprise(running_max, pivot, decay) * running_sum
        surprise = surprise + tl.sum(_surprise(scores, pivot[:, None], weights), 1)
        running_sum = running_sum * decay + tl.sum(weights, 1)
        running_max = new_max

    empty = running_sum == 0.0
    divisor = tl.where(empty, 1.0, running_sum)
    log_sum = tl.log2(divisor)
    entropy = tl.where(empty, 0.0, (log_sum - surprise / divisor) * LN_2)
    lse = tl.where(empty, NEGATIVE_INFINITY, (running_max + log_sum) * LN_2)
    hidden = best == NEGATIVE_INFINITY
    top_weight = tl.where(hidden, 0.0, tl.exp2(best - running_max) / divisor)
    at = first_query + tl.arange(0, BLOCK_M)
    offsets = tl.cast(batch, tl.int64) * row_strides[0] + head * row_strides[1] + at
    inside = at < num_queries
    tl.store(entropy_ptr + offsets, entropy, mask=inside)
    tl.store(top_key_ptr + offsets, best_key.to(tl.int64), mask=inside)
    tl.store(top_weight_ptr + offsets, top_weight, mask=inside)
    tl.store(lse_ptr + offsets, lse, mask=inside)


def sdpa_statistics(query: Tensor, key: Tensor, *options: Any) -> tuple[Tensor, ...]:
    problem = Problem(query, key, key, Options(*options))
    given = problem.options
    entropy, top_weight, lse = (
        query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(3)
    )
    top_key = query.new_empty(query.shape[:3], dtype=torch.int64)
    mask, mask_strides = problem.mask()
    left, right, scale, softcap, *_ = problem.scalars()
    constants = ("HEADS", "GROUP", "HEAD_DIM", "BLOCK_D", "PRECISION")
    config = problem.config(configs.FORWARD)
    launch(
        attention_statistics_kernel,
        (problem.blocks(problem.queries, config["BLOCK_M"]) * problem.batch * problem.heads,),
        config,
        problem.query,
        problem.key,
        entropy,
        top_key,
        top_weight,
        lse,
        mask,
        given.alibi_slopes,
        given.sinks,
        strides_of(problem.query),
        strides_of(problem.key),
        lse.stride()[:2],
        mask_strides,
        problem.slope_strides(),
        problem.queries,
        problem.keys,
        left,
        right,
        scale,
        softcap,
        **{name: problem.constants[name] for name in constants},
    )
    return entropy, top_key, top_weight, lse
