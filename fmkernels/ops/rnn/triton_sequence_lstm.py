"""The LSTM over a whole sequence in one launch, forward and backward, with every variant.

A program owns BLOCK_B sequences of one direction and all their features, so no program waits for
another: the recurrent weights are read once and stay on the multiprocessor, h and c stay in
registers (FlashRNN, Poeppel et al. 2024, and haste keep to the same plan). The equations and their
sources are in reference/lstm.py. The gradients of the weights are matrix products after the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops._triton.primitives import dot
from fmkernels.ops.rnn.triton_math import (
    activate,
    kept_part,
    lstm_gates,
    lstm_gates_backward,
    mix,
    new_part,
    normalize,
    normalize_backward,
    normalize_gates,
    rounded_gate,
    slope,
)
from fmkernels.ops.rnn.triton_tiles import (
    direction_of,
    load_bias,
    load_four,
    load_four_vectors,
    load_gate_weight,
    load_keep,
    load_lengths,
    load_peepholes,
    load_vector,
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


@triton.jit
def _squash(cell, norm_c_ptr, bias_c_ptr, known, HIDDEN, eps, BLOCK_H, ACTIVATION: tl.constexpr):
    """A of the (normalised) cell, and with layer norm N(c~) and its scale (else the cell, 1)."""
    if norm_c_ptr is None:
        return activate(cell, ACTIVATION), cell, 1.0
    else:
        normed, scale = normalize(cell, known, HIDDEN, eps)
        scaled = normed * load_vector(norm_c_ptr, HIDDEN, BLOCK_H)[None, :]
        scaled = scaled + load_vector(bias_c_ptr, HIDDEN, BLOCK_H)[None, :]
        return activate(scaled, ACTIVATION), normed, scale


@triton.jit(do_not_specialize=["steps", "batch"])
def lstm_sequence_fwd_kernel(
    pre_ptr,
    w_hh_ptr,
    bias_ih_ptr,
    bias_hh_ptr,
    w_hr_ptr,
    peephole_ptr,
    norm_ih_ptr,
    norm_hh_ptr,
    norm_c_ptr,
    bias_c_ptr,
    h0_ptr,
    c0_ptr,
    lengths_ptr,
    mask_ptr,
    zone_h_ptr,
    zone_c_ptr,
    out_ptr,
    h_n_ptr,
    c_n_ptr,
    states_ptr,
    gates_ptr,
    cells_ptr,
    normed_hh_ptr,
    scales_ptr,
    pre_strides,  # direction, step, sequence
    out_strides,  # step, sequence
    states_strides,
    steps,
    batch,
    zoneout,
    eps,
    HIDDEN: tl.constexpr,
    PROJECTED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RECURRENT_ACTIVATION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """pre: W_ih x, with layer norm N(W_ih x). Weights are stacked over the directions; the saved
    tensors and all absent options may be None; shapes as in schema.py."""
    direction, first = place_sequences(batch, BLOCK_B)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    units = rows_mask(first, batch, HIDDEN, BLOCK_B, BLOCK_H)
    known = (tl.arange(0, BLOCK_H) < HIDDEN)[None, :]
    lanes = rows_mask(first, batch, PROJECTED, BLOCK_B, BLOCK_P)
    lengths = load_lengths(lengths_ptr, first, batch, steps, BLOCK_B)

    w_hh_ptr = direction_of(w_hh_ptr, direction, 4 * HIDDEN * PROJECTED)
    bias_ih_ptr = direction_of(bias_ih_ptr, direction, 4 * HIDDEN)
    bias_hh_ptr = direction_of(bias_hh_ptr, direction, 4 * HIDDEN)
    norm_ih_ptr = direction_of(norm_ih_ptr, direction, 4 * HIDDEN)
    norm_hh_ptr = direction_of(norm_hh_ptr, direction, 4 * HIDDEN)
    norm_c_ptr = direction_of(norm_c_ptr, direction, HIDDEN)
    bias_c_ptr = direction_of(bias_c_ptr, direction, HIDDEN)
    peephole_ptr = direction_of(peephole_ptr, direction, 3 * HIDDEN)
    w_i = tl.trans(load_gate_weight(w_hh_ptr, 0, HIDDEN, PROJECTED, BLOCK_H, BLOCK_P))
    w_f = tl.trans(load_gate_weight(w_hh_ptr, 1, HIDDEN, PROJECTED, BLOCK_H, BLOCK_P))
    w_g = tl.trans(load_gate_weight(w_hh_ptr, 2, HIDDEN, PROJECTED, BLOCK_H, BLOCK_P))
    w_o = tl.trans(load_gate_weight(w_hh_ptr, 3, HIDDEN, PROJECTED, BLOCK_H, BLOCK_P))
    if w_hr_ptr is not None:
        w_hr_ptr = direction_of(w_hr_ptr, direction, PROJECTED * HIDDEN)
        w_hr = tl.trans(load_gate_weight(w_hr_ptr, 0, PROJECTED, HIDDEN, BLOCK_P, BLOCK_H))
    b_i = load_bias(bias_ih_ptr, bias_hh_ptr, 0, 0, HIDDEN, BLOCK_H)
    b_f = load_bias(bias_ih_ptr, bias_hh_ptr, 1, 0, HIDDEN, BLOCK_H)
    b_g = load_bias(bias_ih_ptr, bias_hh_ptr, 2, 0, HIDDEN, BLOCK_H)
    b_o = load_bias(bias_ih_ptr, bias_hh_ptr, 3, 0, HIDDEN, BLOCK_H)

    peepholes = load_peepholes(peephole_ptr, 0, HIDDEN, BLOCK_H)

    h_offsets = own_states(direction, first, batch, PROJECTED, BLOCK_B, BLOCK_P)
    c_offsets = own_states(direction, first, batch, HIDDEN, BLOCK_B, BLOCK_H)
    h = tl.load(h0_ptr + h_offsets, mask=lanes, other=0.0)
    c = tl.load(c0_ptr + c_offsets, mask=units, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        factors = tl.load(mask_ptr + h_offsets, mask=lanes, other=0.0).to(tl.float32)
    pre_ptr, pre_offsets = own_sequences(
        pre_ptr, pre_strides[0], pre_strides[2], direction, first, BLOCK_B, BLOCK_H
    )
    out_ptr, out_offsets = own_sequences(
        out_ptr, PROJECTED, out_strides[1], direction, first, BLOCK_B, BLOCK_P
    )

    for step in tl.range(0, steps):
        t = tl.cast(step_time(step, steps, direction), tl.int64)
        active = t < lengths
        pre = pre_ptr + t * pre_strides[1] + pre_offsets
        x_i, x_f, x_g, x_o = load_four(pre, HIDDEN, units)
        state = h
        if mask_ptr is not None:
            state = (h.to(tl.float32) * factors).to(DTYPE)
        zeros = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        a_i = dot(state, w_i, zeros, PRECISION)
        a_f = dot(state, w_f, zeros, PRECISION)
        a_g = dot(state, w_g, zeros, PRECISION)
        a_o = dot(state, w_o, zeros, PRECISION)
        # Where a step's results go in a (D, T, B, features) tensor.
        saved_row = saved_row_of(direction, t, steps, batch, first)
        gate_offsets = saved_row * (4 * HIDDEN) + tile_offsets(4 * HIDDEN, BLOCK_B, BLOCK_H)
        if norm_hh_ptr is not None:
            a_i, a_f, a_g, a_o, scale = normalize_gates(a_i, a_f, a_g, a_o, known, HIDDEN, eps)
            if normed_hh_ptr is not None:
                store_four(normed_hh_ptr + gate_offsets, HIDDEN, a_i, a_f, a_g, a_o, units)
                rows = tl.arange(0, BLOCK_B)
                scale_ptr = scales_ptr + (saved_row + rows) * 2 + 1
                tl.store(scale_ptr, tl.sum(scale, 1), mask=first + rows < batch)
            n_i, n_f, n_g, n_o = load_four_vectors(norm_hh_ptr, HIDDEN, BLOCK_H)
            a_i, a_f, a_g, a_o = a_i * n_i, a_f * n_f, a_g * n_g, a_o * n_o
            n_i, n_f, n_g, n_o = load_four_vectors(norm_ih_ptr, HIDDEN, BLOCK_H)
            x_i, x_f, x_g, x_o = x_i * n_i, x_f * n_f, x_g * n_g, x_o * n_o
        a_i += x_i + b_i
        a_f += x_f + b_f
        a_g += x_g + b_g
        a_o += x_o + b_o
        i, f, g, o, new_c = lstm_gates(
            a_i, a_f, a_g, a_o, c, peepholes, ACTIVATION, RECURRENT_ACTIVATION
        )
        squashed, _, _ = _squash(
            new_c, norm_c_ptr, bias_c_ptr, known, HIDDEN, eps, BLOCK_H, ACTIVATION
        )
        new_h = o * squashed
        if w_hr_ptr is not None:
            new_h = dot(new_h.to(DTYPE), w_hr, tl.zeros((BLOCK_B, BLOCK_P), tl.float32), PRECISION)
        saved_h = saved_row * PROJECTED + tile_offsets(PROJECTED, BLOCK_B, BLOCK_P)
        saved_c = saved_row * HIDDEN + tile_offsets(HIDDEN, BLOCK_B, BLOCK_H)
        new_h = mix(load_keep(zone_h_ptr, saved_h, lanes, zoneout), h.to(tl.float32), new_h)
        new_c = mix(load_keep(zone_c_ptr, saved_c, units, zoneout), c, new_c)
        h = tl.where(active, new_h.to(DTYPE), h)
        c = tl.where(active, new_c, c)
        visible_h = tl.where(active, h, 0.0).to(DTYPE)
        visible_c = tl.where(active, c, 0.0)
        tl.store(out_ptr + t * out_strides[0] + out_offsets, visible_h, mask=lanes)
        if states_ptr is not None:
            states, offsets = own_sequences(
                states_ptr, HIDDEN, states_strides[1], direction, first, BLOCK_B, BLOCK_H
            )
            states += t * states_strides[0]
            tl.store(states + offsets, visible_c.to(DTYPE), mask=units)
        if gates_ptr is not None:
            i = rounded_gate(tl.where(active, i, 0.0), RECURRENT_ACTIVATION, DTYPE)
            f = rounded_gate(tl.where(active, f, 0.0), RECURRENT_ACTIVATION, DTYPE)
            g = rounded_gate(tl.where(active, g, 0.0), ACTIVATION, DTYPE)
            o = rounded_gate(tl.where(active, o, 0.0), RECURRENT_ACTIVATION, DTYPE)
            store_four(gates_ptr + gate_offsets, HIDDEN, i, f, g, o, units)
            tl.store(cells_ptr + saved_c, visible_c, mask=units)
    tl.store(h_n_ptr + h_offsets, h, mask=lanes)
    tl.store(c_n_ptr + c_offsets, c.to(c_n_ptr.dtype.element_ty), mask=units)


@triton.jit(do_not_specialize=["steps", "batch"])
def lstm_sequence_bwd_kernel(
    dout_ptr,
    dh_n_ptr,
    dc_n_ptr,
    dstates_ptr,
    w_hh_ptr,
    w_hr_ptr,
    peephole_ptr,
    norm_hh_ptr,
    norm_c_ptr,
    bias_c_ptr,
    c0_ptr,
    lengths_ptr,
    mask_ptr,
    zone_h_ptr,
    zone_c_ptr,
    gates_ptr,
    cells_ptr,
    normed_hh_ptr,
    scales_ptr,
    dgates_ptr,
    drecurrent_ptr,
    dprojected_ptr,
    dnormed_ptr,
    dh0_ptr,
    dc0_ptr,
    dout_strides,  # step, sequence
    dstates_strides,
    steps,
    batch,
    zoneout,
    eps,
    HIDDEN: tl.constexpr,
    PROJECTED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RECURRENT_ACTIVATION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """From the last step to the first. For the products after the loop it writes the gradients, in
    the input's dtype and (D, T, B, features), of the gates' sums (dgates); with layer norm of
    W_hh h (drecurrent) and of norm_c * N(c~) + bias_c (dnormed); with a projection of its result
    (dprojected)."""
    direction, first = place_sequences(batch, BLOCK_B)
    DTYPE: tl.constexpr = dgates_ptr.dtype.element_ty
    units = rows_mask(first, batch, HIDDEN, BLOCK_B, BLOCK_H)
    known = (tl.arange(0, BLOCK_H) < HIDDEN)[None, :]
    lanes = rows_mask(first, batch, PROJECTED, BLOCK_B, BLOCK_P)
    lengths = load_lengths(lengths_ptr, first, batch, steps, BLOCK_B)

    w_hh_ptr = direction_of(w_hh_ptr, direction, 4 * HIDDEN * PROJECTED)
    norm_hh_ptr = direction_of(norm_hh_ptr, direction, 4 * HIDDEN)
    norm_c_ptr = direction_of(norm_c_ptr, direction, HIDDEN)
    bias_c_ptr = direction_of(bias_c_ptr, direction, HIDDEN)
    peephole_ptr = direction_of(peephole_ptr, direction, 3 * HIDDEN)
    w_i = load_gate_weight(w_hh_ptr, 0, HIDDEN, PROJECTED, BLOCK_H, BLOCK_P)
    w_f = load_gate_weight(w_hh_ptr, 1, HIDDEN, PROJECTED, BLOCK_H, BLOCK_P)
    w_g = load_gate_weight(w_hh_ptr, 2, HIDDEN, PROJECTED, BLOCK_H, BLOCK_P)
    w_o = load_gate_weight(w_hh_ptr, 3, HIDDEN, PROJECTED, BLOCK_H, BLOCK_P)
    if w_hr_ptr is not None:
        w_hr_ptr = direction_of(w_hr_ptr, direction, PROJECTED * HIDDEN)
        w_hr = load_gate_weight(w_hr_ptr, 0, PROJECTED, HIDDEN, BLOCK_P, BLOCK_H)

    peepholes = load_peepholes(peephole_ptr, 0, HIDDEN, BLOCK_H)

    h_offsets = own_states(direction, first, batch, PROJECTED, BLOCK_B, BLOCK_P)
    c_offsets = own_states(direction, first, batch, HIDDEN, BLOCK_B, BLOCK_H)
    dh = tl.load(dh_n_ptr + h_offsets, mask=lanes, other=0.0).to(tl.float32)
    dc = tl.load(dc_n_ptr + c_offsets, mask=units, other=0.0).to(tl.float32)
    c0 = tl.load(c0_ptr + c_offsets, mask=units, other=0.0).to(tl.float32)
    if mask_ptr is not None:
        factors = tl.load(mask_ptr + h_offsets, mask=lanes, other=0.0).to(tl.float32)
    dout_ptr, dout_offsets = own_sequences(
        dout_ptr, PROJECTED, dout_strides[1], direction, first, BLOCK_B, BLOCK_P
    )

    for reversed_step in tl.range(0, steps):
        step = steps - 1 - reversed_step
        t = tl.cast(step_time(step, steps, direction), tl.int64)
        active = t < lengths
        saved_row = saved_row_of(direction, t, steps, batch, first)
        gate_offsets = saved_row * (4 * HIDDEN) + tile_offsets(4 * HIDDEN, BLOCK_B, BLOCK_H)
        saved_h = saved_row * PROJECTED + tile_offsets(PROJECTED, BLOCK_B, BLOCK_P)
        saved_c = saved_row * HIDDEN + tile_offsets(HIDDEN, BLOCK_B, BLOCK_H)
        i, f, g, o = load_four(gates_ptr + gate_offsets, HIDDEN, units)
        # The state before: the step before's, c0 at a sequence's own first step.
        back = tl.where(direction == 0, -batch, batch)
        starts = starts_here(step, t, direction, lengths_ptr, lengths)
        before = tl.load(
            cells_ptr + saved_c + tl.cast(back, tl.int64) * HIDDEN,
            mask=units & (step > 0),
            other=0.0,
        )
        before = tl.where(starts, c0, before)
        keep_h = load_keep(zone_h_ptr, saved_h, lanes, zoneout)
        keep_c = load_keep(zone_c_ptr, saved_c, units, zoneout)
        if keep_c is None:
            cell = tl.load(cells_ptr + saved_c, mask=units, other=0.0)
        else:
            cell = f * before + i * g  # what was saved is mixed

        dout = tl.load(dout_ptr + t * dout_strides[0] + dout_offsets, mask=lanes, other=0.0)
        total_h = dh + dout.to(tl.float32)
        total_c = dc
        if dstates_ptr is not None:
            dstates, offsets = own_sequences(
                dstates_ptr, HIDDEN, dstates_strides[1], direction, first, BLOCK_B, BLOCK_H
            )
            dstates += t * dstates_strides[0]
            total_c = dc + tl.load(dstates + offsets, mask=units, other=0.0).to(tl.float32)
        dgated = new_part(keep_h, total_h)
        if w_hr_ptr is not None:
            dprojected = tl.where(active, dgated, 0.0).to(DTYPE)
            tl.store(dprojected_ptr + saved_h, dprojected, mask=lanes)
            zeros = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
            dgated = dot(dprojected, w_hr, zeros, PRECISION)
        squashed, normed, scale = _squash(
            cell, norm_c_ptr, bias_c_ptr, known, HIDDEN, eps, BLOCK_H, ACTIVATION
        )
        through = dgated * o * slope(squashed, ACTIVATION)
        if norm_c_ptr is not None:
            dnormed = tl.where(active & known, through, 0.0)
            tl.store(dnormed_ptr + saved_c, dnormed.to(DTYPE), mask=units)
            weight = load_vector(norm_c_ptr, HIDDEN, BLOCK_H)[None, :]
            through = normalize_backward(through * weight, normed, scale, known, HIDDEN)
        through += new_part(keep_c, total_c)
        di, df, dg, do, carried_c = lstm_gates_backward(
            i, f, g, o, before, dgated * squashed, through, peepholes, ACTIVATION,
            RECURRENT_ACTIVATION,
        )  # fmt: skip
        carried_c += kept_part(keep_c, total_c)
        # Past a sequence's end nothing is passed on: neither to the weights nor into the state.
        use = active & known
        di = tl.where(use, di, 0.0)
        df = tl.where(use, df, 0.0)
        dg = tl.where(use, dg, 0.0)
        do = tl.where(use, do, 0.0)
        store_four(dgates_ptr + gate_offsets, HIDDEN, di, df, dg, do, units)
        if norm_hh_ptr is not None:
            di, df, dg, do = _norm_hh_backward(
                di, df, dg, do, norm_hh_ptr, normed_hh_ptr + gate_offsets, scales_ptr, saved_row,
                first, batch, units, use, HIDDEN, BLOCK_H, BLOCK_B,
            )  # fmt: skip
            store_four(drecurrent_ptr + gate_offsets, HIDDEN, di, df, dg, do, units)
        carried = dot(di.to(DTYPE), w_i, tl.zeros((BLOCK_B, BLOCK_P), tl.float32), PRECISION)
        carried += dot(df.to(DTYPE), w_f, tl.zeros((BLOCK_B, BLOCK_P), tl.float32), PRECISION)
        carried += dot(dg.to(DTYPE), w_g, tl.zeros((BLOCK_B, BLOCK_P), tl.float32), PRECISION)
        carried += dot(do.to(DTYPE), w_o, tl.zeros((BLOCK_B, BLOCK_P), tl.float32), PRECISION)
        if mask_ptr is not None:
            carried = carried * factors
        dh = tl.where(active, carried + kept_part(keep_h, total_h), dh)
        dc = tl.where(active, carried_c, dc)
    if dh0_ptr is not None:
        tl.store(dh0_ptr + h_offsets, dh.to(dh0_ptr.dtype.element_ty), mask=lanes)
        tl.store(dc0_ptr + c_offsets, dc.to(dc0_ptr.dtype.element_ty), mask=units)


@triton.jit
def _norm_hh_backward(
    di, df, dg, do, norm_ptr, normed, scales_ptr, saved_row, first, batch, units, use,
    HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """From the gradients of norm_hh * N(W_hh h) to those of W_hh h, gate by gate."""
    n_i, n_f, n_g, n_o = load_four_vectors(norm_ptr, HIDDEN, BLOCK_H)
    di, df, dg, do = di * n_i, df * n_f, dg * n_g, do * n_o
    n_i, n_f, n_g, n_o = load_four(normed, HIDDEN, units)
    rows = tl.arange(0, BLOCK_B)
    scale = tl.load(scales_ptr + (saved_row + rows) * 2 + 1, mask=first + rows < batch, other=0.0)
    mean = tl.sum(di + df + dg + do, 1, keep_dims=True) / (4 * HIDDEN)
    along = tl.sum(di * n_i + df * n_f + dg * n_g + do * n_o, 1, keep_dims=True) / (4 * HIDDEN)
    di = tl.where(use, (di - mean - n_i * along) * scale[:, None], 0.0)
    df = tl.where(use, (df - mean - n_f * along) * scale[:, None], 0.0)
    dg = tl.where(use, (dg - mean - n_g * along) * scale[:, None], 0.0)
    do = tl.where(use, (do - mean - n_o * along) * scale[:, None], 0.0)
    return di, df, dg, do
