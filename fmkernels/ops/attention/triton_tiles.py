"""Device helpers of the attention kernels: tiles of rows, scores, visibility and dropout.

Letters: B batch, H query heads, M queries, N keys, D head width, E value width. Scores and the
normaliser are kept in base 2 inside the kernels, because exp2 is what the hardware has.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fmkernels.ops._triton.primitives import tanh

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
POSITIVE_INFINITY = tl.constexpr(float("inf"))


class Scoring(NamedTuple):
    """What turns products of queries and keys into scores; an absent part is None.

    scale and softcap are scalars, slope is a scalar or a column of one slope per row. Position p
    (already shifted to the keys' numbering) sees keys ``p - left .. p + right`` below num_keys.
    """

    scale: object
    softcap: object
    slope: object
    left: object
    right: object
    num_keys: object


class Dropout(NamedTuple):
    """The parameters of ops/_dropout.py: a weight is dropped where its word is below threshold."""

    seed: object  # None: no dropout
    threshold: object
    factor: object  # on the kept weights


class Span(NamedTuple):
    """Rows of one sequence in a buffer; sequence is its number, batch where its buffer starts."""

    sequence: object
    batch: object
    first: object
    count: object


@triton.jit
def load_rows(
    base_ptr, start, stride, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """ROWS rows from start on of a matrix with unit last stride; 0 past count and WIDTH."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    pointers = base_ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns)
    mask = (start + rows)[:, None] < count
    if WIDTH != COLUMNS:
        mask = mask & (columns[None, :] < WIDTH)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def load_whole_rows(
    base_ptr, start, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """As :func:`load_rows` where all the rows are known to exist."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    pointers = base_ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns)
    if WIDTH != COLUMNS:
        return tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(
    base_ptr,
    tile,
    start,
    stride,
    count,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The inverse of :func:`load_rows`, rounded to the matrix's dtype."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    pointers = base_ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns)
    mask = (start + rows)[:, None] < count
    if WIDTH != COLUMNS:
        mask = mask & (columns[None, :] < WIDTH)
    tl.store(pointers, tile.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def score_tile(products, positions, columns, scoring):
    """Base-2 scores before the mask, and the softcap's derivative (1 without one).

    products: q k^T of a tile, either way round; positions and columns broadcast to its shape.
    """
    derivative = 1.0
    if scoring.softcap is not None:
        capped = tanh(products * (scoring.scale / scoring.softcap))
        derivative = 1.0 - capped * capped
        scores = capped * (scoring.softcap * LOG2_E)
    else:
        scores = products * (scoring.scale * LOG2_E)
    if scoring.slope is not None:
        distance = tl.abs(positions - columns).to(tl.float32)
        scores = scores - (scoring.slope * LOG2_E) * distance
    return scores, derivative


@triton.jit
def hide(scores, positions, columns, scoring):
    """``scores`` with -inf at the keys that a position cannot see."""
    visible = columns < scoring.num_keys
    if scoring.left is not None:
        visible = visible & (columns >= positions - scoring.left)
    if scoring.right is not None:
        visible = visible & (columns <= positions + scoring.right)
    return tl.where(visible, scores, NEGATIVE_INFINITY)


@triton.jit
def add_mask(scores, mask, first_row, first_column, rows, columns, num_rows, num_keys):
    """Adds a float mask to base-2 scores, or hides where a bool mask (as uint8) is 0.

    mask: as from load_mask_base. rows and columns are offsets from first_row and first_column that
    broadcast to the tile.
    """
    base_ptr, stride_m, stride_n = mask
    start = tl.cast(first_row, tl.int64) * stride_m + tl.cast(first_column, tl.int64) * stride_n
    inside = (first_row + rows < num_rows) & (first_column + columns < num_keys)
    values = tl.load(
        base_ptr + start + (rows * stride_m + columns * stride_n), mask=inside, other=0
    )
    if base_ptr.dtype.element_ty == tl.uint8:
        return tl.where(values != 0, scores, NEGATIVE_INFINITY)
    else:
        return scores + values.to(tl.float32) * LOG2_E


@triton.jit
def keep_tile(dropout, first_row, first_key, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which weights of a (ROWS, COLUMNS) tile survive dropout, by the rule of ops/_dropout.py.

    first_row: int64 index of the first query in lse. first_key: a multiple of 4, so that one
    counter yields the words of four adjacent columns.
    """
    QUARTER: tl.constexpr = COLUMNS // 4
    zeros = tl.zeros((ROWS, QUARTER), tl.int32)
    rows = tl.cast(first_row, tl.int64) + tl.arange(0, ROWS)
    low = rows.to(tl.int32)[:, None] + zeros
    high = (rows >> 32).to(tl.int32)[:, None] + zeros
    fours = first_key // 4 + tl.arange(0, QUARTER)[None, :] + zeros
    w0, w1, w2, w3 = tl.philox(dropout.seed, low, high, fours, zeros)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, (ROWS, COLUMNS)) >= tl.cast(dropout.threshold, tl.uint32)


@triton.jit
def count_blocks(rows, num_sequences, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr):
    """Blocks that cover ``rows`` rows. Packed sequences (SEQUENCES > 0) end inside blocks: there
    are at most ``rows // BLOCK + num_sequences``."""
    if SEQUENCES == 0:
        return tl.cdiv(rows, BLOCK)
    else:
        return rows // BLOCK + num_sequences


@triton.jit
def place_block(
    cu_seqlens_ptr, block, batch, rows, num_sequences, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr
):
    """The :class:`Span` that a block lies in, and its first row in that sequence.

    Packed: sequence n owns the blocks from ``cu[n] // BLOCK + n`` on, which leaves every sequence
    enough of them; one that begins past its sequence's end has nothing to do.
    """
    if SEQUENCES == 0:
        return Span(batch, batch, batch * 0, rows), block * BLOCK
    else:
        index = tl.arange(0, SEQUENCES)
        known = index < num_sequences
        owned_from = tl.load(cu_seqlens_ptr + index, mask=known, other=0) // BLOCK + index
        sequence = tl.sum((known & (owned_from <= block)).to(tl.int32), 0) - 1
        span = packed_span(cu_seqlens_ptr, sequence)
        return span, (block - span.first // BLOCK - sequence) * BLOCK


@triton.jit
def packed_span(cu_seqlens_ptr, sequence):
    first = tl.load(cu_seqlens_ptr + sequence)
    return Span(sequence, sequence * 0, first, tl.load(cu_seqlens_ptr + sequence + 1) - first)


@triton.jit
def other_span(cu_seqlens_ptr, span, rows, SEQUENCES: tl.constexpr):
    """The same sequence in the other buffer (the keys' for a span of queries)."""
    if SEQUENCES == 0:
        return Span(span.sequence, span.batch, span.first, rows)
    else:
        return packed_span(cu_seqlens_ptr, span.sequence)


@triton.jit
def matrix_at(base_ptr, strides, batch, head, first_row):
    """Pointer to row first_row of one head; strides are those of batch, head and row."""
    offset = tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    return base_ptr + (offset + tl.cast(first_row, tl.int64) * strides[2])


@triton.jit
def load_slope(slopes_ptr, strides, sequence, head):
    """The ALiBi slope of a head (Press et al. 2022), None if there are none."""
    if slopes_ptr is None:
        return None
    else:
        return tl.load(slopes_ptr + sequence * strides[0] + head * strides[1])


@triton.jit
def load_dropout(seed_ptr, threshold, factor):
    if seed_ptr is None:
        return Dropout(None, None, None)
    else:
        return Dropout(tl.load(seed_ptr), threshold, factor)


@triton.jit
def load_mask_base(mask_ptr, strides, span, head):
    """(pointer of one head's mask or None, query stride, key stride)"""
    if mask_ptr is None:
        return None, None, None
    else:
        base_ptr = matrix_at(mask_ptr, strides, span.batch, head, 0)
        return base_ptr, strides[2], strides[3]
