"""The convolution as an implicit matrix product, in Triton: kernels and launch configurations.

Rows are pixels, columns are channels, and the reduction runs over the kernel's taps with the
channels innermost. One kernel gathers pixels for the forward, for the gradient of the input and
for both of a transposed convolution; another makes the weight's gradient. Images have three
spatial axes here (leading ones of size 1 cost nothing), in either layout of geometry.py.

Along an axis of stride s, with padding p, dilation d and tap r:

* forward: pixel q of the result reads pixel ``q * s - p + r * d``;
* transposed: pixels ``phase + q * s`` of the result read pixel ``q + (phase + p - r * d) / s``,
  for the taps where that is whole. The same taps serve all pixels of a phase, so each phase is a
  dense convolution with a part of the kernel, and no product with zero is computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops._triton.primitives import activate, as_dtype, dot, swizzle


@triton.jit
def image_offsets(n, d, h, w, c, C, D, H, W, CHANNELS_LAST: tl.constexpr):
    """Offsets (rows, columns) of channels ``c`` at pixels ``(n, d, h, w)`` of an image."""
    if CHANNELS_LAST:
        return (((n * D + d) * H + h) * W + w)[:, None] * C + c[None, :]
    else:
        pixel = n * C * D * H * W + (d * H + h) * W + w
        return pixel[:, None] + (c * (D * H * W))[None, :]


@triton.jit
def pixel_of(row, D, H, W):
    """``(n, d, h, w)`` of a row of the matrix, the last axis fastest."""
    w = row % W
    row = row // W
    h = row % H
    row = row // H
    return row // D, row % D, h, w


@triton.jit
def padded(position, size, MODE: tl.constexpr):
    """Where a position that may lie in the padding is read, and whether it is read at all."""
    if MODE == "replicate":
        position = tl.minimum(tl.maximum(position, 0), size - 1)
    elif MODE == "circular":
        position = (position + size) % size  # padding is at most one whole turn
    elif MODE == "reflect":
        position = tl.where(position < 0, -position, position)
        position = tl.where(position < size, position, 2 * (size - 1) - position)
    # Tails of tiles may lie further out than any padding does.
    return position, (position >= 0) & (position < size)


@triton.jit
def first_tap(offset, STRIDE: tl.constexpr, DILATION: tl.constexpr, KERNEL: tl.constexpr):
    """The first tap r for which ``offset - r * DILATION`` is a multiple of STRIDE, or KERNEL."""
    found = offset * 0 + KERNEL
    for back in tl.static_range(0, STRIDE):
        r = STRIDE - 1 - back
        if r < KERNEL:
            found = tl.where((offset - r * DILATION) % STRIDE == 0, r, found)
    return found


@triton.jit
def gather_tile(
    x_ptr,
    w_ptr,
    x_channel,  # first channel of the group in x
    w_base,  # offset of the group in w
    n,
    qd,
    qh,
    qw,
    row_mask,
    phase_d,
    phase_h,
    phase_w,
    offs_o,  # columns within the group
    C,  # channels of the reduction within the group
    CO,
    x_channels,
    ID,
    IH,
    IW,
    stride_wo,
    stride_wc,
    stride_wt,
    PD,
    PH,
    PW,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    STEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PADDING_MODE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The products of one tile: the rows' pixels gathered tap by tap, times the weight."""
    if TRANSPOSED:
        first_d = first_tap(phase_d + PD, STRIDE[0], DILATION[0], KERNEL[0])
        first_h = first_tap(phase_h + PH, STRIDE[1], DILATION[1], KERNEL[1])
        first_w = first_tap(phase_w + PW, STRIDE[2], DILATION[2], KERNEL[2])
        taps_d = (KERNEL[0] - first_d + STEP[0] - 1) // STEP[0]
        taps_h = (KERNEL[1] - first_h + STEP[1] - 1) // STEP[1]
        taps_w = (KERNEL[2] - first_w + STEP[2] - 1) // STEP[2]
        base_d, base_h, base_w = qd, qh, qw
    else:
        taps_d, taps_h, taps_w = KERNEL[0], KERNEL[1], KERNEL[2]
        base_d, base_h, base_w = qd * STRIDE[0] - PD, qh * STRIDE[1] - PH, qw * STRIDE[2] - PW
    offs_k = tl.arange(0, BLOCK_K)
    mask_o = offs_o < CO
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    blocks = tl.cdiv(C, BLOCK_K)
    for step in range(0, taps_d * taps_h * taps_w * blocks):
        tap = step // blocks
        c = (step % blocks) * BLOCK_K + offs_k
        if TRANSPOSED:
            rd = first_d + tap // (taps_h * taps_w) * STEP[0]
            rh = first_h + tap // taps_w % taps_h * STEP[1]
            rw = first_w + tap % taps_w * STEP[2]
            d = base_d + (phase_d + PD - rd * DILATION[0]) // STRIDE[0]
            h = base_h + (phase_h + PH - rh * DILATION[1]) // STRIDE[1]
            w = base_w + (phase_w + PW - rw * DILATION[2]) // STRIDE[2]
        else:
            rd = tap // (KERNEL[1] * KERNEL[2])
            rh = tap // KERNEL[2] % KERNEL[1]
            rw = tap % KERNEL[2]
            d = base_d + rd * DILATION[0]
            h = base_h + rh * DILATION[1]
            w = base_w + rw * DILATION[2]
        d, inside_d = padded(d, ID, PADDING_MODE)
        h, inside_h = padded(h, IH, PADDING_MODE)
        w, inside_w = padded(w, IW, PADDING_MODE)
        inside = row_mask & inside_d & inside_h & inside_w
        mask_c = c < C
        offs_x = image_offsets(n, d, h, w, x_channel + c, x_channels, ID, IH, IW, CHANNELS_LAST)
        x = tl.load(x_ptr + offs_x, mask=inside[:, None] & mask_c[None, :], other=0.0)
        tap_index = (rd * KERNEL[1] + rh) * KERNEL[2] + rw
        offs_w = w_base + tap_index * stride_wt
        offs_w = offs_w + (c[:, None] * stride_wc + offs_o[None, :] * stride_wo)
        weight = tl.load(w_ptr + offs_w, mask=mask_c[:, None] & mask_o[None, :], other=0.0)
        accumulator = dot(x, weight, accumulator, PRECISION)
    return accumulator


@triton.jit
def conv_fwd_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,  # (channels of the result) or None, like the next three
    scale_ptr,
    shift_ptr,
    residual_ptr,  # shaped like the convolution's result
    y_ptr,
    saved_ptr,  # None, or shaped like the convolution's result: the pre-activation
    argmax_ptr,  # None, or uint8, see schema.py
    N,
    QD,  # pixels of the result per phase, all of them unless TRANSPOSED
    QH,
    QW,
    OD,  # pixels of the result
    OH,
    OW,
    ID,
    IH,
    IW,
    C,  # channels per group
    CO,
    groups,
    stride_wg,
    stride_wo,
    stride_wc,
    stride_wt,
    PD,
    PH,
    PW,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    STEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PADDING_MODE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,  # None, "max" or "avg", over 2x2 pixels
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``pool(activation(scale * (conv(x) + bias) + shift + residual))``, a tile per program."""
    rows = as_dtype(N, INDEX) * QD * QH * QW
    tiles_m = tl.cdiv(rows, BLOCK_M).to(tl.int32)
    tiles_n = tl.cdiv(CO, BLOCK_N)
    pid = tl.program_id(0)
    tiles = tiles_m * tiles_n
    group = pid // tiles % groups
    phase = pid // (tiles * groups)
    pid_m, pid_n = swizzle(pid % tiles, tiles_m, tiles_n, 8)
    row = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    if POOL is not None:
        # The four pixels of a window are neighbours, so that a tile holds whole windows.
        n, qd, ph, pw = pixel_of(row // 4, QD, QH // 2, QW // 2)
        qh = ph * 2 + row % 4 // 2
        qw = pw * 2 + row % 2
    else:
        n, qd, qh, qw = pixel_of(row, QD, QH, QW)
    phase_w = phase % STRIDE[2]
    phase_h = phase // STRIDE[2] % STRIDE[1]
    phase_d = phase // (STRIDE[2] * STRIDE[1])
    offs_o = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = gather_tile(
        x_ptr, w_ptr, group * C, group.to(INDEX) * stride_wg, n, qd, qh, qw, row < rows,
        phase_d, phase_h, phase_w, offs_o, C, CO, C * groups, ID, IH, IW,
        stride_wo, stride_wc, stride_wt, PD, PH, PW,
        KERNEL, STRIDE, DILATION, STEP, TRANSPOSED, PADDING_MODE, CHANNELS_LAST,
        PRECISION, ACC, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    od, oh, ow = qd, qh, qw
    mask_m = row < rows
    if TRANSPOSED:
        od = qd * STRIDE[0] + phase_d
        oh = qh * STRIDE[1] + phase_h
        ow = qw * STRIDE[2] + phase_w
        mask_m = mask_m & (od < OD) & (oh < OH) & (ow < OW)
    mask_o = offs_o < CO
    mask = mask_m[:, None] & mask_o[None, :]
    channel = (group * CO + offs_o).to(INDEX)
    channels = CO * groups
    offs_y = image_offsets(n, od, oh, ow, channel, channels, OD, OH, OW, CHANNELS_LAST)
    if bias_ptr is not None:
        accumulator += tl.load(bias_ptr + channel, mask=mask_o, other=0.0).to(ACC)[None, :]
    if scale_ptr is not None:
        accumulator *= tl.load(scale_ptr + channel, mask=mask_o, other=0.0).to(ACC)[None, :]
    if shift_ptr is not None:
        accumulator += tl.load(shift_ptr + channel, mask=mask_o, other=0.0).to(ACC)[None, :]
    if residual_ptr is not None:
        accumulator += tl.load(residual_ptr + offs_y, mask=mask, other=0.0).to(ACC)
    if saved_ptr is not None:
        tl.store(saved_ptr + offs_y, accumulator.to(saved_ptr.dtype.element_ty), mask=mask)
    y = activate(accumulator, ACTIVATION).to(y_ptr.dtype.element_ty)
    if POOL is None:
        tl.store(y_ptr + offs_y, y, mask=mask)
    else:
        if POOL == "avg" and argmax_ptr is not None:
            tl.store(argmax_ptr + offs_y, (y <= 0) == 0, mask=mask)
        cell = pid_m.to(INDEX) * (BLOCK_M // 4) + tl.arange(0, BLOCK_M // 4)
        n, od, ph, pw = pixel_of(cell, OD, OH // 2, OW // 2)
        offs_y = image_offsets(
            n, od, ph, pw, channel, channels, OD, OH // 2, OW // 2, CHANNELS_LAST
        )
        mask = (cell < rows // 4)[:, None] & mask_o[None, :]
        y, position = _pool_2x2(y.to(ACC), POOL, BLOCK_M, BLOCK_N)
        tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask)
        if POOL == "max" and argmax_ptr is not None:
            if ACTIVATION == "relu":
                position = tl.where(y <= 0, 255, position)  # schema.RELU_ZERO
            tl.store(argmax_ptr + offs_y, position.to(tl.uint8), mask=mask)


@triton.jit
def _pool_2x2(y, POOL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Max or average of each four rows, and the position of the first maximum."""
    windows = tl.permute(tl.reshape(y, (BLOCK_M // 4, 2, 2, BLOCK_N)), (0, 3, 1, 2))
    left, right = tl.split(windows)
    best, below = tl.split(left)
    beside, across = tl.split(right)
    position = tl.zeros((BLOCK_M // 4, BLOCK_N), tl.int32)
    if POOL == "avg":
        return (best + beside + below + across) / 4, position
    else:
        best, position = larger(best, position, beside, 1)
        best, position = larger(best, position, below, 2)
        return larger(best, position, across, 3)


@triton.jit
def larger(best, position, candidate, index):
    """NaN counts as larger than every number; the first of equals stays."""
    larger = (candidate > best) | ((candidate != candidate) & (best == best))
    return tl.where(larger, candidate, best), tl.where(larger, index, position)


@triton.jit
def conv_bwd_kernel(
    dy_ptr,  # gradient of the convolution's result
    x_ptr,
    w_ptr,
    dx_ptr,  # or None
    dw_ptr,  # (splits, *weight), or None
    N,
    XD,  # pixels of x
    XH,
    XW,
    YD,  # pixels of dy
    YH,
    YW,
    QD,  # pixels of x per phase
    QH,
    QW,
    C,  # channels of x per group
    CO,  # channels of dy per group
    groups,
    stride_wg,
    stride_wo,
    stride_wc,
    stride_wt,
    stride_db,  # of dw: its second dimension and a tap
    stride_dt,
    PD,
    PH,
    PW,
    dx_programs,
    rows_per_split,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    STEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # of the convolution that is differentiated
    PADDING_MODE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The first ``dx_programs`` programs make tiles of dx, the others parts of dw.

    dx is the adjoint of the convolution (over zero padding: dx has the padding if there is any
    other); neither waits for the other, and together they fill the device.
    """
    pid = tl.program_id(0)
    if pid < dx_programs:
        if dx_ptr is not None:
            _bwd_dx_tile(
                dy_ptr, w_ptr, dx_ptr, pid, N, XD, XH, XW, YD, YH, YW, QD, QH, QW, C, CO, groups,
                stride_wg, stride_wo, stride_wc, stride_wt, PD, PH, PW,
                KERNEL, STRIDE, DILATION, STEP, TRANSPOSED, CHANNELS_LAST,
                PRECISION, ACC, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    elif dw_ptr is not None:
        if TRANSPOSED:
            _bwd_dw_tile(
                x_ptr, dy_ptr, dw_ptr, pid - dx_programs, N, XD, XH, XW, YD, YH, YW, C, CO, groups,
                stride_db, stride_dt, PD, PH, PW, rows_per_split, KERNEL, STRIDE, DILATION,
                PADDING_MODE,
                CHANNELS_LAST, PRECISION, ACC, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _bwd_dw_tile(
                dy_ptr, x_ptr, dw_ptr, pid - dx_programs, N, YD, YH, YW, XD, XH, XW, CO, C, groups,
                stride_db, stride_dt, PD, PH, PW, rows_per_split, KERNEL, STRIDE, DILATION,
                PADDING_MODE,
                CHANNELS_LAST, PRECISION, ACC, INDEX, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _bwd_dx_tile(
    dy_ptr, w_ptr, dx_ptr, pid, N, XD, XH, XW, YD, YH, YW, QD, QH, QW, C, CO, groups,
    stride_wg, stride_wo, stride_wc, stride_wt, PD, PH, PW,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    STEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of dx: rows are pixels of x, columns channels of x, the reduction is over dy's."""
    rows = as_dtype(N, INDEX) * QD * QH * QW
    tiles_m = tl.cdiv(rows, BLOCK_M).to(tl.int32)
    tiles_n = tl.cdiv(C, BLOCK_N)
    tiles = tiles_m * tiles_n
    group = pid // tiles % groups
    phase = pid // (tiles * groups)
    pid_m, pid_n = swizzle(pid % tiles, tiles_m, tiles_n, 8)
    row = pid_m.to(INDEX) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, d, h, w = pixel_of(row, QD, QH, QW)
    phase_w = phase % STRIDE[2]
    phase_h = phase // STRIDE[2] % STRIDE[1]
    phase_d = phase // (STRIDE[2] * STRIDE[1])
    offs_c = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = gather_tile(
        dy_ptr, w_ptr, group * CO, group.to(INDEX) * stride_wg, n, d, h, w, row < rows,
        phase_d, phase_h, phase_w, offs_c, CO, C, CO * groups, YD, YH, YW,
        stride_wc, stride_wo, stride_wt, PD, PH, PW,
        KERNEL, STRIDE, DILATION, STEP, not TRANSPOSED, "zeros", CHANNELS_LAST,
        PRECISION, ACC, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    mask_m = row < rows
    if not TRANSPOSED:
        d = d * STRIDE[0] + phase_d
        h = h * STRIDE[1] + phase_h
        w = w * STRIDE[2] + phase_w
        mask_m = mask_m & (d < XD) & (h < XH) & (w < XW)
    channel = (group * C + offs_c).to(INDEX)
    offs_dx = image_offsets(n, d, h, w, channel, C * groups, XD, XH, XW, CHANNELS_LAST)
    mask = mask_m[:, None] & (offs_c < C)[None, :]
    tl.store(dx_ptr + offs_dx, accumulator.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_dw_tile(
    a_ptr, b_ptr, dw_ptr, pid, N, AD, AH, AW, BD, BH, BW, A, B, groups, stride_b, stride_t,
    PD, PH, PW, rows_per_split,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    PADDING_MODE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of ``dw[split]`` (A x B channels) for one tap, over the pixels of a split.

    ``dw[i, j, tap] = sum a[q, i] * b[q * stride - padding + tap * dilation, j]``: a is dy and b is
    x, the other way round for a transposed convolution.
    """
    taps: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    tiles_b = tl.cdiv(B, BLOCK_N)
    tiles = tl.cdiv(A, BLOCK_M) * tiles_b
    tap = pid % taps
    pid_b = pid // taps % tiles_b
    pid_a = pid // (taps * tiles_b) % tl.cdiv(A, BLOCK_M)
    group = pid // (taps * tiles) % groups
    split = pid // (taps * tiles * groups)
    offset_d = tap // (KERNEL[1] * KERNEL[2]) * DILATION[0] - PD
    offset_h = tap // KERNEL[2] % KERNEL[1] * DILATION[1] - PH
    offset_w = tap % KERNEL[2] * DILATION[2] - PW
    offs_a = pid_a * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_b = pid_b * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_a = offs_a < A
    mask_b = offs_b < B
    rows = as_dtype(N, INDEX) * AD * AH * AW
    first = split.to(INDEX) * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        mask_row = row < last
        n, ad, ah, aw = pixel_of(row, AD, AH, AW)
        bd, inside_d = padded(ad * STRIDE[0] + offset_d, BD, PADDING_MODE)
        bh, inside_h = padded(ah * STRIDE[1] + offset_h, BH, PADDING_MODE)
        bw, inside_w = padded(aw * STRIDE[2] + offset_w, BW, PADDING_MODE)
        inside = mask_row & inside_d & inside_h & inside_w
        at = image_offsets(
            n, ad, ah, aw, group * A + offs_a, A * groups, AD, AH, AW, CHANNELS_LAST
        )
        a = tl.load(a_ptr + at, mask=mask_row[:, None] & mask_a[None, :], other=0.0)
        at = image_offsets(
            n, bd, bh, bw, group * B + offs_b, B * groups, BD, BH, BW, CHANNELS_LAST
        )
        b = tl.load(b_ptr + at, mask=inside[:, None] & mask_b[None, :], other=0.0)
        accumulator = dot(tl.trans(a), b, accumulator, PRECISION)
    first_row = (split.to(tl.int64) * groups + group) * A
    offs = (first_row + offs_a)[:, None] * (B * taps) + offs_b[None, :] * stride_b
    mask = mask_a[:, None] & mask_b[None, :]
    offs += tap * stride_t
    tl.store(dw_ptr + offs, accumulator.to(dw_ptr.dtype.element_ty), mask=mask)
