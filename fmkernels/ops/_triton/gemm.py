"""Matrix products with an epilogue, and their gradients: what a fully connected layer is made of.

``x`` is (M, K), a weight (N, K), as in ``torch.nn.Linear``; everything is contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.ops._triton.gemm_configs import (
    ELEMENTWISE_CONFIGS,
    FORWARD_CONFIGS,
    backward_config,
    forward_config,
    gated_config,
)
from fmkernels.ops._triton.launch import (
    Config,
    accumulator_dtype,
    architecture,
    dot_precision,
    dropout_constants,
    index_dtype,
    launch,
    power_of_two,
    split_count,
    tuned,
)
from fmkernels.ops._triton.primitives import (
    activate,
    activate_backward,
    as_dtype,
    dot,
    drop,
    swizzle,
)
from fmkernels.ops._triton.splits import sum_splits


@triton.jit
def gemm_fwd_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    bias_ptr,  # (N) or None
    residual_ptr,  # (M, N) or None
    y_ptr,  # (M, N)
    saved_ptr,  # (M, N) or None: the pre-activation
    seed_ptr,  # of a dropout after the activation, or None
    M,
    N,
    K,
    THRESHOLD: tl.constexpr,
    FACTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y = dropout(activation(x @ w.T + bias + residual))``, one tile of y per program."""
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    offs_m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < N
    x_ptrs = x_ptr + (offs_m[:, None] * K + offs_k[None, :])
    w_ptrs = w_ptr + (offs_n[None, :] * K + offs_k[:, None])
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        accumulator = dot(x, w, accumulator, PRECISION)
        x_ptrs += as_dtype(BLOCK_K, INDEX)
        w_ptrs += as_dtype(BLOCK_K, INDEX)
    if bias_ptr is not None:
        accumulator += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    offs_y = offs_m[:, None] * N + offs_n[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        accumulator += tl.load(residual_ptr + offs_y, mask=mask_y, other=0.0).to(ACC)
    if saved_ptr is not None:
        tl.store(saved_ptr + offs_y, accumulator.to(saved_ptr.dtype.element_ty), mask=mask_y)
    y = activate(accumulator, ACTIVATION)
    if seed_ptr is not None:
        y = drop(y, seed_ptr, offs_m[:, None], offs_n[None, :], THRESHOLD, FACTOR)
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask_y)


@triton.jit
def gemm_gated_fwd_kernel(
    x_ptr,  # (M, K)
    gate_ptr,  # (N, K)
    up_ptr,  # (N, K)
    gate_bias_ptr,  # (N) or None
    up_bias_ptr,
    y_ptr,  # (M, N)
    gate_saved_ptr,  # (M, N) or None: x @ gate.T + gate_bias
    up_saved_ptr,
    seed_ptr,
    M,
    N,
    K,
    THRESHOLD: tl.constexpr,
    FACTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y = dropout(activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias))``."""
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    offs_m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_n = offs_n < N
    x_ptrs = x_ptr + (offs_m[:, None] * K + offs_k[None, :])
    offs_w = offs_n[None, :] * K + offs_k[:, None]
    gate_ptrs = gate_ptr + offs_w
    up_ptrs = up_ptr + offs_w
    gate = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    up = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        mask_w = mask_n[None, :] & mask_k[:, None]
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        gate = dot(x, tl.load(gate_ptrs, mask=mask_w, other=0.0), gate, PRECISION)
        up = dot(x, tl.load(up_ptrs, mask=mask_w, other=0.0), up, PRECISION)
        x_ptrs += as_dtype(BLOCK_K, INDEX)
        gate_ptrs += as_dtype(BLOCK_K, INDEX)
        up_ptrs += as_dtype(BLOCK_K, INDEX)
    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    offs_y = offs_m[:, None] * N + offs_n[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    if gate_saved_ptr is not None:
        tl.store(gate_saved_ptr + offs_y, gate.to(gate_saved_ptr.dtype.element_ty), mask=mask_y)
        tl.store(up_saved_ptr + offs_y, up.to(up_saved_ptr.dtype.element_ty), mask=mask_y)
    y = activate(gate, ACTIVATION) * up
    if seed_ptr is not None:
        y = drop(y, seed_ptr, offs_m[:, None], offs_n[None, :], THRESHOLD, FACTOR)
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask_y)


@triton.jit
def activation_bwd_kernel(
    dy_ptr,  # (rows, width), like everything here
    operand_ptr,  # what the activation's derivative reads: the pre-activation, for relu the output
    up_ptr,  # what a gate multiplies, or None
    dx_ptr,
    dup_ptr,  # gradient of up, or None
    seed_ptr,  # of a dropout after the activation, or None
    size,
    width,
    THRESHOLD: tl.constexpr,
    FACTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of ``dropout(activation(x) * up)``, elementwise."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(ACC)
    if seed_ptr is not None:
        dy = drop(dy, seed_ptr, offsets // width, offsets % width, THRESHOLD, FACTOR)
    if operand_ptr is not None:
        operand = tl.load(operand_ptr + offsets, mask=mask, other=0.0).to(ACC)
    if up_ptr is not None:
        up = tl.load(up_ptr + offsets, mask=mask, other=0.0).to(ACC)
        dup = dy * activate(operand, ACTIVATION)
        tl.store(dup_ptr + offsets, dup.to(dup_ptr.dtype.element_ty), mask=mask)
        dy *= up
        if ACTIVATION == "relu":
            operand = activate(operand, ACTIVATION)
    if ACTIVATION is not None:
        dy = activate_backward(dy, operand, ACTIVATION)
    tl.store(dx_ptr + offsets, dy.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gemm_bwd_kernel(
    dy_ptr,  # (M, N)
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    dx_ptr,  # (M, K) or None
    dx_added_ptr,  # (M, K) or None: added to dx
    dw_ptr,  # (splits, N, K) or None
    db_ptr,  # (splits, N) or None
    M,
    N,
    K,
    dx_programs,
    rows_per_split,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The first ``dx_programs`` programs make tiles of dx, the others parts of dw and db.

    Neither waits for the other, and together they fill the device better than one by one.
    """
    pid = tl.program_id(0)
    if pid < dx_programs:
        if dx_ptr is not None:
            _bwd_dx_tile(
                dy_ptr, w_ptr, dx_ptr, dx_added_ptr, M, N, K, pid,
                PRECISION, ACC, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        _bwd_dw_tile(
            dy_ptr, x_ptr, dw_ptr, db_ptr, M, N, K, pid - dx_programs, rows_per_split,
            PRECISION, ACC, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _bwd_dx_tile(
    dy_ptr,
    w_ptr,
    dx_ptr,
    dx_added_ptr,
    M,
    N,
    K,
    pid,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``dx = dy @ w``: rows are M, columns K, the reduction runs over N."""
    pid_m, pid_k = swizzle(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), 8)
    offs_m = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k.to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = tl.arange(0, BLOCK_K).to(INDEX)
    mask_m = offs_m < M
    mask_k = offs_k < K
    dy_ptrs = dy_ptr + (offs_m[:, None] * N + offs_n[None, :])
    w_ptrs = w_ptr + (offs_n[:, None] * K + offs_k[None, :])
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for n in range(0, N, BLOCK_K):
        mask_n = offs_n < N - n
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        accumulator = dot(dy, w, accumulator, PRECISION)
        dy_ptrs += as_dtype(BLOCK_K, INDEX)
        w_ptrs += BLOCK_K * as_dtype(K, INDEX)
    offs_dx = offs_m[:, None] * K + offs_k[None, :]
    mask = mask_m[:, None] & mask_k[None, :]
    if dx_added_ptr is not None:
        accumulator += tl.load(dx_added_ptr + offs_dx, mask=mask, other=0.0).to(ACC)
    tl.store(dx_ptr + offs_dx, accumulator.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_dw_tile(
    dy_ptr,
    x_ptr,
    dw_ptr,
    db_ptr,
    M,
    N,
    K,
    pid,
    rows_per_split,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``dw[split] = dy.T @ x`` over the split's rows: rows are N, columns K."""
    tiles_k = tl.cdiv(K, BLOCK_N)
    tiles = tl.cdiv(N, BLOCK_M) * tiles_k
    split = pid // tiles
    pid_n = (pid % tiles) // tiles_k
    pid_k = pid % tiles_k
    offs_n = pid_n.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k.to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask_k = offs_k < K
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    if dw_ptr is not None:
        offs_m = as_dtype(first, INDEX) + tl.arange(0, BLOCK_K)
        dy_ptrs = dy_ptr + (offs_m[:, None] * N + offs_n[None, :])
        x_ptrs = x_ptr + (offs_m[:, None] * K + offs_k[None, :])
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for m in range(first, last, BLOCK_K):
            mask_m = tl.arange(0, BLOCK_K) < last - m
            dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            accumulator = dot(tl.trans(dy), x, accumulator, PRECISION)
            dy_ptrs += BLOCK_K * as_dtype(N, INDEX)
            x_ptrs += BLOCK_K * as_dtype(K, INDEX)
        dw = dw_ptr + as_dtype(split, tl.int64) * N * K
        offs_dw = offs_n[:, None] * K + offs_k[None, :]
        mask = mask_n[:, None] & mask_k[None, :]
        tl.store(dw + offs_dw, accumulator.to(dw_ptr.dtype.element_ty), mask=mask)
    if db_ptr is not None and pid_k == 0:
        _column_sum(
            dy_ptr, db_ptr + as_dtype(split, tl.int64) * N, first, last, N, offs_n, mask_n,
            ACC, INDEX, BLOCK_M, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _column_sum(
    dy_ptr,
    db_ptr,
    first,
    last,
    N,
    offs_n,
    mask_n,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Sum of the rows from ``first`` to ``last``: a second pass, over what lies in L2 by now."""
    total = tl.zeros((BLOCK_N,), ACC)
    for m in range(first, last, BLOCK_ROWS):
        offs_m = as_dtype(m, INDEX) + tl.arange(0, BLOCK_ROWS)
        mask = (offs_m < last)[:, None] & mask_n[None, :]
        dy = tl.load(dy_ptr + (offs_m[:, None] * N + offs_n[None, :]), mask=mask, other=0.0)
        total += tl.sum(dy.to(ACC), 0)
    tl.store(db_ptr + offs_n, total.to(db_ptr.dtype.element_ty), mask=mask_n)


def gemm_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    output: Tensor,
    saved: Tensor | None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> None:
    """``output = dropout(activation(input @ weight.T + bias + residual))`` in one launch."""
    columns, depth = weight.shape
    rows = input.numel() // depth
    precision = dot_precision(input, "matmul")

    def run(setting: Config) -> None:
        programs = triton.cdiv(rows, setting["BLOCK_M"]) * triton.cdiv(columns, setting["BLOCK_N"])
        launch(
            gemm_fwd_kernel,
            (programs,),
            setting,
            input,
            weight,
            bias,
            residual,
            output,
            saved,
            seed if dropout_p else None,
            rows,
            columns,
            depth,
            **dropout_constants(dropout_p),
            ACTIVATION=activation,
            PRECISION=precision,
            ACC=accumulator_dtype(input),
            INDEX=index_dtype(input, weight, output),
        )

    key = ("gemm_fwd", input.dtype, precision, activation, power_of_two(rows), columns, depth)
    default = forward_config(rows, precision, input.dtype, dropout_p > 0.0)
    run(tuned(key, default, FORWARD_CONFIGS[architecture()], run))


def gemm_gated_forward(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str | None,
    output: Tensor,
    saved: tuple[Tensor | None, Tensor | None],
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """``output = dropout(activation(gate) * up)`` in one launch; ``saved`` gets (gate, up)."""
    columns, depth = up_weight.shape
    rows = input.numel() // depth
    precision = dot_precision(input, "matmul")
    setting = gated_config(precision, input.dtype)
    programs = triton.cdiv(rows, setting["BLOCK_M"]) * triton.cdiv(columns, setting["BLOCK_N"])
    launch(
        gemm_gated_fwd_kernel,
        (programs,),
        setting,
        input,
        gate_weight,
        up_weight,
        gate_bias,
        up_bias,
        output,
        *saved,
        seed if dropout_p else None,
        rows,
        columns,
        depth,
        **dropout_constants(dropout_p),
        ACTIVATION=activation,
        PRECISION=precision,
        ACC=accumulator_dtype(input),
        INDEX=index_dtype(input, up_weight, output),
    )


def activation_backward(
    grad_output: Tensor,
    operand: Tensor | None,
    activation: str | None,
    up: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and up of ``dropout(activation(x) * up)`` in one launch.

    Args:
        operand: the pre-activation x; without ``up``, for relu the output.
    """
    grad = torch.empty_like(grad_output)
    grad_up = None if up is None else torch.empty_like(grad_output)
    setting = ELEMENTWISE_CONFIGS[architecture()]["all"]
    launch(
        activation_bwd_kernel,
        (triton.cdiv(grad.numel(), setting["BLOCK"]),),
        setting,
        grad_output,
        operand,
        up,
        grad,
        grad_up,
        seed if dropout_p else None,
        grad.numel(),
        grad.shape[-1],
        **dropout_constants(dropout_p),
        ACTIVATION=activation,
        ACC=accumulator_dtype(grad),
    )
    return grad, grad_up


def gemm_backward(
    grad_pre: Tensor,
    input: Tensor,
    weight: Tensor,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    added: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias of ``input @ weight.T + bias``.

    One launch, and another that adds up the parts where the sum over rows was split.

    Args:
        added: is added to the gradient of the input.
    """
    columns, depth = weight.shape
    rows = input.numel() // depth
    grad_input = torch.empty_like(input) if need_input else None
    grad_weight = torch.empty_like(weight) if need_weight else None
    grad_bias = weight.new_empty((columns,)) if need_bias else None
    if rows == 0:
        for grad in (grad_weight, grad_bias):
            if grad is not None:
                grad.zero_()
        return grad_input, grad_weight, grad_bias
    precision = dot_precision(input, "matmul")
    setting = backward_config(rows, precision, input.dtype)
    block_m, block_n, block_k = setting["BLOCK_M"], setting["BLOCK_N"], setting["BLOCK_K"]
    dx_programs = dw_programs = 0
    if need_input:
        dx_programs = triton.cdiv(rows, block_m) * triton.cdiv(depth, block_n)
    splits, rows_per_split = 1, rows
    dw, db = grad_weight, grad_bias
    if need_weight or need_bias:
        tiles = triton.cdiv(columns, block_m) * triton.cdiv(depth, block_n)
        splits = split_count(input, tiles, triton.cdiv(rows, block_k))
        rows_per_split = triton.cdiv(triton.cdiv(rows, splits), block_k) * block_k
        splits = triton.cdiv(rows, rows_per_split)
        dw_programs = tiles * splits
    if splits > 1:
        kept = {"dtype": torch.float64 if input.dtype is torch.float64 else torch.float32}
        dw = input.new_empty((splits, *weight.shape), **kept) if need_weight else None
        db = input.new_empty((splits, columns), **kept) if need_bias else None
    launch(
        gemm_bwd_kernel,
        (dx_programs + dw_programs,),
        setting,
        grad_pre,
        input,
        weight,
        grad_input,
        added,
        dw,
        db,
        rows,
        columns,
        depth,
        dx_programs,
        rows_per_split,
        PRECISION=precision,
        ACC=accumulator_dtype(input),
        INDEX=index_dtype(grad_pre, input, weight),
    )
    if splits > 1:
        if need_weight:
            sum_splits(dw, grad_weight, db, grad_bias)
        else:
            sum_splits(db, grad_bias, None, None)
    return grad_input, grad_weight, grad_bias
