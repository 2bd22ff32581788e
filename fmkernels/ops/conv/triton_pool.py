"""Pooling in Triton, and what lies between the incoming gradient and the convolution's."""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops._triton.primitives import activate_backward, as_dtype
from fmkernels.ops.conv.triton_gemm import image_offsets, larger, pixel_of


@triton.jit
def pool_fwd_kernel(
    x_ptr,
    y_ptr,
    argmax_ptr,  # uint8, or None
    N,
    C,
    ID,
    IH,
    IW,
    OD,
    OH,
    OW,
    PD,
    PH,
    PW,
    divisor,  # of an average, 0 for the number of the window's elements
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    POOL: tl.constexpr,
    COUNT_PADDING: tl.constexpr,
    MARK_ZERO: tl.constexpr,  # schema.RELU_ZERO where the maximum is not positive
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``y``: maximum or average of x over each window; rows are pixels of y."""
    rows = as_dtype(N, INDEX) * OD * OH * OW
    row = tl.program_id(0).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    mask = (row < rows)[:, None] & (c < C)[None, :]
    n, od, oh, ow = pixel_of(row, OD, OH, OW)
    if POOL == "max":
        result = tl.full((BLOCK_M, BLOCK_N), float("-inf"), ACC)
    else:
        result = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    # -1: no element seen yet, so that the first one inside counts, be it minus infinity.
    position = tl.full((BLOCK_M, BLOCK_N), -1, tl.int32)
    for tap in range(KERNEL[0] * KERNEL[1] * KERNEL[2]):
        d = od * STRIDE[0] - PD + tap // (KERNEL[1] * KERNEL[2]) * DILATION[0]
        h = oh * STRIDE[1] - PH + tap // KERNEL[2] % KERNEL[1] * DILATION[1]
        w = ow * STRIDE[2] - PW + tap % KERNEL[2] * DILATION[2]
        inside = (d >= 0) & (d < ID) & (h >= 0) & (h < IH) & (w >= 0) & (w < IW)
        at = image_offsets(n, d, h, w, c, C, ID, IH, IW, CHANNELS_LAST)
        x = tl.load(x_ptr + at, mask=inside[:, None] & mask, other=0.0).to(ACC)
        if POOL == "max":
            best, place = larger(result, position, x, tap)
            unseen = position < 0
            best = tl.where(unseen, x, best)
            place = tl.where(unseen, tap, place)
            result = tl.where(inside[:, None], best, result)
            position = tl.where(inside[:, None], place, position)
        else:
            result += x
    if POOL == "avg":
        if divisor == 0:
            area = window_area(
                od, oh, ow, ID, IH, IW, PD, PH, PW, KERNEL, STRIDE, COUNT_PADDING
            ).to(ACC)
        else:
            area = tl.zeros((BLOCK_M,), ACC) + divisor
        result = result / area[:, None]
    at = image_offsets(n, od, oh, ow, c, C, OD, OH, OW, CHANNELS_LAST)
    tl.store(y_ptr + at, result.to(y_ptr.dtype.element_ty), mask=mask)
    if argmax_ptr is not None:
        if MARK_ZERO:
            position = tl.where(result <= 0, 255, position)
        tl.store(argmax_ptr + at, position.to(tl.uint8), mask=mask)


@triton.jit
def window_area(
    od, oh, ow, ID, IH, IW, PD, PH, PW,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    COUNT_PADDING: tl.constexpr,
):  # fmt: skip
    """Number of elements that the window of a pooled pixel averages over."""
    depth = _span(od, ID, PD, KERNEL[0], STRIDE[0], COUNT_PADDING)
    height = _span(oh, IH, PH, KERNEL[1], STRIDE[1], COUNT_PADDING)
    return depth * height * _span(ow, IW, PW, KERNEL[2], STRIDE[2], COUNT_PADDING)


@triton.jit
def _span(
    o, size, padding, KERNEL: tl.constexpr, STRIDE: tl.constexpr, COUNT_PADDING: tl.constexpr
):
    start = o * STRIDE - padding
    if COUNT_PADDING:
        return tl.minimum(start + KERNEL, size + padding) - start
    else:
        return tl.minimum(start + KERNEL, size) - tl.maximum(start, 0)


@triton.jit
def conv_bwd_epilogue_kernel(
    dy_ptr,  # gradient of the (pooled) output
    argmax_ptr,  # of the pool, or None
    operand_ptr,  # what the activation's derivative reads, or None
    conv_ptr,  # result of the convolution, for the gradient of the scale, or None
    scale_ptr,  # (C) or None
    dpre_ptr,  # gradient before the activation, or None
    dconv_ptr,  # gradient of the convolution's result, or None
    dshift_ptr,  # (row programs, C) or None: sums over pixels of dpre
    dscale_ptr,  # (row programs, C) or None: sums of dpre * conv
    N,
    C,
    XD,  # pixels before the pool
    XH,
    XW,
    YD,  # pixels of dy
    YH,
    YW,
    PD,
    PH,
    PW,
    divisor,
    row_blocks,  # per program
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    POOL: tl.constexpr,
    COUNT_PADDING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Backward of pool, activation and scale in one pass; rows are pixels before the pool."""
    rows = as_dtype(N, INDEX) * XD * XH * XW
    program = tl.program_id(0)
    c = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    mask_c = c < C
    shift_sum = tl.zeros((BLOCK_N,), ACC)
    scale_sum = tl.zeros((BLOCK_N,), ACC)
    for block in range(row_blocks):
        first = (program.to(INDEX) * row_blocks + block) * BLOCK_M
        row = first + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & mask_c[None, :]
        n, d, h, w = pixel_of(row, XD, XH, XW)
        at = image_offsets(n, d, h, w, c, C, XD, XH, XW, CHANNELS_LAST)
        if POOL is None:
            grad = tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC)
        else:
            grad = unpooled(
                dy_ptr, argmax_ptr, n, d, h, w, c, mask, C, XD, XH, XW, YD, YH, YW, PD, PH, PW,
                divisor, KERNEL, STRIDE, DILATION, POOL, COUNT_PADDING, CHANNELS_LAST,
                ACC, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            if POOL == "avg" and argmax_ptr is not None:
                grad *= tl.load(argmax_ptr + at, mask=mask, other=0).to(ACC)
        if operand_ptr is not None:
            operand = tl.load(operand_ptr + at, mask=mask, other=0.0).to(ACC)
            grad = activate_backward(grad, operand, ACTIVATION)
        if dpre_ptr is not None:
            tl.store(dpre_ptr + at, grad.to(dpre_ptr.dtype.element_ty), mask=mask)
        grad = tl.where(mask, grad, 0.0)
        if dshift_ptr is not None:
            shift_sum += tl.sum(grad, 0)
        if dscale_ptr is not None:
            conv = tl.load(conv_ptr + at, mask=mask, other=0.0).to(ACC)
            scale_sum += tl.sum(grad * conv, 0)
        if dconv_ptr is not None:
            if scale_ptr is not None:
                grad *= tl.load(scale_ptr + c, mask=mask_c, other=0.0).to(ACC)[None, :]
            tl.store(dconv_ptr + at, grad.to(dconv_ptr.dtype.element_ty), mask=mask)
    sums = program.to(tl.int64) * C + c
    if dshift_ptr is not None:
        tl.store(dshift_ptr + sums, shift_sum, mask=mask_c)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + sums, scale_sum, mask=mask_c)


@triton.jit
def unpooled(
    dy_ptr, argmax_ptr, n, d, h, w, c, mask, C, XD, XH, XW, YD, YH, YW, PD, PH, PW, divisor,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    POOL: tl.constexpr,
    COUNT_PADDING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient before the pool, gathered from every window that a pixel lies in: no atomics."""
    grad = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for tap in range(KERNEL[0] * KERNEL[1] * KERNEL[2]):
        od = d + PD - tap // (KERNEL[1] * KERNEL[2]) * DILATION[0]
        oh = h + PH - tap // KERNEL[2] % KERNEL[1] * DILATION[1]
        ow = w + PW - tap % KERNEL[2] * DILATION[2]
        starts = (od >= 0) & (od % STRIDE[0] == 0) & (oh >= 0) & (oh % STRIDE[1] == 0)
        starts = starts & (ow >= 0) & (ow % STRIDE[2] == 0)
        od, oh, ow = od // STRIDE[0], oh // STRIDE[1], ow // STRIDE[2]
        starts = starts & (od < YD) & (oh < YH) & (ow < YW)
        at = image_offsets(n, od, oh, ow, c, C, YD, YH, YW, CHANNELS_LAST)
        inside = starts[:, None] & mask
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(ACC)
        if POOL == "max":
            argmax = tl.load(argmax_ptr + at, mask=inside, other=255).to(tl.int32)
            grad += tl.where(argmax == tap, dy, 0.0)
        elif divisor == 0:
            area = window_area(
                od, oh, ow, XD, XH, XW, PD, PH, PW, KERNEL, STRIDE, COUNT_PADDING
            ).to(ACC)
            # Where no window starts, the area may be zero.
            grad += tl.where(inside, dy / area[:, None], 0.0)
        else:
            grad += dy / divisor
    return grad
