"""What the kernels of one step share: their part of the layer and the products.

They serve hidden sizes whose weights do not fit one multiprocessor, and cells. A program owns
BLOCK_B sequences by BLOCK_U units of one direction. Forward, the gates of a unit are adjacent
columns of one product, so that the cell is its epilogue; backward, the product with the step after
is the prologue of the cell's gradient. Tiles of the weights are read as torch lays them out: a
column of the product is a row of the weight, contiguous along the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fmkernels.ops._triton.primitives import dot


@triton.jit
def place(batch, HIDDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr):
    """Direction, first row and first unit of a program."""
    unit_blocks: tl.constexpr = (HIDDEN + BLOCK_U - 1) // BLOCK_U
    pid = tl.program_id(0)
    blocks = tl.cdiv(batch, BLOCK_B)
    return (
        pid // unit_blocks // blocks,
        pid // unit_blocks % blocks * BLOCK_B,
        pid % unit_blocks * BLOCK_U,
    )


@triton.jit
def tile_at(
    first, first_unit, batch, HIDDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr
):
    """Rows (BLOCK_B, 1), units (1, BLOCK_U), which rows exist, which of their units exist."""
    rows = (first + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    units = first_unit + tl.arange(0, BLOCK_U)[None, :]
    row_mask = rows < batch
    return rows, units, row_mask, row_mask & (units < HIDDEN)


@triton.jit
def tile_of_step(base_ptr, strides, t, direction, rows, units, WIDTH):
    """Pointers into a tensor in the input's layout, WIDTH features per direction; strides are
    those of step and sequence."""
    return base_ptr + t * strides[0] + direction * WIDTH + rows * strides[1] + units


@triton.jit
def add_product(
    acc,
    x_ptr,  # first row of the tile
    x_stride,
    factors_ptr,  # like x with a row stride of depth, or None
    w_ptr,  # (gates * HIDDEN, depth)
    rows,
    row_mask,
    first_unit,
    depth,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc (BLOCK_B, slots * BLOCK_U) += x w^T; column u * slots + s is slot s of unit u.

    SLOTS names the gate of each slot: "one"; "lstm": i, f, g, o; a GRU keeps the two parts of n
    apart: "gru_input" fills r, z, n, and "gru_hidden" r, z, and n into the fourth.
    """
    COUNT: tl.constexpr = 1 if SLOTS == "one" else 4
    column = tl.arange(0, COUNT * BLOCK_U)
    unit = first_unit + column // COUNT
    gate = column % COUNT
    known = unit < HIDDEN
    if SLOTS == "gru_input":
        known = known & (gate < 3)
    if SLOTS == "gru_hidden":
        known = known & (gate != 2)
        gate = tl.minimum(gate, 2)
    w_rows = (gate * HIDDEN + unit).to(tl.int64) * depth
    for k in tl.range(0, depth, BLOCK_K):
        lanes = k + tl.arange(0, BLOCK_K)
        inside = row_mask & (lanes < depth)[None, :]
        x = tl.load(x_ptr + rows * x_stride + lanes[None, :], mask=inside, other=0.0)
        if factors_ptr is not None:
            factors = tl.load(factors_ptr + rows * depth + lanes[None, :], mask=inside, other=0.0)
            x = (x.to(tl.float32) * factors.to(tl.float32)).to(x.dtype)
        w = tl.load(
            w_ptr + w_rows[:, None] + lanes[None, :],
            mask=known[:, None] & (lanes < depth)[None, :],
            other=0.0,
        )
        acc = dot(x, tl.trans(w), acc, PRECISION)
    return acc


@triton.jit
def split_slots(acc, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr):
    """The four (BLOCK_B, BLOCK_U) parts of interleaved columns."""
    even, odd = tl.split(tl.reshape(acc, (BLOCK_B, BLOCK_U, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def carried_gradient(
    dnext_ptr,  # first row of the tile, (B, depth): gradients of the step after
    w_ptr,  # (depth, HIDDEN)
    rows,
    row_mask,
    units,
    last,
    depth: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What reaches the hidden state from the step after: dnext w, (BLOCK_B, BLOCK_U); zeros if
    the step is the last."""
    acc = tl.zeros((BLOCK_B, BLOCK_U), tl.float32)
    for k in tl.range(0, tl.where(last, 0, depth), BLOCK_K):
        lanes = k + tl.arange(0, BLOCK_K)
        inside = row_mask & (lanes < depth)[None, :]
        d = tl.load(dnext_ptr + rows * depth + lanes[None, :], mask=inside, other=0.0)
        w_rows = lanes.to(tl.int64)[:, None] * HIDDEN
        w = tl.load(
            w_ptr + w_rows + units, mask=(lanes < depth)[:, None] & (units < HIDDEN), other=0.0
        )
        acc = dot(d, w, acc, PRECISION)
    return acc
