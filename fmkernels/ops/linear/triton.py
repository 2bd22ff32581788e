"""The linear ops as Triton kernels: GEMM with an epilogue, and both gradients in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.ops import _activations
from fmkernels.ops._triton.launch import (
    Config,
    accumulator_dtype,
    architecture,
    config,
    dot_precision,
    index_dtype,
    launch,
    split_count,
)
from fmkernels.ops._triton.primitives import activate, activate_backward, as_dtype, dot, swizzle
from fmkernels.ops._triton.splits import sum_splits

# "tiny" and "small": at most 16 and 64 rows, bound by reading the weight. "tf32": twice the bytes
# per element. "ieee": float32 without tf32 runs on the FMA units from registers, so tiles are
# small; also float64.
FORWARD_CONFIGS = {
    # 128x128x64 w8 s3: 64 KB of shared memory, and no spill with any epilogue; at w4 it spills.
    "sm_80": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "small": config(4, 4, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tiny": config(4, 4, BLOCK_M=16, BLOCK_N=64, BLOCK_K=128),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "sm_90": {
        "large": config(8, 4, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "small": config(4, 4, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tiny": config(4, 4, BLOCK_M=16, BLOCK_N=64, BLOCK_K=128),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "sm_100": {
        "large": config(8, 4, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "small": config(4, 4, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tiny": config(4, 4, BLOCK_M=16, BLOCK_N=64, BLOCK_K=128),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    # LDS is 64 KB; two stages of the large tile take 32 KB.
    "gfx942": {
        "large": config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "small": config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tiny": config(4, 2, BLOCK_M=16, BLOCK_N=64, BLOCK_K=128),
        "tf32": config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "interpret": {
        name: config(4, 1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
        for name in ("large", "small", "tiny", "tf32", "ieee")
    },
}
# BLOCK_M x BLOCK_N is the tile of either gradient, BLOCK_K the step of its reduction.
BACKWARD_CONFIGS = {
    "sm_80": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "small": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "sm_90": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "small": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "sm_100": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "small": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "gfx942": {
        "large": config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "small": config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tf32": config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "interpret": {
        name: config(4, 1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)
        for name in ("large", "small", "tf32", "ieee")
    },
}
ACTIVATION_CONFIGS = {
    arch: {"all": config(4, 1, BLOCK=1024)}
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942", "interpret")
}


@triton.jit
def linear_fwd_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    bias_ptr,  # (N) or None
    residual_ptr,  # (M, N) or None
    y_ptr,  # (M, N)
    saved_ptr,  # (M, N) or None: the pre-activation
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y = activation(x @ w.T + bias + residual)``, one tile of y per program."""
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
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if bias_ptr is not None:
        accumulator += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    offs_y = offs_m[:, None] * N + offs_n[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        accumulator += tl.load(residual_ptr + offs_y, mask=mask_y, other=0.0).to(ACC)
    if saved_ptr is not None:
        tl.store(saved_ptr + offs_y, accumulator.to(saved_ptr.dtype.element_ty), mask=mask_y)
    y = activate(accumulator, ACTIVATION)
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask_y)


@triton.jit
def linear_bwd_activation_kernel(
    dy_ptr,
    x_ptr,  # what the activation's derivative reads: the pre-activation, for relu the output
    dx_ptr,
    size,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient before the activation, elementwise over contiguous tensors."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(ACC)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
    dx = activate_backward(dy, x, ACTIVATION)
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_bwd_kernel(
    dy_ptr,  # (M, N)
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    dx_ptr,  # (M, K) or None
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
                dy_ptr, w_ptr, dx_ptr, M, N, K, pid,
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
        dy_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * as_dtype(K, INDEX)
    offs_dx = offs_m[:, None] * K + offs_k[None, :]
    mask = mask_m[:, None] & mask_k[None, :]
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


def forward_config(rows: int, precision: str, dtype: torch.dtype) -> Config:
    """The launch configuration of :func:`linear_fwd_kernel` for a number of rows."""
    table = FORWARD_CONFIGS[architecture()]
    if _on_fma_units(precision, dtype):
        return table["ieee"]
    if dtype is torch.float32:
        return table["tf32"]
    return table["tiny" if rows <= 16 else "small" if rows <= 64 else "large"]


def backward_config(rows: int, precision: str, dtype: torch.dtype) -> Config:
    """The launch configuration of :func:`linear_bwd_kernel`."""
    table = BACKWARD_CONFIGS[architecture()]
    if _on_fma_units(precision, dtype):
        return table["ieee"]
    if dtype is torch.float32:
        return table["tf32"]
    return table["small" if rows <= 64 else "large"]


def _on_fma_units(precision: str, dtype: torch.dtype) -> bool:
    return dtype is torch.float64 or dtype is torch.float32 and precision == "ieee"


def linear_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed_weight: Tensor | None,
    activation: str | None,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor]:
    """See schema.py. ``packed_weight`` is not read. One launch."""
    columns, depth = weight.shape
    rows = input.numel() // depth
    output = input.new_empty((*input.shape[:-1], columns))
    save = save_for_backward and _activations.needs_preactivation(activation)
    saved = torch.empty_like(output) if save else input.new_empty((0,))
    precision = dot_precision(input, "matmul")
    setting = forward_config(rows, precision, input.dtype)
    programs = triton.cdiv(rows, setting["BLOCK_M"]) * triton.cdiv(columns, setting["BLOCK_N"])
    launch(
        linear_fwd_kernel,
        (programs,),
        setting,
        input,
        weight,
        bias,
        residual,
        output,
        saved if save else None,
        rows,
        columns,
        depth,
        ACTIVATION=activation,
        PRECISION=precision,
        ACC=accumulator_dtype(input),
        INDEX=index_dtype(input, weight, output),
    )
    return output, saved


def linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    saved: Tensor,
    activation: str | None,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See schema.py. At most three launches: activation, gradients, sum of the splits."""
    absent = input.new_empty((0,))
    grad_pre = grad_output
    if activation is not None:
        grad_pre = activation_backward(
            grad_output, output if activation == "relu" else saved, activation
        )
    grad_input, grad_weight, grad_bias = _matrix_gradients(
        grad_pre, input, weight, need_input, need_weight, need_bias
    )
    return (
        absent if grad_input is None else grad_input,
        absent if grad_weight is None else grad_weight,
        absent if grad_bias is None else grad_bias,
        grad_pre if need_residual else absent,
    )


def activation_backward(grad_output: Tensor, operand: Tensor, activation: str) -> Tensor:
    """Gradient of the pre-activation; ``operand`` is the pre-activation, for relu the output."""
    grad = torch.empty_like(grad_output)
    setting = ACTIVATION_CONFIGS[architecture()]["all"]
    launch(
        linear_bwd_activation_kernel,
        (triton.cdiv(grad.numel(), setting["BLOCK"]),),
        setting,
        grad_output,
        operand,
        grad,
        grad.numel(),
        ACTIVATION=activation,
        ACC=accumulator_dtype(grad),
    )
    return grad


def _matrix_gradients(
    grad_pre: Tensor,
    input: Tensor,
    weight: Tensor,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
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
        linear_bwd_kernel,
        (dx_programs + dw_programs,),
        setting,
        grad_pre,
        input,
        weight,
        grad_input,
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
