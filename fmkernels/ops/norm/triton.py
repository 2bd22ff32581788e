"""The normalisation ops as Triton kernels: whole rows in registers, statistics in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.ops._activations import opmath_dtype
from fmkernels.ops._triton.launch import (
    Config,
    accumulator_dtype,
    architecture,
    config,
    dropout_constants,
    launch,
    multiprocessors,
)
from fmkernels.ops._triton.primitives import as_dtype, drop
from fmkernels.ops._triton.splits import sum_splits
from fmkernels.ops._triton.support import unsupported

# Bound by memory. A program holds BLOCK_M rows of at most BLOCK_N features, 8 to 32 elements of
# each operand per thread; the backward also the sums for weight and bias. Where those do not fit
# the registers beside a row, BLOCK_C is not 0: other programs make them from a second reading,
# BLOCK_C columns each.
_GPU_CONFIGS = {
    "256": config(4, 1, BLOCK_M=4, BLOCK_N=256, BLOCK_C=0),
    "1024": config(4, 1, BLOCK_M=1, BLOCK_N=1024, BLOCK_C=0),
    "4096": config(16, 1, BLOCK_M=1, BLOCK_N=4096, BLOCK_C=0),
    "16384": config(16, 1, BLOCK_M=1, BLOCK_N=16384, BLOCK_C=256),
}
NORM_CONFIGS = {
    **{arch: _GPU_CONFIGS for arch in ("sm_80", "sm_90", "sm_100", "gfx942")},
    "interpret": {
        "256": config(4, 1, BLOCK_M=32, BLOCK_N=256, BLOCK_C=0),
        "1024": config(4, 1, BLOCK_M=32, BLOCK_N=1024, BLOCK_C=0),
        "4096": config(4, 1, BLOCK_M=4, BLOCK_N=4096, BLOCK_C=0),
        "16384": config(4, 1, BLOCK_M=4, BLOCK_N=16384, BLOCK_C=4096),
    },
}


@triton.jit
def norm_fwd_kernel(
    x_ptr,
    residual_ptr,  # or None
    weight_ptr,  # (features) or None
    bias_ptr,
    y_ptr,
    sum_ptr,  # or None: dropout(x) + residual
    mean_ptr,  # (rows) or None
    rstd_ptr,
    seed_ptr,
    rows,
    features,
    eps,
    RMS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    FACTOR: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,  # of the backward
):
    """``y = normalise(dropout(x) + residual) * weight + bias`` over rows."""
    row = as_dtype(tl.program_id(0), tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    mask_m, mask_n = row < rows, column < features
    mask = mask_m[:, None] & mask_n[None, :]
    at = row[:, None] * features + column[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    if residual_ptr is not None:
        if seed_ptr is not None:
            x = drop(x, seed_ptr, row[:, None], column[None, :], THRESHOLD, FACTOR)
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(ACC)
        # The statistics are those of the sum as it is stored.
        rounded = x.to(y_ptr.dtype.element_ty)
        if sum_ptr is not None:
            tl.store(sum_ptr + at, rounded, mask=mask)
        x = rounded.to(ACC)
    if not RMS:
        mean = tl.sum(x, 1) / features
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean, mask=mask_m)
        x = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 1) / features + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, mask=mask_m)
    y = x * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=mask_n, other=0.0).to(ACC)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=mask_n, other=0.0).to(ACC)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_bwd_kernel(
    dy_ptr,
    dsum_ptr,  # gradient of the sum, or None
    sum_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,  # or None
    dresidual_ptr,
    dweight_ptr,  # (parts, features) or None
    dbias_ptr,
    seed_ptr,
    rows,
    features,
    row_programs,
    row_blocks,  # per part
    RMS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    FACTOR: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of x and the residual, and each part's sums for weight and bias."""
    if BLOCK_C == 0:
        _bwd_rows(
            dy_ptr, dsum_ptr, sum_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dresidual_ptr,
            dweight_ptr, dbias_ptr, seed_ptr, tl.program_id(0), rows, features, row_blocks,
            RMS, THRESHOLD, FACTOR, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif tl.program_id(0) < row_programs:
        _bwd_rows(
            dy_ptr, dsum_ptr, sum_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dresidual_ptr,
            None, None, seed_ptr, tl.program_id(0), rows, features, 1,
            RMS, THRESHOLD, FACTOR, ACC, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _bwd_columns(
            dy_ptr, sum_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr,
            tl.program_id(0) - row_programs, rows, features, row_blocks,
            RMS, ACC, BLOCK_M, BLOCK_N, BLOCK_C,
        )  # fmt: skip


@triton.jit
def _bwd_rows(
    dy_ptr,
    dsum_ptr,
    sum_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    seed_ptr,
    program,
    rows,
    features,
    row_blocks,
    RMS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    FACTOR: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``row_blocks`` blocks of whole rows, and the sums over them."""
    program = as_dtype(program, tl.int64)
    column = tl.arange(0, BLOCK_N)
    mask_n = column < features
    weight_sum = tl.zeros((BLOCK_N,), ACC)
    bias_sum = tl.zeros((BLOCK_N,), ACC)
    for block in range(row_blocks):
        row = (program * row_blocks + block) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = row < rows
        mask = mask_m[:, None] & mask_n[None, :]
        at = row[:, None] * features + column[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC)
        normed, rstd = _load_normed(sum_ptr, mean_ptr, rstd_ptr, at, row, mask, mask_m, RMS, ACC)
        if dweight_ptr is not None:
            weight_sum += tl.sum(dy * normed, 0)
        if dbias_ptr is not None:
            bias_sum += tl.sum(dy, 0)
        if dx_ptr is not None or dresidual_ptr is not None:
            if weight_ptr is not None:
                dy *= tl.load(weight_ptr + column, mask=mask_n, other=0.0).to(ACC)[None, :]
            ds = dy - normed * (tl.sum(dy * normed, 1) / features)[:, None]
            if not RMS:
                ds -= (tl.sum(dy, 1) / features)[:, None]
            ds *= rstd[:, None]
            if dsum_ptr is not None:
                ds += tl.load(dsum_ptr + at, mask=mask, other=0.0).to(ACC)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + at, ds.to(dresidual_ptr.dtype.element_ty), mask=mask)
            if dx_ptr is not None:
                if seed_ptr is not None:
                    ds = drop(ds, seed_ptr, row[:, None], column[None, :], THRESHOLD, FACTOR)
                tl.store(dx_ptr + at, ds.to(dx_ptr.dtype.element_ty), mask=mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * features + column, weight_sum, mask=mask_n)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * features + column, bias_sum, mask=mask_n)


@triton.jit
def _bwd_columns(
    dy_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,
    dbias_ptr,
    program,
    rows,
    features,
    row_blocks,
    RMS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sums of BLOCK_C columns over one part, ``row_blocks * BLOCK_M`` rows."""
    ROWS: tl.constexpr = BLOCK_M * BLOCK_N // BLOCK_C // 4
    columns = tl.cdiv(features, BLOCK_C)
    part = as_dtype(program // columns, tl.int64)
    column = program % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n = column < features
    weight_sum = tl.zeros((BLOCK_C,), ACC)
    bias_sum = tl.zeros((BLOCK_C,), ACC)
    first = part * row_blocks * BLOCK_M
    last = tl.minimum(first + row_blocks * BLOCK_M, rows)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        mask_m = row < last
        mask = mask_m[:, None] & mask_n[None, :]
        at = row[:, None] * features + column[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC)
        if dweight_ptr is not None:
            normed, _ = _load_normed(sum_ptr, mean_ptr, rstd_ptr, at, row, mask, mask_m, RMS, ACC)
            weight_sum += tl.sum(dy * normed, 0)
        if dbias_ptr is not None:
            bias_sum += tl.sum(dy, 0)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + part * features + column, weight_sum, mask=mask_n)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + part * features + column, bias_sum, mask=mask_n)


@triton.jit
def _load_normed(
    sum_ptr, mean_ptr, rstd_ptr, at, row, mask, mask_m, RMS: tl.constexpr, ACC: tl.constexpr
):
    """The normalised rows, 0 past the mask, and their reciprocal standard deviations."""
    normed = tl.load(sum_ptr + at, mask=mask, other=0.0).to(ACC)
    rstd = tl.load(rstd_ptr + row, mask=mask_m, other=0.0)
    if not RMS:
        mean = tl.load(mean_ptr + row, mask=mask_m, other=0.0)
        normed = tl.where(mask, normed - mean[:, None], 0.0)
    return normed * rstd[:, None], rstd


def norm_config(features: int) -> Config:
    """The launch configuration of both kernels: the smallest block that holds a row."""
    for name, setting in NORM_CONFIGS[architecture()].items():
        if features <= int(name):
            return setting
    raise unsupported("norm", f"has at most 16384 features, got {features}")


def norm_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    save_for_backward: bool,
    return_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See schema.py. One launch."""
    features = input.shape[-1]
    rows = input.numel() // max(features, 1)
    opmath = opmath_dtype(input.dtype)
    output = torch.empty_like(input)
    keep_sum = residual is not None and (save_for_backward or return_sum)
    total = torch.empty_like(input) if keep_sum else None
    mean = rstd = None
    if save_for_backward:
        rstd = input.new_empty(input.shape[:-1], dtype=opmath)
        mean = None if rms else torch.empty_like(rstd)
    setting = norm_config(features)
    launch(
        norm_fwd_kernel,
        (triton.cdiv(rows, setting["BLOCK_M"]),),
        setting,
        input,
        residual,
        weight,
        bias,
        output,
        total,
        mean,
        rstd,
        seed if dropout_p else None,
        rows,
        features,
        eps,
        RMS=rms,
        **dropout_constants(dropout_p),
        ACC=accumulator_dtype(input),
    )
    return (
        output,
        input.new_empty(0) if total is None else total,
        input.new_empty(0, dtype=opmath) if mean is None else mean,
        input.new_empty(0, dtype=opmath) if rstd is None else rstd,
    )


def norm_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
    dropout_p: float,
    seed: Tensor | None,
    need_input: bool,
    need_residual: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See schema.py. Two launches: rows, and the sums of the programs' parts."""
    features = sum.shape[-1]
    rows = sum.numel() // max(features, 1)
    opmath = opmath_dtype(sum.dtype)
    grad_input = torch.empty_like(sum) if need_input else None
    grad_residual = torch.empty_like(sum) if need_residual else None
    vectors = [sum.new_zeros((features,)) if need else None for need in (need_weight, need_bias)]
    setting = norm_config(features)
    blocks = triton.cdiv(rows, setting["BLOCK_M"])
    # A few programs per multiprocessor keep the memory busy and leave few parts to add.
    per_part, column_programs = 1, 1
    if setting["BLOCK_C"]:
        column_programs = triton.cdiv(features, setting["BLOCK_C"])
    if need_weight or need_bias:
        per_part = max(1, triton.cdiv(blocks * column_programs, 4 * multiprocessors(sum)))
    parts = triton.cdiv(blocks, per_part)
    row_programs = programs = parts
    if setting["BLOCK_C"]:
        row_programs = blocks if need_input or need_residual else 0
        programs = row_programs
        if need_weight or need_bias:
            programs += parts * column_programs
    partial = [
        None if vector is None else sum.new_empty((parts, features), dtype=opmath)
        for vector in vectors
    ]
    launch(
        norm_bwd_kernel,
        (programs,),
        setting,
        grad_output,
        grad_sum,
        sum,
        weight,
        None if rms else mean,
        rstd,
        grad_input,
        grad_residual,
        *partial,
        seed if dropout_p else None,
        rows,
        features,
        row_programs,
        per_part,
        RMS=rms,
        **dropout_constants(dropout_p),
        ACC=accumulator_dtype(sum),
    )
    pairs = [(p, v) for p, v in zip(partial, vectors, strict=True) if v is not None]
    if pairs and parts:
        second = pairs[1] if len(pairs) > 1 else (None, None)
        sum_splits(*pairs[0], *second)
    results = (grad_input, grad_residual, *vectors)
    return tuple(sum.new_empty(0) if result is None else result for result in results)
