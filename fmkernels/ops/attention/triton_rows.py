"""Products of rows that a program holds whole, or reads in chunks where registers are too few."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fmkernels.ops._triton.primitives import dot
from fmkernels.ops.attention.triton_tiles import load_rows


class Rows(NamedTuple):
    """Rows from start on of a matrix that has count rows; tile holds them, or is None."""

    tile: object
    base_ptr: object
    start: object
    stride: object
    count: object


@triton.jit
def take_rows(
    base_ptr,
    start,
    stride,
    count,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """:class:`Rows` for :func:`row_products`: loaded, unless it reads them by CHUNK features."""
    tile = None
    if CHUNK == 0:
        tile = load_rows(base_ptr, start, stride, count, WIDTH, ROWS, COLUMNS)
    return Rows(tile, base_ptr, start, stride, count)


@triton.jit
def held_rows(rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile of :class:`Rows`, loaded now if nothing holds it."""
    if rows.tile is None:
        return load_rows(rows.base_ptr, rows.start, rows.stride, rows.count, WIDTH, ROWS, COLUMNS)
    else:
        return rows.tile


@triton.jit
def row_products(
    a,
    b,
    WIDTH: tl.constexpr,
    ROWS_A: tl.constexpr,
    ROWS_B: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a b^T of two :class:`Rows`.

    CHUNK > 0: CHUNK features of both are read at a time. For the widest heads, whose rows as
    operands of a matrix instruction would take all the registers, as every warp holds them whole.
    """
    products = tl.zeros((ROWS_A, ROWS_B), tl.float32)
    if CHUNK == 0:
        return dot(a.tile, tl.trans(b.tile), products, PRECISION)
    else:
        WHOLE: tl.constexpr = WIDTH // CHUNK * CHUNK
        for first in tl.range(0, WHOLE, CHUNK):
            products = _add_products(
                products, a, b, first, CHUNK, ROWS_A, ROWS_B, CHUNK, PRECISION
            )
        if WHOLE < WIDTH:
            products = _add_products(
                products, a, b, WHOLE, WIDTH - WHOLE, ROWS_A, ROWS_B, CHUNK, PRECISION
            )
        return products


@triton.jit
def _add_products(
    products,
    a,
    b,
    first,
    WIDTH: tl.constexpr,
    ROWS_A: tl.constexpr,
    ROWS_B: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``products`` and those of the WIDTH features from first on."""
    part_a = load_rows(a.base_ptr + first, a.start, a.stride, a.count, WIDTH, ROWS_A, CHUNK)
    part_b = load_rows(b.base_ptr + first, b.start, b.stride, b.count, WIDTH, ROWS_B, CHUNK)
    return dot(part_a, tl.trans(part_b), products, PRECISION)
