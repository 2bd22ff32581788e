"""The mathematics of the recurrent kernels on tiles: activations, gates, layer norm, zoneout.

The equations and their sources are in reference/.
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
