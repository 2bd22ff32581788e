"""Jit helpers that any family's kernels may use; they know no op."""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops._triton.support import INTERPRETING as _INTERPRETING

INTERPRETING = tl.constexpr(_INTERPRETING)


@triton.jit
def as_dtype(scalar, DTYPE: tl.constexpr):
    """A scalar in another dtype, also where it is a constant: a loop's counter in the interpreter,
    or an argument that Triton specialised because it is 1."""
    return tl.full((), 0, DTYPE) + scalar


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a @ b``; the interpreter, whose bf16 products are wrong, gets floats."""
    if INTERPRETING:
        a = a.to(accumulator.dtype)
        b = b.to(accumulator.dtype)
    return tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=accumulator.dtype)


@triton.jit
def swizzle(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """``(pid_m, pid_n)``: columns of GROUP row tiles, so that neighbours share operands in L2."""
    group_size = GROUP * tiles_n
    first_m = (pid // group_size) * GROUP
    rows = tl.minimum(tiles_m - first_m, GROUP)
    inside = pid % group_size
    return first_m + inside % rows, inside // rows


@triton.jit
def drop(x, seed_ptr, row, column, THRESHOLD: tl.constexpr, FACTOR: tl.constexpr):
    """``x`` after dropout, with the mask of fmkernels/ops/_dropout.py, bit by bit.

    ``row`` and ``column`` broadcast against each other.
    """
    # Halves before they are broadcast: a whole tile of int64 would take twice the registers.
    row = row.to(tl.int64)
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    counter, low = tl.broadcast((column // 4).to(tl.uint32), low)
    high = tl.broadcast(high, counter)[0]
    first, second, third, fourth = tl.philox(
        tl.load(seed_ptr), low, high, counter, tl.zeros_like(counter)
    )
    lane = column % 4
    early, late = tl.where(lane == 0, first, second), tl.where(lane == 2, third, fourth)
    word = tl.where(lane < 2, early, late)
    if THRESHOLD == 4294967296:  # all of them
        return tl.zeros_like(x)
    else:
        return tl.where(word >= tl.full((), THRESHOLD, tl.uint32), x * FACTOR, 0.0)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Within 3 ulp of float32: a series near zero, where the quotient cancels."""
    square = x * x
    series = 62.0 / 2835 * square - 17.0 / 315
    series = series * square + 2.0 / 15
    series = series * square - 1.0 / 3
    series = x + x * square * series
    decay = tl.exp(-2 * tl.abs(x))
    quotient = (1 - decay) / (1 + decay)
    quotient = tl.where(x < 0, -quotient, quotient)
    if x.dtype == tl.float64:
        return quotient
    else:
        return tl.where(tl.abs(x) < 0.2, series, quotient)


@triton.jit
def _mish_ratio(x):
    """``tanh(softplus(x))`` without the overflow of either."""
    e = tl.exp(tl.minimum(x, 20.0))
    n = e * (e + 2)
    return n / (n + 2)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of ``x`` (float32 or float64), with torch's default parameters."""
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # not maximum: NaN stays
    elif ACTIVATION == "relu6":
        return tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, x, 0.01 * x)
    elif ACTIVATION == "elu":
        return tl.where(x > 0, x, tl.exp(tl.minimum(x, 0.0)) - 1)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1 + tanh(inner))
    elif ACTIVATION == "silu":
        return x * sigmoid(x)
    elif ACTIVATION == "sigmoid":
        return sigmoid(x)
    elif ACTIVATION == "tanh":
        return tanh(x)
    elif ACTIVATION == "hardswish":
        return x * _relu6(x + 3) / 6
    elif ACTIVATION == "hardsigmoid":
        return _relu6(x + 3) / 6
    elif ACTIVATION == "mish":
        return tl.where(x > 20, x, x * _mish_ratio(x))
    else:
        tl.static_assert(ACTIVATION is None, "unknown activation")
        return x


@triton.jit
def _relu6(x):
    return tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))


@triton.jit
def activate_backward(grad, x, ACTIVATION: tl.constexpr):
    """Gradient before the activation; ``x`` is the pre-activation, for relu the output."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, grad)
    elif ACTIVATION == "relu6":
        return tl.where((x <= 0) | (x >= 6), 0.0, grad)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, grad, 0.01 * grad)
    elif ACTIVATION == "elu":
        return tl.where(x <= 0, grad * tl.exp(tl.minimum(x, 0.0)), grad)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return grad * (cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACTIVATION == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        return grad * 0.5 * (1 + t + x * (1 - t * t) * slope)
    elif ACTIVATION == "silu":
        s = sigmoid(x)
        return grad * s * (1 + x * (1 - s))
    elif ACTIVATION == "sigmoid":
        s = sigmoid(x)
        return grad * s * (1 - s)
    elif ACTIVATION == "tanh":
        t = tanh(x)
        return grad * (1 - t * t)
    elif ACTIVATION == "hardswish":
        inside = grad * (x / 3 + 0.5)
        return tl.where(x <= -3, 0.0, tl.where(x < 3, inside, grad))
    elif ACTIVATION == "hardsigmoid":
        return tl.where((x > -3) & (x < 3), grad / 6, 0.0)
    elif ACTIVATION == "mish":
        ratio = tl.where(x > 20, 1.0, _mish_ratio(x))
        return grad * (ratio + x * sigmoid(x) * (1 - ratio * ratio))
    else:
        tl.static_assert(ACTIVATION is None, "unknown activation")
        return grad
