"""Batch and group norm in Triton, with residual, activation and pool: see schema_norm.py.

Both are one computation: the statistics run over the pixels of an image (of the whole batch, seen
as one image, for batch norm) and the channels of a group (a single one for batch norm). Rows are
pixels, columns channels; a pass over the input makes the statistics in parts, which small PyTorch
operators combine, and another applies them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmkernels.ops._activations import opmath_dtype
from fmkernels.ops._triton.launch import (
    accumulator_dtype,
    architecture,
    index_dtype,
    launch,
    multiprocessors,
)
from fmkernels.ops._triton.primitives import activate, activate_backward, as_dtype
from fmkernels.ops.conv.geometry import is_channels_last, new_image, pooled_shape, window_parts
from fmkernels.ops.conv.triton_configs import ROW_CONFIGS
from fmkernels.ops.conv.triton_gemm import image_offsets, pixel_of
from fmkernels.ops.conv.triton_pool import unpooled
from fmkernels.ops.conv.triton_pools import launch_pool
from fmkernels.ops.conv.triton_problem import three


@triton.jit
def channel_norm_stats_kernel(
    x_ptr,
    mean_ptr,  # (images, chunks, C): mean of the pixels of a chunk
    deviation_ptr,  # the same shape: sum of squared deviations from that mean
    C,
    D,
    H,
    W,
    rows,  # pixels of an image
    chunks,
    row_blocks,  # of a chunk
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Means and deviations of chunks of pixels, block by block (Chan, Golub, LeVeque 1983)."""
    program = tl.program_id(0)
    image, chunk = program // chunks, program % chunks
    c = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    mask_c = c < C
    mean = tl.zeros((BLOCK_N,), ACC)
    deviation = tl.zeros((BLOCK_N,), ACC)
    seen = tl.zeros((), ACC)
    for block in range(row_blocks):
        inside = (chunk.to(INDEX) * row_blocks + block) * BLOCK_M + tl.arange(0, BLOCK_M)
        count = tl.sum((inside < rows).to(ACC), 0)
        n, d, h, w = pixel_of(image.to(INDEX) * rows + inside, D, H, W)
        at = image_offsets(n, d, h, w, c, C, D, H, W, CHANNELS_LAST)
        mask = (inside < rows)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
        block_mean = tl.sum(x, 0) / tl.maximum(count, 1)
        centred = tl.where(mask, x - block_mean[None, :], 0.0)
        total = tl.maximum(seen + count, 1)
        delta = block_mean - mean
        mean += delta * (count / total)
        deviation += tl.sum(centred * centred, 0) + delta * delta * (seen * count / total)
        seen += count
    at = as_dtype(program, tl.int64) * C + c
    tl.store(mean_ptr + at, mean, mask=mask_c)
    tl.store(deviation_ptr + at, deviation, mask=mask_c)


@triton.jit
def _pre_activation(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, mean_ptr, rstd_ptr, image, groups, c, C, at, mask,
    ACC: tl.constexpr,
):  # fmt: skip
    """``(normalised, pre-activation, rstd)`` of a tile."""
    mask_c = c < C
    statistic = image * groups + c // (C // groups)
    mean = tl.load(mean_ptr + statistic, mask=mask_c, other=0.0)
    rstd = tl.load(rstd_ptr + statistic, mask=mask_c, other=0.0)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    normalised = (x - mean[None, :]) * rstd[None, :]
    pre = normalised
    if weight_ptr is not None:
        pre = pre * tl.load(weight_ptr + c, mask=mask_c, other=0.0)[None, :]
    if bias_ptr is not None:
        pre += tl.load(bias_ptr + c, mask=mask_c, other=0.0)[None, :]
    if residual_ptr is not None:
        pre += tl.load(residual_ptr + at, mask=mask, other=0.0).to(ACC)
    return normalised, pre, rstd


@triton.jit
def channel_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    mean_ptr,  # (images, groups)
    rstd_ptr,
    y_ptr,
    C,
    D,
    H,
    W,
    rows,
    chunks,
    groups,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``y = activation(normalised * weight + bias + residual)``; a chunk is one block of rows."""
    program = tl.program_id(0)
    image, chunk = program // chunks, program % chunks
    c = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    inside = chunk.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (inside < rows)[:, None] & (c < C)[None, :]
    n, d, h, w = pixel_of(image.to(INDEX) * rows + inside, D, H, W)
    at = image_offsets(n, d, h, w, c, C, D, H, W, CHANNELS_LAST)
    _, pre, _ = _pre_activation(
        x_ptr, weight_ptr, bias_ptr, residual_ptr, mean_ptr, rstd_ptr, image, groups, c, C, at,
        mask, ACC,
    )  # fmt: skip
    y = activate(pre, ACTIVATION)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def channel_norm_bwd_sums_kernel(
    dy_ptr,  # gradient of the (pooled) output
    argmax_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    mean_ptr,
    rstd_ptr,
    dpre_ptr,  # gradient before the activation
    sum_ptr,  # (images, chunks, C): sums over pixels of dpre
    product_ptr,  # and of dpre * normalised
    C,
    D,
    H,
    W,
    YD,
    YH,
    YW,
    PD,
    PH,
    PW,
    rows,
    chunks,
    groups,
    row_blocks,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    POOL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Backward of pool and activation, and the sums that the norm's gradient needs."""
    program = tl.program_id(0)
    image, chunk = program // chunks, program % chunks
    c = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    total = tl.zeros((BLOCK_N,), ACC)
    product = tl.zeros((BLOCK_N,), ACC)
    for block in range(row_blocks):
        inside = (chunk.to(INDEX) * row_blocks + block) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (inside < rows)[:, None] & (c < C)[None, :]
        n, d, h, w = pixel_of(image.to(INDEX) * rows + inside, D, H, W)
        at = image_offsets(n, d, h, w, c, C, D, H, W, CHANNELS_LAST)
        if POOL is None:
            grad = tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC)
        else:
            grad = unpooled(
                dy_ptr, argmax_ptr, n, d, h, w, c, mask, C, D, H, W, YD, YH, YW, PD, PH, PW, 0,
                KERNEL, STRIDE, (1, 1, 1), POOL, True, CHANNELS_LAST, ACC, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        normalised, pre, _ = _pre_activation(
            x_ptr, weight_ptr, bias_ptr, residual_ptr, mean_ptr, rstd_ptr, image, groups, c, C,
            at, mask, ACC,
        )  # fmt: skip
        grad = tl.where(mask, activate_backward(grad, pre, ACTIVATION), 0.0)
        tl.store(dpre_ptr + at, grad.to(dpre_ptr.dtype.element_ty), mask=mask)
        total += tl.sum(grad, 0)
        product += tl.sum(tl.where(mask, grad * normalised, 0.0), 0)
    at = as_dtype(program, tl.int64) * C + c
    tl.store(sum_ptr + at, total, mask=c < C)
    tl.store(product_ptr + at, product, mask=c < C)


@triton.jit
def channel_norm_bwd_kernel(
    dpre_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    average_ptr,  # (images, groups): average of weight * dpre
    projection_ptr,  # (images, groups): average of weight * dpre * normalised
    dx_ptr,
    C,
    D,
    H,
    W,
    rows,
    chunks,
    groups,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dx = (weight * dpre - average - normalised * projection) * rstd``."""
    program = tl.program_id(0)
    image, chunk = program // chunks, program % chunks
    c = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    mask_c = c < C
    inside = chunk.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (inside < rows)[:, None] & mask_c[None, :]
    n, d, h, w = pixel_of(image.to(INDEX) * rows + inside, D, H, W)
    at = image_offsets(n, d, h, w, c, C, D, H, W, CHANNELS_LAST)
    normalised, _, rstd = _pre_activation(
        x_ptr, None, None, None, mean_ptr, rstd_ptr, image, groups, c, C, at, mask, ACC
    )
    statistic = image * groups + c // (C // groups)
    average = tl.load(average_ptr + statistic, mask=mask_c, other=0.0)
    projection = tl.load(projection_ptr + statistic, mask=mask_c, other=0.0)
    grad = tl.load(dpre_ptr + at, mask=mask, other=0.0).to(ACC)
    if weight_ptr is not None:
        grad *= tl.load(weight_ptr + c, mask=mask_c, other=0.0)[None, :]
    dx = (grad - average[None, :] - normalised * projection[None, :]) * rstd[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class _Layout:
    """The input as images of rows, and how rows are shared out to programs."""

    images: int
    rows: int
    groups: int
    channels: int
    size: tuple[int, ...]
    blocks: int  # of rows, in an image
    columns: int  # programs along the channels
    chunks: int  # of an image, for sums
    row_blocks: int  # of a chunk

    @property
    def sum_grid(self) -> tuple[int, int]:
        return self.images * self.chunks, self.columns

    @property
    def grid(self) -> tuple[int, int]:
        return self.images * self.blocks, self.columns

    def new_parts(self, input: Tensor) -> Tensor:
        shape = (self.images, self.chunks, self.channels)
        return input.new_empty(shape, dtype=opmath_dtype(input.dtype))


def _layout(input: Tensor, groups: int) -> _Layout:
    batch, channels, *spatial = input.shape
    setting = ROW_CONFIGS[architecture()]["rows"]
    pixels = math.prod(spatial)
    images, rows = (batch, pixels) if groups else (1, batch * pixels)
    blocks = triton.cdiv(rows, setting["BLOCK_M"])
    columns = triton.cdiv(channels, setting["BLOCK_N"])
    wanted = max(1, 8 * multiprocessors(input) // max(1, images * columns))
    row_blocks = max(1, triton.cdiv(blocks, wanted))
    return _Layout(
        images=images,
        rows=rows,
        groups=groups or channels,
        channels=channels,
        size=three(spatial),
        blocks=blocks,
        columns=columns,
        chunks=triton.cdiv(blocks, row_blocks),
        row_blocks=row_blocks,
    )


def channel_norm_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    pool: str | None,
    window: Sequence[int],
    save_for_backward: bool,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See schema_norm.py."""
    layout = _layout(input, groups)
    channels_last = is_channels_last(input)
    if mean is None or variance is None:
        mean, variance = _statistics(input, layout)
    else:
        mean, variance = mean.clone(), variance.clone()
    output = new_image(input, input.shape, channels_last)
    launch(
        channel_norm_fwd_kernel,
        layout.grid,
        ROW_CONFIGS[architecture()]["rows"],
        input,
        weight,
        bias,
        residual,
        mean,
        torch.rsqrt(variance + eps),
        output,
        layout.channels,
        *layout.size,
        layout.rows,
        layout.blocks,
        layout.groups,
        ACTIVATION=activation,
        CHANNELS_LAST=channels_last,
        ACC=accumulator_dtype(input),
        INDEX=index_dtype(input),
    )
    argmax = input.new_empty((0,), dtype=torch.uint8)
    if pool is not None:
        whole, shape = output, pooled_shape(input.shape, window)
        output = new_image(input, shape, channels_last)
        if pool == "max" and save_for_backward:
            argmax = new_image(input, shape, channels_last, torch.uint8)
        ones = (1,) * (input.dim() - 2)
        launch_pool(
            whole, output, argmax if argmax.numel() else None, pool, *window_parts(window), ones,
            True, None, False,
        )  # fmt: skip
    shape = (input.shape[0], groups) if groups else (layout.channels,)
    return output, mean.view(shape), variance.view(shape), argmax


def _statistics(input: Tensor, layout: _Layout) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (images, groups); NaN for an empty batch, as PyTorch's."""
    if not input.shape[0]:
        nan = input.new_full(
            (layout.images, layout.groups), math.nan, dtype=opmath_dtype(input.dtype)
        )
        return nan, nan.clone()
    means, deviations = layout.new_parts(input), layout.new_parts(input)
    setting = ROW_CONFIGS[architecture()]["rows"]
    launch(
        channel_norm_stats_kernel,
        layout.sum_grid,
        setting,
        input,
        means,
        deviations,
        layout.channels,
        *layout.size,
        layout.rows,
        layout.chunks,
        layout.row_blocks,
        CHANNELS_LAST=is_channels_last(input),
        ACC=accumulator_dtype(input),
        INDEX=index_dtype(input),
    )
    chunk = layout.row_blocks * setting["BLOCK_M"]
    start = torch.arange(layout.chunks, device=input.device, dtype=torch.int64) * chunk
    count = (layout.rows - start).clamp(max=chunk).to(means.dtype).view(-1, 1, 1)
    # (images, chunks, groups, channels of a group)
    grouped = (layout.images, layout.chunks, layout.groups, -1)
    means, deviations = means.view(grouped), deviations.view(grouped)
    total = layout.rows * layout.channels // layout.groups
    mean = (means * count).sum((1, 3)) / total
    spread = (means - mean[:, None, :, None]).square() * count
    return mean, (deviations + spread).sum((1, 3)) / total


def channel_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    argmax: Tensor,
    groups: int,
    eps: float,
    activation: str | None,
    pool: str | None,
    window: Sequence[int],
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See schema_norm.py."""
    layout = _layout(input, groups)
    channels_last, opmath = is_channels_last(input), opmath_dtype(input.dtype)
    rstd = torch.rsqrt(variance + eps)
    kernel, stride, padding = window_parts(window) if pool else ((1,), (1,), (0,))
    grad_pre = new_image(input, input.shape, channels_last)
    sums, products = layout.new_parts(input), layout.new_parts(input)
    setting = ROW_CONFIGS[architecture()]["rows"]
    constants = {
        "CHANNELS_LAST": channels_last,
        "ACC": accumulator_dtype(input),
        "INDEX": index_dtype(input, grad_output),
    }
    launch(
        channel_norm_bwd_sums_kernel, layout.sum_grid, setting, grad_output,
        argmax if pool == "max" else None, input, weight, bias, residual, mean, rstd, grad_pre,
        sums, products, layout.channels, *layout.size, *three(grad_output.shape[2:]),
        *three(padding, 0), layout.rows, layout.chunks, layout.groups, layout.row_blocks,
        KERNEL=three(kernel), STRIDE=three(stride), POOL=pool, ACTIVATION=activation, **constants,
    )  # fmt: skip
    sums, products = sums.sum(1), products.sum(1)  # (images, channels)
    absent = input.new_empty
    grad_input = None
    if need_input:
        averages = []
        for total in (sums, products):
            weighted = total if weight is None else total * weight
            weighted = weighted.view(layout.images, layout.groups, -1).sum(2)
            averages.append(weighted / (layout.rows * layout.channels // layout.groups))
        grad_input = new_image(input, input.shape, channels_last)
        launch(
            channel_norm_bwd_kernel, layout.grid, setting, grad_pre, input, weight, mean, rstd,
            *averages, grad_input, layout.channels, *layout.size, layout.rows, layout.blocks,
            layout.groups, **constants,
        )  # fmt: skip
    return (
        absent(0) if grad_input is None else grad_input,
        products.sum(0) if need_weight else absent(0, dtype=opmath),
        sums.sum(0) if need_bias else absent(0, dtype=opmath),
        grad_pre if need_residual else absent(0),
    )
