"""Tiles of the recurrent kernels: which part a program owns, loads and stores of its operands.

Letters: T steps, B batch, H hidden features, P features of the hidden state, D directions. A tile
has BLOCK_B sequences by all (padded) features, or by BLOCK_U units in the step kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_sequences(batch, BLOCK_B: tl.constexpr):
    """Direction and first sequence of a program that owns BLOCK_B whole sequences."""
    blocks = tl.cdiv(batch, BLOCK_B)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_B


@triton.jit
def rows_mask(first, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a (ROWS, COLUMNS) tile are in a matrix of count rows and width columns."""
    rows = first + tl.arange(0, ROWS)
    return (rows < count)[:, None] & (tl.arange(0, COLUMNS) < width)[None, :]


@triton.jit
def tile_offsets(row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.arange(0, ROWS).to(tl.int64)[:, None] * row_stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def own_states(direction, first, batch, WIDTH, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of a program's tile in a (D, B, WIDTH) tensor."""
    row = tl.cast(direction, tl.int64) * batch + first
    return row * WIDTH + tile_offsets(WIDTH, ROWS, COLUMNS)


@triton.jit
def own_sequences(
    base_ptr,
    direction_stride,
    sequence_stride,
    direction,
    first,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Pointer to a program's first sequence at step 0, and its tile's offsets from there."""
    start = tl.cast(direction, tl.int64) * direction_stride
    start += tl.cast(first, tl.int64) * sequence_stride
    return base_ptr + start, tile_offsets(sequence_stride, ROWS, COLUMNS)


@triton.jit
def saved_row_of(direction, t, steps, batch, first):
    """The row of a tile's first sequence in a (D, T, B, features) tensor."""
    return (tl.cast(direction, tl.int64) * steps + t) * batch + first


@triton.jit
def load_four(pointers, width, mask):
    """Four tiles in float32, ``width`` elements apart: the gates of a row lie side by side."""
    return (
        tl.load(pointers, mask=mask, other=0.0).to(tl.float32),
        tl.load(pointers + width, mask=mask, other=0.0).to(tl.float32),
        tl.load(pointers + 2 * width, mask=mask, other=0.0).to(tl.float32),
        tl.load(pointers + 3 * width, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def store_four(pointers, width, first, second, third, fourth, mask):
    """The inverse of :func:`load_four`, rounded to the dtype pointed at."""
    DTYPE: tl.constexpr = pointers.dtype.element_ty
    tl.store(pointers, first.to(DTYPE), mask=mask)
    tl.store(pointers + width, second.to(DTYPE), mask=mask)
    tl.store(pointers + 2 * width, third.to(DTYPE), mask=mask)
    tl.store(pointers + 3 * width, fourth.to(DTYPE), mask=mask)


@triton.jit
def load_vector(base_ptr, width, COLUMNS: tl.constexpr):
    """A row of per-unit weights in float32, 0 past its width and without weights."""
    columns = tl.arange(0, COLUMNS)
    if base_ptr is None:
        return tl.zeros((COLUMNS,), tl.float32)
    else:
        return tl.load(base_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
def load_four_vectors(base_ptr, width, COLUMNS: tl.constexpr):
    """:func:`load_vector` of each gate, (1, COLUMNS)."""
    return (
        load_vector(base_ptr, width, COLUMNS)[None, :],
        load_vector(base_ptr + width, width, COLUMNS)[None, :],
        load_vector(base_ptr + 2 * width, width, COLUMNS)[None, :],
        load_vector(base_ptr + 3 * width, width, COLUMNS)[None, :],
    )


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
def load_keep(zone_ptr, offsets, mask, zoneout):
    """Where (a mask from zone_ptr), or how much of (zoneout), the old value stays."""
    if zone_ptr is not None:
        return tl.load(zone_ptr + offsets, mask=mask, other=0).to(tl.float32)
    else:
        return zoneout


@triton.jit
def direction_of(base_ptr, direction, size):
    """The part of one direction in a stack of weights or states; None stays None."""
    if base_ptr is None:
        return None
    else:
        return base_ptr + tl.cast(direction, tl.int64) * size


@triton.jit
def step_time(step, steps, direction):
    """The second direction runs backwards."""
    return tl.where(direction == 0, step, steps - 1 - step)


@triton.jit
def load_lengths(lengths_ptr, first, batch, steps, ROWS: tl.constexpr):
    """How many steps each row of a tile takes part in: (ROWS, 1).

    Lengths are the caller's data on the device, in int64: they are cut off at what there is before
    they lose their upper half.
    """
    rows = first + tl.arange(0, ROWS)
    if lengths_ptr is None:
        return (rows * 0 + steps)[:, None]
    else:
        lengths = tl.load(lengths_ptr + rows, mask=rows < batch, other=0)
        return tl.minimum(tl.maximum(lengths, 0), steps).to(tl.int32)[:, None]


@triton.jit
def starts_here(step, t, direction, lengths_ptr, lengths):
    """Whether a row begins with its initial state at a step: at its own last one if backwards."""
    starts = step == 0
    if lengths_ptr is not None:
        starts = starts | ((direction == 1) & (t == lengths - 1))
    return starts
