"""One step of a GRU or of a plain recurrent layer in one launch; the plan is in triton_step.py."""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops._triton.primitives import sigmoid, tanh
from fmkernels.ops.rnn.triton_math import activate, slope
from fmkernels.ops.rnn.triton_step import (
    add_product,
    carried_gradient,
    place,
    split_slots,
    tile_at,
    tile_of_step,
)
from fmkernels.ops.rnn.triton_tiles import (
    direction_of,
    load_bias,
    load_four,
    load_lengths,
    saved_row_of,
    starts_here,
    step_time,
    store_four,
)


@triton.jit(do_not_specialize=["step", "steps", "batch"])
def gru_step_fwd_kernel(
    x_ptr,
    pre_ptr,
    w_ih_ptr,
    w_hh_ptr,
    bias_ih_ptr,
    bias_hh_ptr,
    h_ptr,
    lengths_ptr,
    out_ptr,
    new_h_ptr,
    gates_ptr,
    x_stride,
    pre_strides,  # direction, step, sequence
    out_strides,  # step, sequence
    step,
    steps,
    batch,
    FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As :func:`lstm_step_fwd_kernel`."""
    direction, first, first_unit = place(batch, HIDDEN, BLOCK_B, BLOCK_U)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows, units, row_mask, inside = tile_at(first, first_unit, batch, HIDDEN, BLOCK_B, BLOCK_U)
    t = tl.cast(step_time(step, steps, direction), tl.int64)
    active = t < load_lengths(lengths_ptr, first, batch, steps, BLOCK_B)
    size = tl.cast(batch, tl.int64) * HIDDEN
    w_hh_ptr = direction_of(w_hh_ptr, direction, 3 * HIDDEN * HIDDEN)
    bias_ih_ptr = direction_of(bias_ih_ptr, direction, 3 * HIDDEN)
    bias_hh_ptr = direction_of(bias_hh_ptr, direction, 3 * HIDDEN)
    acc = tl.zeros((BLOCK_B, 4 * BLOCK_U), tl.float32)
    if x_ptr is not None:
        w_ih_ptr = direction_of(w_ih_ptr, direction, 3 * HIDDEN * FEATURES)
        acc = add_product(
            acc, x_ptr, x_stride, None, w_ih_ptr, rows, row_mask, first_unit, FEATURES,
            "gru_input", HIDDEN, BLOCK_U, BLOCK_K, PRECISION,
        )  # fmt: skip
    acc = add_product(
        acc, h_ptr + direction * size, HIDDEN, None, w_hh_ptr, rows, row_mask, first_unit, HIDDEN,
        "gru_hidden", HIDDEN, BLOCK_U, BLOCK_K, PRECISION,
    )  # fmt: skip
    a_r, a_z, x_n, h_n = split_slots(acc, BLOCK_B, BLOCK_U)
    if pre_ptr is not None:
        pre = pre_ptr + tl.cast(direction, tl.int64) * pre_strides[0] + t * pre_strides[1]
        pre = pre + rows * pre_strides[2] + units
        a_r += tl.load(pre, mask=inside, other=0.0).to(tl.float32)
        a_z += tl.load(pre + HIDDEN, mask=inside, other=0.0).to(tl.float32)
        x_n += tl.load(pre + 2 * HIDDEN, mask=inside, other=0.0).to(tl.float32)
    a_r += load_bias(bias_ih_ptr, bias_hh_ptr, 0, first_unit, HIDDEN, BLOCK_U)
    a_z += load_bias(bias_ih_ptr, bias_hh_ptr, 1, first_unit, HIDDEN, BLOCK_U)
    x_n += load_bias(bias_ih_ptr, None, 2, first_unit, HIDDEN, BLOCK_U)
    h_n += load_bias(bias_hh_ptr, None, 2, first_unit, HIDDEN, BLOCK_U)
    offsets = direction * size + rows * HIDDEN + units
    h = tl.load(h_ptr + offsets, mask=inside, other=0.0)
    r = sigmoid(a_r)
    z = sigmoid(a_z)
    n = tanh(x_n + r * h_n)
    new_h = n + z * (h.to(tl.float32) - n)
    new_h = tl.where(active, new_h.to(DTYPE), h)
    tl.store(new_h_ptr + offsets, new_h, mask=inside)
    out = tile_of_step(out_ptr, out_strides, t, direction, rows, units, HIDDEN)
    tl.store(out, tl.where(active, new_h, 0.0).to(DTYPE), mask=inside)
    if gates_ptr is not None:
        saved_row = saved_row_of(direction, t, steps, batch, rows)
        gates = gates_ptr + saved_row * (4 * HIDDEN) + units
        r, z = tl.where(active, r, 0.0), tl.where(active, z, 0.0)
        n, h_n = tl.where(active, n, 0.0), tl.where(active, h_n, 0.0)
        store_four(gates, HIDDEN, r, z, n, h_n, inside)


@triton.jit(do_not_specialize=["step", "steps", "batch"])
def gru_step_bwd_kernel(
    dout_ptr,
    dh_ptr,
    w_hh_ptr,
    h0_ptr,
    lengths_ptr,
    out_ptr,
    gates_ptr,
    dprojected_ptr,
    drecurrent_ptr,
    dout_strides,  # step, sequence
    out_strides,
    step,
    steps,
    batch,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As :func:`lstm_step_bwd_kernel`; dprojected and drecurrent as in the sequence kernel."""
    direction, first, first_unit = place(batch, HIDDEN, BLOCK_B, BLOCK_U)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows, units, row_mask, inside = tile_at(first, first_unit, batch, HIDDEN, BLOCK_B, BLOCK_U)
    t = tl.cast(step_time(step, steps, direction), tl.int64)
    lengths = load_lengths(lengths_ptr, first, batch, steps, BLOCK_B)
    active = t < lengths
    size = tl.cast(batch, tl.int64) * HIDDEN
    offsets = direction * size + rows * HIDDEN + units
    forward = tl.where(direction == 0, 1, -1).to(tl.int64)
    dh = tl.load(dh_ptr + offsets, mask=inside, other=0.0)
    first_row = saved_row_of(direction, t, steps, batch, 0)
    w_hh_ptr = direction_of(w_hh_ptr, direction, 3 * HIDDEN * HIDDEN)
    dh += carried_gradient(
        drecurrent_ptr + (first_row + forward * batch) * (3 * HIDDEN), w_hh_ptr, rows, row_mask,
        units, step == steps - 1, 3 * HIDDEN, HIDDEN, BLOCK_B, BLOCK_U, BLOCK_K, PRECISION,
    )  # fmt: skip
    gates = gates_ptr + (first_row + rows) * (4 * HIDDEN) + units
    r, z, n, h_n = load_four(gates, HIDDEN, inside)
    starts = starts_here(step, t, direction, lengths_ptr, lengths)
    h0 = tl.load(h0_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    before = tile_of_step(out_ptr, out_strides, t - forward, direction, rows, units, HIDDEN)
    before = tl.load(before, mask=inside & (step > 0), other=0.0).to(tl.float32)
    before = tl.where(starts, h0, before)
    dout = tile_of_step(dout_ptr, dout_strides, t, direction, rows, units, HIDDEN)
    total = dh + tl.load(dout, mask=inside, other=0.0).to(tl.float32)
    dn = tl.where(active, total * (1.0 - z) * (1.0 - n * n), 0.0)
    dz = tl.where(active, total * (before - n) * z * (1.0 - z), 0.0)
    dr = dn * h_n * r * (1.0 - r)
    targets = (first_row + rows) * (3 * HIDDEN) + units
    tl.store(dprojected_ptr + targets, dr.to(DTYPE), mask=inside)
    tl.store(dprojected_ptr + targets + HIDDEN, dz.to(DTYPE), mask=inside)
    tl.store(dprojected_ptr + targets + 2 * HIDDEN, dn.to(DTYPE), mask=inside)
    tl.store(drecurrent_ptr + targets, dr.to(DTYPE), mask=inside)
    tl.store(drecurrent_ptr + targets + HIDDEN, dz.to(DTYPE), mask=inside)
    tl.store(drecurrent_ptr + targets + 2 * HIDDEN, (dn * r).to(DTYPE), mask=inside)
    tl.store(dh_ptr + offsets, tl.where(active, total * z, dh), mask=inside)


@triton.jit(do_not_specialize=["step", "steps", "batch"])
def rnn_step_fwd_kernel(
    x_ptr,
    pre_ptr,
    w_ih_ptr,
    w_hh_ptr,
    bias_ih_ptr,
    bias_hh_ptr,
    h_ptr,
    lengths_ptr,
    out_ptr,
    new_h_ptr,
    x_stride,
    pre_strides,  # direction, step, sequence
    out_strides,  # step, sequence
    step,
    steps,
    batch,
    FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As :func:`lstm_step_fwd_kernel`."""
    direction, first, first_unit = place(batch, HIDDEN, BLOCK_B, BLOCK_U)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows, units, row_mask, inside = tile_at(first, first_unit, batch, HIDDEN, BLOCK_B, BLOCK_U)
    t = tl.cast(step_time(step, steps, direction), tl.int64)
    active = t < load_lengths(lengths_ptr, first, batch, steps, BLOCK_B)
    size = tl.cast(batch, tl.int64) * HIDDEN
    w_hh_ptr = direction_of(w_hh_ptr, direction, HIDDEN * HIDDEN)
    bias_ih_ptr = direction_of(bias_ih_ptr, direction, HIDDEN)
    bias_hh_ptr = direction_of(bias_hh_ptr, direction, HIDDEN)
    acc = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
    if x_ptr is not None:
        w_ih_ptr = direction_of(w_ih_ptr, direction, HIDDEN * FEATURES)
        acc = add_product(
            acc, x_ptr, x_stride, None, w_ih_ptr, rows, row_mask, first_unit, FEATURES, "one",
            HIDDEN, BLOCK_U, BLOCK_K, PRECISION,
        )  # fmt: skip
    acc = add_product(
        acc, h_ptr + direction * size, HIDDEN, None, w_hh_ptr, rows, row_mask, first_unit, HIDDEN,
        "one", HIDDEN, BLOCK_U, BLOCK_K, PRECISION,
    )  # fmt: skip
    if pre_ptr is not None:
        pre = pre_ptr + tl.cast(direction, tl.int64) * pre_strides[0] + t * pre_strides[1]
        pre = pre + rows * pre_strides[2] + units
        acc += tl.load(pre, mask=inside, other=0.0).to(tl.float32)
    acc += load_bias(bias_ih_ptr, bias_hh_ptr, 0, first_unit, HIDDEN, BLOCK_U)
    offsets = direction * size + rows * HIDDEN + units
    h = tl.load(h_ptr + offsets, mask=inside, other=0.0)
    new_h = tl.where(active, activate(acc, ACTIVATION).to(DTYPE), h)
    tl.store(new_h_ptr + offsets, new_h, mask=inside)
    out = tile_of_step(out_ptr, out_strides, t, direction, rows, units, HIDDEN)
    tl.store(out, tl.where(active, new_h, 0.0).to(DTYPE), mask=inside)


@triton.jit(do_not_specialize=["step", "steps", "batch"])
def rnn_step_bwd_kernel(
    dout_ptr,
    dh_ptr,
    w_hh_ptr,
    lengths_ptr,
    out_ptr,
    dsums_ptr,
    dout_strides,  # step, sequence
    out_strides,
    step,
    steps,
    batch,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As :func:`lstm_step_bwd_kernel`; dsums as in the sequence kernel."""
    direction, first, first_unit = place(batch, HIDDEN, BLOCK_B, BLOCK_U)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows, units, row_mask, inside = tile_at(first, first_unit, batch, HIDDEN, BLOCK_B, BLOCK_U)
    t = tl.cast(step_time(step, steps, direction), tl.int64)
    active = t < load_lengths(lengths_ptr, first, batch, steps, BLOCK_B)
    size = tl.cast(batch, tl.int64) * HIDDEN
    offsets = direction * size + rows * HIDDEN + units
    forward = tl.where(direction == 0, 1, -1).to(tl.int64)
    dh = tl.load(dh_ptr + offsets, mask=inside, other=0.0)
    first_row = saved_row_of(direction, t, steps, batch, 0)
    w_hh_ptr = direction_of(w_hh_ptr, direction, HIDDEN * HIDDEN)
    dh += carried_gradient(
        dsums_ptr + (first_row + forward * batch) * HIDDEN, w_hh_ptr, rows, row_mask, units,
        step == steps - 1, HIDDEN, HIDDEN, BLOCK_B, BLOCK_U, BLOCK_K, PRECISION,
    )  # fmt: skip
    out = tile_of_step(out_ptr, out_strides, t, direction, rows, units, HIDDEN)
    y = tl.load(out, mask=inside, other=0.0).to(tl.float32)
    dout = tile_of_step(dout_ptr, dout_strides, t, direction, rows, units, HIDDEN)
    dsums = (dh + tl.load(dout, mask=inside, other=0.0).to(tl.float32)) * slope(y, ACTIVATION)
    dsums = tl.where(active, dsums, 0.0).to(DTYPE)
    tl.store(dsums_ptr + (first_row + rows) * HIDDEN + units, dsums, mask=inside)
    tl.store(dh_ptr + offsets, tl.where(active, 0.0, dh), mask=inside)
