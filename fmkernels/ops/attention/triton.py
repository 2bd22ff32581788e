"""The attention ops on Triton kernels: the launchers, with the signatures of reference.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fmkernels.ops import _dropout
from fmkernels.ops._triton.launch import Config, Table, architecture, dot_precision, launch
from fmkernels.ops._triton.support import unsupported
from fmkernels.ops.attention import triton_configs as configs
from fmkernels.ops.attention.schema import Options, empty_output
from fmkernels.ops.attention.triton_backward import (
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
    attention_bwd_preprocess_kernel,
)
from fmkernels.ops.attention.triton_forward import attention_fwd_kernel
from fmkernels.ops.attention.triton_mask import attention_bwd_dmask_kernel

# Tiles of wider heads exceed a multiprocessor's registers.
MOST_FEATURES = 512
# Offsets inside a tile are 32 bits wide: rows further apart than this are copied together first.
_MOST_ROW_STRIDE = 2**23


class Problem:
    """What the kernels of a call share: sizes, options as kernel arguments, launch shapes."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, options: Options) -> None:
        self.query, self.key, self.value = _near(query), _near(key), _near(value)
        self.options = options
        self.batch, self.heads, self.queries, self.width = query.shape
        self.keys, self.shared, self.value_width = key.size(2), key.size(1), value.size(3)
        if max(self.width, self.value_width) > MOST_FEATURES:
            raise unsupported(
                "scaled_dot_product_attention",
                f"takes up to {MOST_FEATURES} features per head, got "
                f"{max(self.width, self.value_width)}",
            )
        self.sequences = 0
        if options.cu_seqlens_q is not None:
            self.sequences = options.cu_seqlens_q.numel() - 1
        self.constants = {
            "HEADS": self.heads,
            "GROUP": self.heads // max(self.shared, 1),
            "HEAD_DIM": self.width,
            "VALUE_DIM": self.value_width,
            "BLOCK_D": padded_width(self.width),
            "BLOCK_E": padded_width(self.value_width),
            "PRECISION": dot_precision(query, "matmul"),
        }
        self.packed = {
            "SEQUENCES": triton.next_power_of_2(self.sequences) if self.sequences else 0
        }

    def config(self, table: Table) -> Config:
        wider = max(self.constants["BLOCK_D"], self.constants["BLOCK_E"])
        given = self.options
        rich = given.attn_mask is not None or given.alibi_slopes is not None
        rich = rich or given.softcap > 0.0 or given.dropout_p > 0.0
        return table[architecture()][configs.case(self.query.element_size(), wider, rich)]

    def blocks(self, rows: int, block: int) -> int:
        """As count_blocks counts them."""
        if self.sequences:
            return rows // block + self.sequences
        return triton.cdiv(rows, block)

    def mask(self) -> tuple[Tensor | None, tuple[int, ...]]:
        """The mask and its strides, 0 where it is broadcast; bool as bytes."""
        mask = self.options.attn_mask
        if mask is None:
            return None, (0, 0, 0, 0)
        if mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        if mask.size(2) > 1 and mask.stride(2) >= _MOST_ROW_STRIDE:
            mask = mask.contiguous()
        sizes = zip(mask.shape, mask.stride(), strict=True)
        return mask, tuple(stride if size > 1 else 0 for size, stride in sizes)

    def slope_strides(self) -> tuple[int, int]:
        slopes = self.options.alibi_slopes
        if slopes is None:
            return 0, 0
        return (slopes.stride(0) if slopes.size(0) > 1 else 0), slopes.stride(1)

    def scalars(self) -> tuple[Any, ...]:
        """left, right, scale, softcap, threshold, keep_factor; None what is absent."""
        options = self.options
        longest = self.queries + self.keys  # a wider window hides nothing
        left, right = options.window_left, options.window_right
        dropout = options.dropout_p > 0.0
        return (
            min(left, longest) if left >= 0 else None,
            min(right, longest) if right >= 0 else None,
            float(options.scale),
            float(options.softcap) if options.softcap > 0.0 else None,
            _as_int32(min(_dropout.threshold(options.dropout_p), 2**32 - 1)) if dropout else None,
            float(_dropout.factor(options.dropout_p)) if dropout else None,
        )


def padded_width(width: int) -> int:
    """The power of two that holds a head's features; a matrix instruction takes 16 at least."""
    return max(16, triton.next_power_of_2(width))


def _as_int32(word: int) -> int:
    """The signed number with the same 32 bits."""
    return word - 2**32 if word >= 2**31 else word


def _near(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if tensor.stride(2) >= _MOST_ROW_STRIDE else tensor


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride()[:3]


def sdpa_forward(
    query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    problem = Problem(query, key, value, Options(*options))
    given = problem.options
    output = empty_output(query, value)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    mask, mask_strides = problem.mask()
    config = problem.config(configs.FORWARD)
    launch(
        attention_fwd_kernel,
        (problem.blocks(problem.queries, config["BLOCK_M"]) * problem.batch * problem.heads,),
        config,
        problem.query,
        problem.key,
        problem.value,
        output,
        lse,
        mask,
        given.alibi_slopes,
        given.sinks,
        given.cu_seqlens_q,
        given.cu_seqlens_k,
        given.dropout_seed,
        strides_of(problem.query),
        strides_of(problem.key),
        strides_of(problem.value),
        strides_of(output),
        lse.stride(),
        mask_strides,
        problem.slope_strides(),
        problem.queries,
        problem.keys,
        problem.sequences,
        *problem.scalars(),
        **problem.constants,
        **problem.packed,
    )
    return output, lse


def sdpa_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *options_and_needs: Any,
) -> tuple[Tensor, ...]:
    count = len(Options._fields)
    need_query, need_key, need_value, need_mask, need_slopes, need_sinks = options_and_needs[
        count:
    ]
    problem = Problem(query, key, value, Options(*options_and_needs[:count]))
    grad_output = _near(grad_output)
    grads = [query.new_empty(0) for _ in range(6)]
    delta = _row_sums(problem, grad_output, grad_lse, _near(output), lse)
    rows = (grad_output, lse, delta)
    if need_key or need_value:
        grads[1], grads[2] = _keys_and_values(problem, *rows)
    own_mask = need_mask and tuple(problem.options.attn_mask.shape) == (*lse.shape, problem.keys)
    if need_query or need_slopes or need_sinks or own_mask:
        grads[0], mask, slopes, sinks = _queries(
            problem, *rows, grad_lse, own_mask, need_slopes, need_sinks
        )
        if own_mask:
            grads[3] = mask
        if need_slopes:
            grads[4] = _slopes_gradient(slopes, problem.options)
        if need_sinks:
            grads[5] = sinks.sum(dim=(0, 2))
    if need_mask and not own_mask:
        grads[3] = _broadcast_mask(problem, *rows)
    return tuple(grads)


def _row_sums(
    problem: Problem,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    output: Tensor,
    lse: Tensor,
) -> Tensor:
    """delta, like lse."""
    config = configs.STREAM[architecture()]["all"]
    blocks = triton.cdiv(problem.queries, config["BLOCK_M"])
    delta = torch.empty_like(lse)
    launch(
        attention_bwd_preprocess_kernel,
        (blocks * problem.batch * problem.heads,),
        config,
        grad_output,
        output,
        lse,
        grad_lse,
        delta,
        strides_of(grad_output),
        strides_of(output),
        problem.queries,
        HEADS=problem.heads,
        VALUE_DIM=problem.value_width,
        BLOCK_E=problem.constants["BLOCK_E"],
    )
    return delta


def _keys_and_values(
    problem: Problem, grad_output: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    given = problem.options
    grad_key = problem.key.new_empty(problem.key.shape)
    grad_value = problem.value.new_empty(problem.value.shape)
    mask, mask_strides = problem.mask()
    config = problem.config(configs.KEYS_VALUES)
    launch(
        attention_bwd_dkdv_kernel,
        (problem.blocks(problem.keys, config["BLOCK_N"]) * problem.batch * problem.shared,),
        config,
        problem.query,
        problem.key,
        problem.value,
        grad_output,
        lse,
        delta,
        mask,
        given.alibi_slopes,
        given.cu_seqlens_q,
        given.cu_seqlens_k,
        given.dropout_seed,
        grad_key,
        grad_value,
        strides_of(problem.query),
        strides_of(problem.key),
        strides_of(problem.value),
        strides_of(grad_output),
        mask_strides,
        problem.slope_strides(),
        strides_of(grad_key),
        strides_of(grad_value),
        problem.queries,
        problem.keys,
        problem.sequences,
        *problem.scalars(),
        **problem.constants,
        **problem.packed,
    )
    return grad_key, grad_value


def _queries(
    problem: Problem,
    grad_output: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_lse: Tensor | None,
    need_mask: bool,
    need_slopes: bool,
    need_sinks: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the query, of a mask that is not broadcast, of each row's slope and sink."""
    given = problem.options
    grad_query = problem.query.new_empty(problem.query.shape)
    # Zeros: blocks that causal attention or a window hides are not visited.
    grad_mask = torch.zeros_like(
        given.attn_mask, memory_format=torch.contiguous_format
    ) if need_mask else None  # fmt: skip
    grad_slopes = torch.empty_like(lse) if need_slopes else None
    grad_sinks = torch.empty_like(lse) if need_sinks else None
    need_rows = need_slopes or need_sinks
    mask, mask_strides = problem.mask()
    config = problem.config(configs.QUERIES)
    launch(
        attention_bwd_dq_kernel,
        (problem.blocks(problem.queries, config["BLOCK_M"]) * problem.batch * problem.heads,),
        config,
        problem.query,
        problem.key,
        problem.value,
        grad_output,
        lse,
        grad_lse if need_rows else None,
        delta,
        mask,
        given.alibi_slopes,
        given.sinks if need_rows else None,
        given.cu_seqlens_q,
        given.cu_seqlens_k,
        given.dropout_seed,
        grad_query,
        grad_mask,
        grad_slopes,
        grad_sinks,
        strides_of(problem.query),
        strides_of(problem.key),
        strides_of(problem.value),
        strides_of(grad_output),
        mask_strides,
        problem.slope_strides(),
        strides_of(grad_query),
        (0, 0, 0) if grad_mask is None else strides_of(grad_mask),
        problem.queries,
        problem.keys,
        problem.sequences,
        *problem.scalars(),
        **problem.constants,
        **problem.packed,
    )
    return grad_query, grad_mask, grad_slopes, grad_sinks


def _slopes_gradient(by_row: Tensor, options: Options) -> Tensor:
    """``(B, Hq, Sq)`` summed to the shape of alibi_slopes."""
    slopes = options.alibi_slopes
    if options.cu_seqlens_q is None or slopes.size(0) == 1:
        return by_row.sum(dim=2).sum_to_size(slopes.shape)
    row = torch.arange(by_row.size(2), device=by_row.device)
    sequence = torch.searchsorted(options.cu_seqlens_q[1:], row, right=True)
    return torch.zeros_like(slopes).index_add_(0, sequence, by_row[0].t())


def _broadcast_mask(problem: Problem, grad_output: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    given = problem.options
    mask, mask_strides = problem.mask()
    grad_mask = mask.new_empty(mask.shape)
    full = (problem.batch, problem.heads, problem.queries, problem.keys)
    over = [own == 1 and size != 1 for own, size in zip(mask.shape, full, strict=True)]
    config = problem.config(configs.MASK)
    blocks = (triton.cdiv(problem.queries, config["BLOCK_M"]),
              triton.cdiv(problem.keys, config["BLOCK_N"]))  # fmt: skip
    grid = 1
    for size, broadcast in zip((*full[:2], *blocks), over, strict=True):
        grid *= 1 if broadcast else size
    launch(
        attention_bwd_dmask_kernel,
        (grid,),
        config,
        problem.query,
        problem.key,
        problem.value,
        grad_output,
        lse,
        delta,
        mask,
        given.alibi_slopes,
        given.dropout_seed,
        grad_mask,
        strides_of(problem.query),
        strides_of(problem.key),
        strides_of(problem.value),
        strides_of(grad_output),
        mask_strides,
        problem.slope_strides(),
        problem.batch,
        problem.queries,
        problem.keys,
        *problem.scalars(),
        OVER_BATCH=over[0],
        OVER_HEADS=over[1],
        OVER_QUERIES=over[2],
        OVER_KEYS=over[3],
        **problem.constants,
    )
    return grad_mask
