"""The GRU and the plain recurrent layer over a whole sequence in one launch each way.

The plan is that of triton_sequence_lstm.py; the equations are in reference/.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops._triton.primitives import dot, sigmoid, tanh
from fmkernels.ops.rnn.triton_math import activate, slope
from fmkernels.ops.rnn.triton_tiles import (
    direction_of,
    load_bias,
    load_four,
    load_gate_weight,
    load_lengths,
    own_sequences,
    own_states,
    place_sequences,
    rows_mask,
    saved_row_of,
    starts_here,
    step_time,
    store_four,
    tile_offsets,
)


@triton.jit(do_not_specialize=["steps", "batch"])
def gru_sequence_fwd_kernel(
    pre_ptr,
    w_hh_ptr,
    bias_ih_ptr,
    bias_hh_ptr,
    h0_ptr,
    lengths_ptr,
    out_ptr,
    h_n_ptr,
    gates_ptr,
    pre_strides,  # direction, step, sequence
    out_strides,  # step, sequence
    steps,
    batch,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """pre: W_ih x. gates, if saved: r, z, n and W_hn h + b_hn, (D, T, B, 4H)."""
    direction, first = place_sequences(batch, BLOCK_B)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    units = rows_mask(first, batch, HIDDEN, BLOCK_B, BLOCK_H)
    lengths = load_lengths(lengths_ptr, first, batch, steps, BLOCK_B)
    w_hh_ptr = direction_of(w_hh_ptr, direction, 3 * HIDDEN * HIDDEN)
    bias_ih_ptr = direction_of(bias_ih_ptr, direction, 3 * HIDDEN)
    bias_hh_ptr = direction_of(bias_hh_ptr, direction, 3 * HIDDEN)
    w_r = tl.trans(load_gate_weight(w_hh_ptr, 0, HIDDEN, HIDDEN, BLOCK_H, BLOCK_H))
    w_z = tl.trans(load_gate_weight(w_hh_ptr, 1, HIDDEN, HIDDEN, BLOCK_H, BLOCK_H))
    w_n = tl.trans(load_gate_weight(w_hh_ptr, 2, HIDDEN, HIDDEN, BLOCK_H, BLOCK_H))
    b_r = load_bias(bias_ih_ptr, bias_hh_ptr, 0, 0, HIDDEN, BLOCK_H)
    b_z = load_bias(bias_ih_ptr, bias_hh_ptr, 1, 0, HIDDEN, BLOCK_H)
    b_in = load_bias(bias_ih_ptr, None, 2, 0, HIDDEN, BLOCK_H)
    b_hn = load_bias(bias_hh_ptr, None, 2, 0, HIDDEN, BLOCK_H)
    offsets = own_states(direction, first, batch, HIDDEN, BLOCK_B, BLOCK_H)
    h = tl.load(h0_ptr + offsets, mask=units, other=0.0)
    pre_ptr, pre_offsets = own_sequences(
        pre_ptr, pre_strides[0], pre_strides[2], direction, first, BLOCK_B, BLOCK_H
    )
    out_ptr, out_offsets = own_sequences(
        out_ptr, HIDDEN, out_strides[1], direction, first, BLOCK_B, BLOCK_H
    )
    for step in tl.range(0, steps):
        t = tl.cast(step_time(step, steps, direction), tl.int64)
        active = t < lengths
        pre = pre_ptr + t * pre_strides[1] + pre_offsets
        x_r = tl.load(pre, mask=units, other=0.0).to(tl.float32)
        x_z = tl.load(pre + HIDDEN, mask=units, other=0.0).to(tl.float32)
        x_n = tl.load(pre + 2 * HIDDEN, mask=units, other=0.0).to(tl.float32)
        zeros = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        r = sigmoid(dot(h, w_r, zeros, PRECISION) + (x_r + b_r))
        z = sigmoid(dot(h, w_z, zeros, PRECISION) + (x_z + b_z))
        h_n = dot(h, w_n, zeros, PRECISION) + b_hn
        n = tanh(x_n + b_in + r * h_n)
        new_h = n + z * (h.to(tl.float32) - n)
        h = tl.where(active, new_h.to(DTYPE), h)
        visible = tl.where(active, h, 0.0).to(DTYPE)
        tl.store(out_ptr + t * out_strides[0] + out_offsets, visible, mask=units)
        if gates_ptr is not None:
            saved_row = saved_row_of(direction, t, steps, batch, first)
            gates = gates_ptr + saved_row * (4 * HIDDEN)
            gates += tile_offsets(4 * HIDDEN, BLOCK_B, BLOCK_H)
            r, z = tl.where(active, r, 0.0), tl.where(active, z, 0.0)
            n, h_n = tl.where(active, n, 0.0), tl.where(active, h_n, 0.0)
            store_four(gates, HIDDEN, r, z, n, h_n, units)
    tl.store(h_n_ptr + offsets, h, mask=units)


@triton.jit(do_not_specialize=["steps", "batch"])
def gru_sequence_bwd_kernel(
    dout_ptr,
    dh_n_ptr,
    w_hh_ptr,
    h0_ptr,
    lengths_ptr,
    out_ptr,
    gates_ptr,
    dprojected_ptr,
    drecurrent_ptr,
    dh0_ptr,
    dout_strides,  # step, sequence
    out_strides,
    steps,
    batch,
    HIDDEN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Writes the gradients of W_ih x and of W_hh h + b_hh, (D, T, B, 3H) in the input's dtype."""
    direction, first = place_sequences(batch, BLOCK_B)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    units = rows_mask(first, batch, HIDDEN, BLOCK_B, BLOCK_H)
    lengths = load_lengths(lengths_ptr, first, batch, steps, BLOCK_B)
    w_hh_ptr = direction_of(w_hh_ptr, direction, 3 * HIDDEN * HIDDEN)
    w_r = load_gate_weight(w_hh_ptr, 0, HIDDEN, HIDDEN, BLOCK_H, BLOCK_H)
    w_z = load_gate_weight(w_hh_ptr, 1, HIDDEN, HIDDEN, BLOCK_H, BLOCK_H)
    w_n = load_gate_weight(w_hh_ptr, 2, HIDDEN, HIDDEN, BLOCK_H, BLOCK_H)
    offsets = own_states(direction, first, batch, HIDDEN, BLOCK_B, BLOCK_H)
    dh = tl.load(dh_n_ptr + offsets, mask=units, other=0.0).to(tl.float32)
    h0 = tl.load(h0_ptr + offsets, mask=units, other=0.0).to(tl.float32)
    dout_ptr, dout_offsets = own_sequences(
        dout_ptr, HIDDEN, dout_strides[1], direction, first, BLOCK_B, BLOCK_H
    )
    out_ptr, out_offsets = own_sequences(
        out_ptr, HIDDEN, out_strides[1], direction, first, BLOCK_B, BLOCK_H
    )
    back = tl.where(direction == 0, -1, 1)
    for reversed_step in tl.range(0, steps):
        step = steps - 1 - reversed_step
        t = tl.cast(step_time(step, steps, direction), tl.int64)
        active = t < lengths
        saved_row = saved_row_of(direction, t, steps, batch, first)
        gates = gates_ptr + saved_row * (4 * HIDDEN)
        gates += tile_offsets(4 * HIDDEN, BLOCK_B, BLOCK_H)
        r, z, n, h_n = load_four(gates, HIDDEN, units)
        # The state before: the step before's, h0 at a sequence's own first step.
        starts = starts_here(step, t, direction, lengths_ptr, lengths)
        before = out_ptr + (t + back) * out_strides[0] + out_offsets
        before = tl.load(before, mask=units & (step > 0), other=0.0).to(tl.float32)
        before = tl.where(starts, h0, before)
        dout = tl.load(dout_ptr + t * dout_strides[0] + dout_offsets, mask=units, other=0.0)
        total = dh + dout.to(tl.float32)
        dn = total * (1.0 - z) * (1.0 - n * n)
        dz = total * (before - n) * z * (1.0 - z)
        dr = dn * h_n * r * (1.0 - r)
        dr = tl.where(active, dr, 0.0).to(DTYPE)
        dz = tl.where(active, dz, 0.0).to(DTYPE)
        dh_n = tl.where(active, dn * r, 0.0).to(DTYPE)
        dn = tl.where(active, dn, 0.0).to(DTYPE)
        rows = saved_row * (3 * HIDDEN) + tile_offsets(3 * HIDDEN, BLOCK_B, BLOCK_H)
        tl.store(dprojected_ptr + rows, dr, mask=units)
        tl.store(dprojected_ptr + rows + HIDDEN, dz, mask=units)
        tl.store(dprojected_ptr + rows + 2 * HIDDEN, dn, mask=units)
        tl.store(drecurrent_ptr + rows, dr, mask=units)
        tl.store(drecurrent_ptr + rows + HIDDEN, dz, mask=units)
        tl.store(drecurrent_ptr + rows + 2 * HIDDEN, dh_n, mask=units)
        zeros = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        carried = total * z + dot(dr, w_r, zeros, PRECISION)
        carried += dot(dz, w_z, zeros, PRECISION)
        carried += dot(dh_n, w_n, zeros, PRECISION)
        dh = tl.where(active, carried, dh)
    if dh0_ptr is not None:
        tl.store(dh0_ptr + offsets, dh.to(DTYPE), mask=units)


@triton.jit(do_not_specialize=["steps", "batch"])
def rnn_sequence_fwd_kernel(
    pre_ptr,
    w_hh_ptr,
    bias_ih_ptr,
    bias_hh_ptr,
    h0_ptr,
    lengths_ptr,
    out_ptr,
    h_n_ptr,
    pre_strides,  # direction, step, sequence
    out_strides,  # step, sequence
    steps,
    batch,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """pre: W_ih x."""
    direction, first = place_sequences(batch, BLOCK_B)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    units = rows_mask(first, batch, HIDDEN, BLOCK_B, BLOCK_H)
    lengths = load_lengths(lengths_ptr, first, batch, steps, BLOCK_B)
    w_hh_ptr = direction_of(w_hh_ptr, direction, HIDDEN * HIDDEN)
    bias_ih_ptr = direction_of(bias_ih_ptr, direction, HIDDEN)
    bias_hh_ptr = direction_of(bias_hh_ptr, direction, HIDDEN)
    w = tl.trans(load_gate_weight(w_hh_ptr, 0, HIDDEN, HIDDEN, BLOCK_H, BLOCK_H))
    bias = load_bias(bias_ih_ptr, bias_hh_ptr, 0, 0, HIDDEN, BLOCK_H)
    offsets = own_states(direction, first, batch, HIDDEN, BLOCK_B, BLOCK_H)
    h = tl.load(h0_ptr + offsets, mask=units, other=0.0)
    pre_ptr, pre_offsets = own_sequences(
        pre_ptr, pre_strides[0], pre_strides[2], direction, first, BLOCK_B, BLOCK_H
    )
    out_ptr, out_offsets = own_sequences(
        out_ptr, HIDDEN, out_strides[1], direction, first, BLOCK_B, BLOCK_H
    )
    for step in tl.range(0, steps):
        t = tl.cast(step_time(step, steps, direction), tl.int64)
        active = t < lengths
        x = tl.load(pre_ptr + t * pre_strides[1] + pre_offsets, mask=units, other=0.0)
        sums = dot(h, w, tl.zeros((BLOCK_B, BLOCK_H), tl.float32), PRECISION)
        new_h = activate(sums + (x.to(tl.float32) + bias), ACTIVATION).to(DTYPE)
        h = tl.where(active, new_h, h)
        visible = tl.where(active, h, 0.0).to(DTYPE)
        tl.store(out_ptr + t * out_strides[0] + out_offsets, visible, mask=units)
    tl.store(h_n_ptr + offsets, h, mask=units)


@triton.jit(do_not_specialize=["steps", "batch"])
def rnn_sequence_bwd_kernel(
    dout_ptr,
    dh_n_ptr,
    w_hh_ptr,
    lengths_ptr,
    out_ptr,
    dsums_ptr,
    dh0_ptr,
    dout_strides,  # step, sequence
    out_strides,
    steps,
    batch,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Writes the gradient of the sums before the activation, (D, T, B, H) in the input's dtype."""
    direction, first = place_sequences(batch, BLOCK_B)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    units = rows_mask(first, batch, HIDDEN, BLOCK_B, BLOCK_H)
    lengths = load_lengths(lengths_ptr, first, batch, steps, BLOCK_B)
    w_hh_ptr = direction_of(w_hh_ptr, direction, HIDDEN * HIDDEN)
    w = load_gate_weight(w_hh_ptr, 0, HIDDEN, HIDDEN, BLOCK_H, BLOCK_H)
    offsets = own_states(direction, first, batch, HIDDEN, BLOCK_B, BLOCK_H)
    dh = tl.load(dh_n_ptr + offsets, mask=units, other=0.0).to(tl.float32)
    dout_ptr, dout_offsets = own_sequences(
        dout_ptr, HIDDEN, dout_strides[1], direction, first, BLOCK_B, BLOCK_H
    )
    out_ptr, out_offsets = own_sequences(
        out_ptr, HIDDEN, out_strides[1], direction, first, BLOCK_B, BLOCK_H
    )
    for reversed_step in tl.range(0, steps):
        t = tl.cast(step_time(steps - 1 - reversed_step, steps, direction), tl.int64)
        active = t < lengths
        out = tl.load(out_ptr + t * out_strides[0] + out_offsets, mask=units, other=0.0)
        dout = tl.load(dout_ptr + t * dout_strides[0] + dout_offsets, mask=units, other=0.0)
        dsums = (dh + dout.to(tl.float32)) * slope(out.to(tl.float32), ACTIVATION)
        dsums = tl.where(active, dsums, 0.0).to(DTYPE)
        saved_row = saved_row_of(direction, t, steps, batch, first)
        rows = saved_row * HIDDEN + tile_offsets(HIDDEN, BLOCK_B, BLOCK_H)
        tl.store(dsums_ptr + rows, dsums, mask=units)
        carried = dot(dsums, w, tl.zeros((BLOCK_B, BLOCK_H), tl.float32), PRECISION)
        dh = tl.where(active, carried, dh)
    if dh0_ptr is not None:
        tl.store(dh0_ptr + offsets, dh.to(DTYPE), mask=units)
