"""Device helpers of the recurrent kernels: activations, gates, masks, tiles of states.

Letters: T steps, B batch, H hidden features, P features of the hidden state, D directions. A tile
has BLOCK_B sequences by all (padded) features, or by BLOCK_U units in the step kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops._triton.primitives import sigmoid, tanh


@triton.jit
def activate(x, KIND: tl.constexpr):
    if KIND == "tanh":
        return tanh(x)
    elif KIND == "sigmoid":
        return sigmoid(x)
    elif KIND == "relu":
        return tl.where(x < 0, 0.0, x)  # not maximum: NaN stays
    elif KIND == "hard_sigmoid":
        return tl.where(x < -3, 0.0, tl.where(x > 3, 1.0, (x + 3.0) / 6.0))
    else:
        tl.static_assert(KIND == "identity", "unknown activation")
        return x


@triton.jit
def slope(y, KIND: tl.constexpr):
    """The derivative of an activation by its own result."""
    if KIND == "tanh":
        return 1.0 - y * y
    elif KIND == "sigmoid":
        return y * (1.0 - y)
    elif KIND == "relu":
        return tl.where(y > 0, 1.0, 0.0)
    elif KIND == "hard_sigmoid":
        return tl.where((y > 0) & (y < 1), 1.0 / 6.0, 0.0)
    else:
        tl.static_assert(KIND == "identity", "unknown activation")
        return y * 0.0 + 1.0


@triton.jit
def rounded_gate(gate, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """A gate as it is saved. A hard sigmoid below 1 must not round to 1, where its slope is 0."""
    if KIND == "hard_sigmoid":
        below_one = 1.0
        if tl.float16 == DTYPE:
            below_one = 0.99951171875
        if tl.bfloat16 == DTYPE:
            below_one = 0.99609375
        gate = tl.where((gate < 1) & (gate > below_one), below_one, gate)
    return gate.to(DTYPE)


@triton.jit
def rows_mask(first, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a (ROWS, COLUMNS) tile are in a matrix of count rows and width columns."""
    rows = first + tl.arange(0, ROWS)
    return (rows < count)[:, None] & (tl.arange(0, COLUMNS) < width)[None, :]


@triton.jit
def tile_offsets(row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.arange(0, ROWS).to(tl.int64)[:, None] * row_stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load_vector(base_ptr, width, COLUMNS: tl.constexpr):
    """A row of per-unit weights in float32, 0 past its width and without weights."""
    columns = tl.arange(0, COLUMNS)
    if base_ptr is None:
        return tl.zeros((COLUMNS,), tl.float32)
    else:
        return tl.load(base_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
def load_bias(
    first_ptr, second_ptr, gate, first_unit, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr
):
    """The sum of up to two biases of a gate for COLUMNS units, (1, COLUMNS)."""
    start = gate * HIDDEN + first_unit
    width = HIDDEN - first_unit
    total = tl.zeros((COLUMNS,), tl.float32)
    if first_ptr is not None:
        total += load_vector(first_ptr + start, width, COLUMNS)
    if second_ptr is not None:
        total += load_vector(second_ptr + start, width, COLUMNS)
    return total[None, :]


@triton.jit
def load_gate_weight(
    w_ptr,
    gate,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One gate's (HIDDEN, WIDTH) part of a recurrent weight, padded to (ROWS, COLUMNS)."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    mask = (rows < HIDDEN) & (columns < WIDTH)
    return tl.load(w_ptr + (gate * HIDDEN + rows) * WIDTH + columns, mask=mask, other=0.0)


@triton.jit
def direction_of(base_ptr, direction, size):
    """The part of one direction in a stack of weights or states; None stays None."""
    if base_ptr is None:
        return None
    else:
        return base_ptr + tl.cast(direction, tl.int64) * size


@triton.jit
def load_peepholes(peephole_ptr, first_unit, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr):
    """The peephole weights of i, f and o for COLUMNS units, each (1, COLUMNS); or Nones."""
    if peephole_ptr is None:
        return None, None, None
    else:
        base = peephole_ptr + first_unit
        width = HIDDEN - first_unit
        return (
            load_vector(base, width, COLUMNS)[None, :],
            load_vector(base + HIDDEN, width, COLUMNS)[None, :],
            load_vector(base + 2 * HIDDEN, width, COLUMNS)[None, :],
        )


@triton.jit
def lstm_gates(
    a_i, a_f, a_g, a_o, c, peepholes, ACTIVATION: tl.constexpr, RECURRENT_ACTIVATION: tl.constexpr
):
    """Activated gates i, f, g, o and the new cell, from the gates' sums."""
    if peepholes[0] is not None:
        a_i += c * peepholes[0]
        a_f += c * peepholes[1]
    i = activate(a_i, RECURRENT_ACTIVATION)
    f = activate(a_f, RECURRENT_ACTIVATION)
    g = activate(a_g, ACTIVATION)
    cell = f * c + i * g
    if peepholes[0] is not None:
        a_o += cell * peepholes[2]
    return i, f, g, activate(a_o, RECURRENT_ACTIVATION), cell


@triton.jit
def lstm_gates_backward(
    i,
    f,
    g,
    o,
    before,
    do,
    dcell,
    peepholes,
    ACTIVATION: tl.constexpr,
    RECURRENT_ACTIVATION: tl.constexpr,
):
    """Gradients of the gates' sums, and of the cell before.

    before: the cell before the step; do: gradient of the gate o; dcell: of the new cell, without
    what comes through o's peephole.
    """
    do = do * slope(o, RECURRENT_ACTIVATION)
    if peepholes[0] is not None:
        dcell += do * peepholes[2]
    di = dcell * g * slope(i, RECURRENT_ACTIVATION)
    df = dcell * before * slope(f, RECURRENT_ACTIVATION)
    dg = dcell * i * slope(g, ACTIVATION)
    dbefore = dcell * f
    if peepholes[0] is not None:
        dbefore += di * peepholes[0] + df * peepholes[1]
    return di, df, dg, do, dbefore


@triton.jit
def step_time(step, steps, direction):
    """The second direction runs backwards."""
    return tl.where(direction == 0, step, steps - 1 - step)


@triton.jit
def load_lengths(lengths_ptr, first, batch, steps, ROWS: tl.constexpr):
    """How many steps each row of a tile takes part in: (ROWS, 1)."""
    rows = first + tl.arange(0, ROWS)
    if lengths_ptr is None:
        return (rows * 0 + steps)[:, None]
    else:
        return tl.load(lengths_ptr + rows, mask=rows < batch, other=0).to(tl.int32)[:, None]


@triton.jit
def normalize(x, known, count, eps):
    """N(x) over the known columns of a row, and the reciprocal standard deviation (ROWS, 1)."""
    # Past the known columns there may be anything: a sigmoid of nothing is a half.
    mean = tl.sum(tl.where(known, x, 0.0), 1, keep_dims=True) / count
    centered = tl.where(known, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered, 1, keep_dims=True) / count + eps)
    return centered * scale, scale


@triton.jit
def normalize_backward(grad, normed, scale, known, count):
    mean = tl.sum(grad, 1, keep_dims=True) / count
    along = tl.sum(grad * normed, 1, keep_dims=True) / count
    return tl.where(known, (grad - mean - normed * along) * scale, 0.0)


@triton.jit
def normalize_gates(i, f, g, o, known, count, eps):
    """:func:`normalize` over the four gates together."""
    mean = tl.sum(i + f + g + o, 1, keep_dims=True) / (4 * count)
    i = tl.where(known, i - mean, 0.0)
    f = tl.where(known, f - mean, 0.0)
    g = tl.where(known, g - mean, 0.0)
    o = tl.where(known, o - mean, 0.0)
    variance = tl.sum(i * i + f * f + g * g + o * o, 1, keep_dims=True) / (4 * count)
    scale = tl.rsqrt(variance + eps)
    return i * scale, f * scale, g * scale, o * scale, scale


@triton.jit
def load_keep(zone_ptr, offsets, mask, zoneout):
    """Where (a mask from zone_ptr), or how much of (zoneout), the old value stays."""
    if zone_ptr is not None:
        return tl.load(zone_ptr + offsets, mask=mask, other=0).to(tl.float32)
    else:
        return zoneout


@triton.jit
def mix(keep, old, new):
    """The old value's share and the new one's; a mask (0 or 1) takes either as it is."""
    if keep is None:
        return new
    else:
        mixed = keep * old + (1.0 - keep) * new
        # Not the product where one share is all: 0 * inf is NaN.
        return tl.where(keep == 0.0, new, tl.where(keep == 1.0, old, mixed))


@triton.jit
def kept_part(keep, grad):
    """What of a gradient goes to the old value."""
    if keep is None:
        return grad * 0.0
    else:
        return tl.where(keep == 0.0, 0.0, grad * keep)


@triton.jit
def new_part(keep, grad):
    """What of a gradient goes to the new value."""
    if keep is None:
        return grad
    else:
        return tl.where(keep == 1.0, 0.0, grad * (1.0 - keep))
