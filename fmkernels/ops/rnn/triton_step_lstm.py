"""One step of an LSTM in one launch, forward and backward; the plan is in triton_step.py."""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops.rnn.triton_math import (
    activate,
    kept_part,
    lstm_gates,
    lstm_gates_backward,
    mix,
    new_part,
    rounded_gate,
    slope,
)
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
    load_keep,
    load_lengths,
    load_peepholes,
    saved_row_of,
    starts_here,
    step_time,
    store_four,
)


@triton.jit(do_not_specialize=["step", "steps", "batch"])
def lstm_step_fwd_kernel(
    x_ptr,
    pre_ptr,
    w_ih_ptr,
    w_hh_ptr,
    bias_ih_ptr,
    bias_hh_ptr,
    peephole_ptr,
    h_ptr,
    c_ptr,
    lengths_ptr,
    mask_ptr,
    zone_h_ptr,
    zone_c_ptr,
    out_ptr,
    new_h_ptr,
    new_c_ptr,
    states_ptr,
    gates_ptr,
    cells_ptr,
    x_stride,
    pre_strides,  # direction, step, sequence
    out_strides,  # step, sequence
    states_strides,
    step,
    steps,
    batch,
    zoneout,
    FEATURES: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RECURRENT_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h, c: (D, B, H) before; new_h, new_c: after. Either pre (W_ih x of all steps) or x, the only
    step's input (B, FEATURES), which is then projected here."""
    direction, first, first_unit = place(batch, HIDDEN, BLOCK_B, BLOCK_U)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    rows, units, row_mask, inside = tile_at(first, first_unit, batch, HIDDEN, BLOCK_B, BLOCK_U)
    t = tl.cast(step_time(step, steps, direction), tl.int64)
    active = t < load_lengths(lengths_ptr, first, batch, steps, BLOCK_B)
    size = tl.cast(batch, tl.int64) * HIDDEN
    w_hh_ptr = direction_of(w_hh_ptr, direction, 4 * HIDDEN * HIDDEN)
    bias_ih_ptr = direction_of(bias_ih_ptr, direction, 4 * HIDDEN)
    bias_hh_ptr = direction_of(bias_hh_ptr, direction, 4 * HIDDEN)
    peepholes = load_peepholes(
        direction_of(peephole_ptr, direction, 3 * HIDDEN), first_unit, HIDDEN, BLOCK_U
    )
    acc = tl.zeros((BLOCK_B, 4 * BLOCK_U), tl.float32)
    if x_ptr is not None:
        w_ih_ptr = direction_of(w_ih_ptr, direction, 4 * HIDDEN * FEATURES)
        acc = add_product(
            acc, x_ptr, x_stride, None, w_ih_ptr, rows, row_mask, first_unit, FEATURES, "lstm",
            HIDDEN, BLOCK_U, BLOCK_K, PRECISION,
        )  # fmt: skip
    acc = add_product(
        acc, h_ptr + direction * size, HIDDEN, direction_of(mask_ptr, direction, size), w_hh_ptr,
        rows, row_mask, first_unit, HIDDEN, "lstm", HIDDEN, BLOCK_U, BLOCK_K, PRECISION,
    )  # fmt: skip
    a_i, a_f, a_g, a_o = split_slots(acc, BLOCK_B, BLOCK_U)
    if pre_ptr is not None:
        pre = pre_ptr + tl.cast(direction, tl.int64) * pre_strides[0] + t * pre_strides[1]
        pre = pre + rows * pre_strides[2] + units
        x_i, x_f, x_g, x_o = load_four(pre, HIDDEN, inside)
        a_i, a_f, a_g, a_o = a_i + x_i, a_f + x_f, a_g + x_g, a_o + x_o
    a_i += load_bias(bias_ih_ptr, bias_hh_ptr, 0, first_unit, HIDDEN, BLOCK_U)
    a_f += load_bias(bias_ih_ptr, bias_hh_ptr, 1, first_unit, HIDDEN, BLOCK_U)
    a_g += load_bias(bias_ih_ptr, bias_hh_ptr, 2, first_unit, HIDDEN, BLOCK_U)
    a_o += load_bias(bias_ih_ptr, bias_hh_ptr, 3, first_unit, HIDDEN, BLOCK_U)
    offsets = direction * size + rows * HIDDEN + units
    h = tl.load(h_ptr + offsets, mask=inside, other=0.0)
    c = tl.load(c_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    i, f, g, o, new_c = lstm_gates(
        a_i, a_f, a_g, a_o, c, peepholes, ACTIVATION, RECURRENT_ACTIVATION
    )
    new_h = o * activate(new_c, ACTIVATION)
    saved_row = saved_row_of(direction, t, steps, batch, rows)
    saved = saved_row * HIDDEN + units
    new_h = mix(load_keep(zone_h_ptr, saved, inside, zoneout), h.to(tl.float32), new_h)
    new_c = mix(load_keep(zone_c_ptr, saved, inside, zoneout), c, new_c)
    new_h = tl.where(active, new_h.to(DTYPE), h)
    new_c = tl.where(active, new_c, c)
    tl.store(new_h_ptr + offsets, new_h, mask=inside)
    tl.store(new_c_ptr + offsets, new_c.to(new_c_ptr.dtype.element_ty), mask=inside)
    out = tile_of_step(out_ptr, out_strides, t, direction, rows, units, HIDDEN)
    tl.store(out, tl.where(active, new_h, 0.0).to(DTYPE), mask=inside)
    visible_c = tl.where(active, new_c, 0.0)
    if states_ptr is not None:
        states = tile_of_step(states_ptr, states_strides, t, direction, rows, units, HIDDEN)
        tl.store(states, visible_c.to(DTYPE), mask=inside)
    if gates_ptr is not None:
        gates = gates_ptr + saved_row * (4 * HIDDEN) + units
        i = rounded_gate(tl.where(active, i, 0.0), RECURRENT_ACTIVATION, DTYPE)
        f = rounded_gate(tl.where(active, f, 0.0), RECURRENT_ACTIVATION, DTYPE)
        g = rounded_gate(tl.where(active, g, 0.0), ACTIVATION, DTYPE)
        o = rounded_gate(tl.where(active, o, 0.0), RECURRENT_ACTIVATION, DTYPE)
        store_four(gates, HIDDEN, i, f, g, o, inside)
        tl.store(cells_ptr + saved, visible_c, mask=inside)


@triton.jit(do_not_specialize=["step", "steps", "batch"])
def lstm_step_bwd_kernel(
    dout_ptr,
    dstates_ptr,
    dh_ptr,
    dc_ptr,
    w_hh_ptr,
    peephole_ptr,
    c0_ptr,
    lengths_ptr,
    mask_ptr,
    zone_h_ptr,
    zone_c_ptr,
    gates_ptr,
    cells_ptr,
    dgates_ptr,
    dout_strides,  # step, sequence
    dstates_strides,
    step,
    steps,
    batch,
    zoneout,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RECURRENT_ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dh, dc: (D, B, H) fp32, updated in place: of the state after the step, dh without what the
    step after contributed through W_hh, which is computed here."""
    direction, first, first_unit = place(batch, HIDDEN, BLOCK_B, BLOCK_U)
    rows, units, row_mask, inside = tile_at(first, first_unit, batch, HIDDEN, BLOCK_B, BLOCK_U)
    t = tl.cast(step_time(step, steps, direction), tl.int64)
    lengths = load_lengths(lengths_ptr, first, batch, steps, BLOCK_B)
    active = t < lengths
    size = tl.cast(batch, tl.int64) * HIDDEN
    offsets = direction * size + rows * HIDDEN + units
    forward = tl.where(direction == 0, 1, -1).to(tl.int64)
    dh = tl.load(dh_ptr + offsets, mask=inside, other=0.0)
    dc = tl.load(dc_ptr + offsets, mask=inside, other=0.0)
    first_row = saved_row_of(direction, t, steps, batch, 0)
    w_hh_ptr = direction_of(w_hh_ptr, direction, 4 * HIDDEN * HIDDEN)
    carried = carried_gradient(
        dgates_ptr + (first_row + forward * batch) * (4 * HIDDEN), w_hh_ptr, rows, row_mask,
        units, step == steps - 1, 4 * HIDDEN, HIDDEN, BLOCK_B, BLOCK_U, BLOCK_K, PRECISION,
    )  # fmt: skip
    if mask_ptr is not None:
        carried *= tl.load(mask_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dh += carried
    saved = (first_row + rows) * HIDDEN + units
    gates = gates_ptr + (first_row + rows) * (4 * HIDDEN) + units
    i, f, g, o = load_four(gates, HIDDEN, inside)
    starts = starts_here(step, t, direction, lengths_ptr, lengths)
    c0 = tl.load(c0_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(cells_ptr + saved - forward * size, mask=inside & (step > 0), other=0.0)
    before = tl.where(starts, c0, before)
    keep_h = load_keep(zone_h_ptr, saved, inside, zoneout)
    keep_c = load_keep(zone_c_ptr, saved, inside, zoneout)
    if keep_c is None:
        cell = tl.load(cells_ptr + saved, mask=inside, other=0.0)
    else:
        cell = f * before + i * g  # what was saved is mixed
    peepholes = load_peepholes(
        direction_of(peephole_ptr, direction, 3 * HIDDEN), first_unit, HIDDEN, BLOCK_U
    )
    dout = tile_of_step(dout_ptr, dout_strides, t, direction, rows, units, HIDDEN)
    total_h = dh + tl.load(dout, mask=inside, other=0.0).to(tl.float32)
    total_c = dc
    if dstates_ptr is not None:
        dstates = tile_of_step(dstates_ptr, dstates_strides, t, direction, rows, units, HIDDEN)
        total_c = dc + tl.load(dstates, mask=inside, other=0.0).to(tl.float32)
    dgated = new_part(keep_h, total_h)
    squashed = activate(cell, ACTIVATION)
    through = dgated * o * slope(squashed, ACTIVATION) + new_part(keep_c, total_c)
    di, df, dg, do, carried_c = lstm_gates_backward(
        i, f, g, o, before, dgated * squashed, through, peepholes, ACTIVATION,
        RECURRENT_ACTIVATION,
    )  # fmt: skip
    dgates = dgates_ptr + (first_row + rows) * (4 * HIDDEN) + units
    di, df = tl.where(active, di, 0.0), tl.where(active, df, 0.0)
    dg, do = tl.where(active, dg, 0.0), tl.where(active, do, 0.0)
    store_four(dgates, HIDDEN, di, df, dg, do, inside)
    tl.store(dh_ptr + offsets, tl.where(active, kept_part(keep_h, total_h), dh), mask=inside)
    carried_c += kept_part(keep_c, total_c)
    tl.store(dc_ptr + offsets, tl.where(active, carried_c, dc), mask=inside)
