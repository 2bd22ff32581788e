"""Depthwise convolution in Triton: every group has one channel on one side, so no matrix product.

``MULTIPLIER`` channels of the result read one channel of the source, or one reads ``FAN_IN``; the
weight has a row of taps for each channel of the larger side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops._triton.primitives import activate, as_dtype
from fmkernels.ops.conv.triton_gemm import image_offsets, padded, pixel_of


@triton.jit
def _gathered(
    x_ptr, w_ptr, n, od, oh, ow, channel, mask, x_channels, ID, IH, IW, PD, PH, PW,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PADDING_MODE: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    FAN_IN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums over taps (and over FAN_IN channels) at pixels (rows) and channels (columns)."""
    taps: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    mask_c = channel < x_channels // FAN_IN * MULTIPLIER
    for step in range(taps * FAN_IN):
        tap = step // FAN_IN
        rd = tap // (KERNEL[1] * KERNEL[2])
        rh = tap // KERNEL[2] % KERNEL[1]
        rw = tap % KERNEL[2]
        if TRANSPOSED:
            d, on_d = _whole(od + PD - rd * DILATION[0], STRIDE[0])
            h, on_h = _whole(oh + PH - rh * DILATION[1], STRIDE[1])
            w, on_w = _whole(ow + PW - rw * DILATION[2], STRIDE[2])
            inside = on_d & on_h & on_w & (d < ID) & (h < IH) & (w < IW)
        else:
            d, inside_d = padded(od * STRIDE[0] - PD + rd * DILATION[0], ID, PADDING_MODE)
            h, inside_h = padded(oh * STRIDE[1] - PH + rh * DILATION[1], IH, PADDING_MODE)
            w, inside_w = padded(ow * STRIDE[2] - PW + rw * DILATION[2], IW, PADDING_MODE)
            inside = inside_d & inside_h & inside_w
        source = channel // MULTIPLIER * FAN_IN + step % FAN_IN
        at = image_offsets(n, d, h, w, source, x_channels, ID, IH, IW, CHANNELS_LAST)
        x = tl.load(x_ptr + at, mask=inside[:, None] & mask, other=0.0).to(ACC)
        weight_row = source if FAN_IN > 1 else channel
        weight = tl.load(w_ptr + weight_row * taps + tap, mask=mask_c, other=0.0).to(ACC)
        total += x * weight[None, :]
    return total


@triton.jit
def _whole(position, STRIDE: tl.constexpr):
    """``position / STRIDE``, and whether that is whole and not negative."""
    return position // STRIDE, (position >= 0) & (position % STRIDE == 0)


@triton.jit
def conv_depthwise_fwd_kernel(
    x_ptr,
    w_ptr,  # (channels of the larger side, taps)
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    saved_ptr,
    N,
    x_channels,
    y_channels,
    ID,
    IH,
    IW,
    OD,
    OH,
    OW,
    PD,
    PH,
    PW,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PADDING_MODE: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    FAN_IN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``activation(scale * (conv(x) + bias) + shift + residual)``; rows are pixels of y."""
    rows = as_dtype(N, INDEX) * OD * OH * OW
    row = tl.program_id(0).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    mask_c = channel < y_channels
    mask = (row < rows)[:, None] & mask_c[None, :]
    n, d, h, w = pixel_of(row, OD, OH, OW)
    total = _gathered(
        x_ptr, w_ptr, n, d, h, w, channel, mask, x_channels, ID, IH, IW, PD, PH, PW,
        KERNEL, STRIDE, DILATION, TRANSPOSED, PADDING_MODE, MULTIPLIER, FAN_IN, CHANNELS_LAST,
        ACC, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    at = image_offsets(n, d, h, w, channel, y_channels, OD, OH, OW, CHANNELS_LAST)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=mask_c, other=0.0).to(ACC)[None, :]
    if scale_ptr is not None:
        total *= tl.load(scale_ptr + channel, mask=mask_c, other=0.0).to(ACC)[None, :]
    if shift_ptr is not None:
        total += tl.load(shift_ptr + channel, mask=mask_c, other=0.0).to(ACC)[None, :]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + at, mask=mask, other=0.0).to(ACC)
    if saved_ptr is not None:
        tl.store(saved_ptr + at, total.to(saved_ptr.dtype.element_ty), mask=mask)
    y = activate(total, ACTIVATION)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv_depthwise_bwd_kernel(
    dy_ptr,
    x_ptr,
    w_ptr,  # (channels of the larger side, taps)
    dx_ptr,  # or None
    dw_ptr,  # (splits, channels of the larger side, taps), or None
    N,
    x_channels,
    y_channels,
    XD,
    XH,
    XW,
    YD,
    YH,
    YW,
    PD,
    PH,
    PW,
    dx_programs,
    row_blocks,  # per split
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # of the convolution that is differentiated
    PADDING_MODE: tl.constexpr,
    MULTIPLIER: tl.constexpr,  # of dx from dy
    FAN_IN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The first ``dx_programs`` programs make tiles of dx, the others parts of dw."""
    pid = tl.program_id(0)
    if pid < dx_programs:
        if dx_ptr is not None:
            _bwd_dx_tile(
                dy_ptr, w_ptr, dx_ptr, pid, N, x_channels, y_channels, XD, XH, XW, YD, YH, YW,
                PD, PH, PW, KERNEL, STRIDE, DILATION, not TRANSPOSED, MULTIPLIER, FAN_IN,
                CHANNELS_LAST, ACC, INDEX, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    elif dw_ptr is not None:
        if TRANSPOSED:
            _bwd_dw_tile(
                x_ptr, dy_ptr, dw_ptr, pid - dx_programs, N, x_channels, y_channels,
                XD, XH, XW, YD, YH, YW, PD, PH, PW, row_blocks, KERNEL, STRIDE, DILATION,
                PADDING_MODE, CHANNELS_LAST, ACC, INDEX, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            _bwd_dw_tile(
                dy_ptr, x_ptr, dw_ptr, pid - dx_programs, N, y_channels, x_channels,
                YD, YH, YW, XD, XH, XW, PD, PH, PW, row_blocks, KERNEL, STRIDE, DILATION,
                PADDING_MODE, CHANNELS_LAST, ACC, INDEX, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _bwd_dx_tile(
    dy_ptr, w_ptr, dx_ptr, pid, N, x_channels, y_channels, XD, XH, XW, YD, YH, YW, PD, PH, PW,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # of the convolution that makes dx
    MULTIPLIER: tl.constexpr,
    FAN_IN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx: dy convolved with the same weight, the other way; rows are pixels of x."""
    columns = tl.cdiv(x_channels, BLOCK_N)
    rows = as_dtype(N, INDEX) * XD * XH * XW
    row = (pid // columns).to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = (pid % columns * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    mask = (row < rows)[:, None] & (channel < x_channels)[None, :]
    n, d, h, w = pixel_of(row, XD, XH, XW)
    total = _gathered(
        dy_ptr, w_ptr, n, d, h, w, channel, mask, y_channels, YD, YH, YW, PD, PH, PW,
        KERNEL, STRIDE, DILATION, TRANSPOSED, "zeros", MULTIPLIER, FAN_IN, CHANNELS_LAST,
        ACC, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    at = image_offsets(n, d, h, w, channel, x_channels, XD, XH, XW, CHANNELS_LAST)
    tl.store(dx_ptr + at, total.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_dw_tile(
    a_ptr, b_ptr, dw_ptr, pid, N, a_channels, b_channels, AD, AH, AW, BD, BH, BW, PD, PH, PW,
    row_blocks,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    PADDING_MODE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``dw[split, c, tap] = sum a[q, c] * b[q * stride - padding + tap * dilation, c]``: a is dy
    and b is x, the other way round for a transposed convolution."""
    taps: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    channels = tl.maximum(a_channels, b_channels)
    columns = tl.cdiv(channels, BLOCK_N)
    tap = pid % taps
    column = pid // taps % columns
    split = pid // (taps * columns)
    channel = (column * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    mask_c = channel < channels
    a_channel = channel // (channels // a_channels)
    b_channel = channel // (channels // b_channels)
    offset_d = tap // (KERNEL[1] * KERNEL[2]) * DILATION[0] - PD
    offset_h = tap // KERNEL[2] % KERNEL[1] * DILATION[1] - PH
    offset_w = tap % KERNEL[2] * DILATION[2] - PW
    rows = as_dtype(N, INDEX) * AD * AH * AW
    total = tl.zeros((BLOCK_N,), ACC)
    for block in range(row_blocks):
        row = (split.to(INDEX) * row_blocks + block) * BLOCK_M + tl.arange(0, BLOCK_M)
        n, d, h, w = pixel_of(row, AD, AH, AW)
        mask = (row < rows)[:, None] & mask_c[None, :]
        at = image_offsets(n, d, h, w, a_channel, a_channels, AD, AH, AW, CHANNELS_LAST)
        a = tl.load(a_ptr + at, mask=mask, other=0.0).to(ACC)
        d, inside_d = padded(d * STRIDE[0] + offset_d, BD, PADDING_MODE)
        h, inside_h = padded(h * STRIDE[1] + offset_h, BH, PADDING_MODE)
        w, inside_w = padded(w * STRIDE[2] + offset_w, BW, PADDING_MODE)
        mask = mask & (inside_d & inside_h & inside_w)[:, None]
        at = image_offsets(n, d, h, w, b_channel, b_channels, BD, BH, BW, CHANNELS_LAST)
        b = tl.load(b_ptr + at, mask=mask, other=0.0).to(ACC)
        total += tl.sum(a * b, 0)
    at = (split.to(tl.int64) * channels + channel) * taps + tap
    tl.store(dw_ptr + at, total.to(dw_ptr.dtype.element_ty), mask=mask_c)
