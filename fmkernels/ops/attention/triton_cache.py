"""The cached attention ops on Triton kernels, with the signatures of reference.py."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from fmkernels.ops._triton.launch import architecture, dot_precision, launch
from fmkernels.ops.attention import triton_configs as configs
from fmkernels.ops.attention.schema import check_lengths, empty_output
from fmkernels.ops.attention.triton import padded_width
from fmkernels.ops.attention.triton_decode import (
    attention_append_kernel,
    attention_decode_kernel,
    attention_merge_kernel,
)

# Programs that fill the chip once, where no device says how many multiprocessors it has.
_MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpret": 4}
_MOST_SPLITS = 64
_LEAST_BLOCKS_PER_SPLIT = 2


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _MULTIPROCESSORS[architecture()]


def _splits(tiles: int, blocks: int, device: torch.device) -> int:
    """Programs that share a tile's keys: enough to fill the chip twice, of a few blocks at least.

    Depends on the capacity, never on the lengths, so that a captured graph stays valid.
    """
    wanted = triton.cdiv(2 * _multiprocessors(device), max(tiles, 1))
    return max(1, min(wanted, blocks // _LEAST_BLOCKS_PER_SPLIT, _MOST_SPLITS))


def _geometry(cache: Tensor, page_table: Tensor | None) -> tuple[int, int, int]:
    """Capacity of a sequence, rows of a page, pages of the pool."""
    if page_table is None:
        return cache.size(2), cache.size(2), cache.size(0)
    return cache.size(2) * page_table.size(1), cache.size(2), cache.size(0)


def _with_unit_stride(cache: Tensor) -> Tensor:
    return cache if cache.stride(3) == 1 else cache.contiguous()


def sdpa_cached(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seqlens: Tensor,
    page_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, width = query.shape
    if batch * heads * queries == 0:
        return empty_output(query, value_cache), query.new_empty(
            query.shape[:3], dtype=torch.float32
        )
    shared, value_width = key_cache.size(1), value_cache.size(3)
    key_cache, value_cache = _with_unit_stride(key_cache), _with_unit_stride(value_cache)
    block_d, block_e = padded_width(width), padded_width(value_width)
    capacity, page_size, pages = _geometry(key_cache, page_table)
    check_lengths(seqlens, capacity, 0)
    config = configs.DECODE[architecture()][
        configs.case(query.element_size(), max(block_d, block_e))
    ]
    tiles = batch * shared * triton.cdiv(queries * (heads // shared), config["BLOCK_M"])
    splits = _splits(tiles, triton.cdiv(capacity, config["BLOCK_N"]), query.device)
    parts = (batch, heads, queries, splits)
    acc = query.new_empty(*parts, value_width, dtype=torch.float32)
    maxima, sums = (query.new_empty(parts, dtype=torch.float32) for _ in range(2))
    output = empty_output(query, value_cache)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    slope_strides = (0, 0)
    if alibi_slopes is not None:
        slope_strides = (alibi_slopes.stride(0) if alibi_slopes.size(0) > 1 else 0, 1)
        alibi_slopes = alibi_slopes.contiguous()
    longest = queries + capacity
    launch(
        attention_decode_kernel,
        (tiles * splits,),
        config,
        query,
        key_cache,
        value_cache,
        seqlens.contiguous(),
        page_table,
        alibi_slopes,
        sinks,
        acc,
        maxima,
        sums,
        query.stride()[:3],
        key_cache.stride()[:3],
        value_cache.stride()[:3],
        0 if page_table is None else page_table.stride(0),
        slope_strides,
        queries,
        capacity,
        page_size,
        pages,
        min(window_left, longest) if window_left >= 0 else None,
        min(window_right, longest) if window_right >= 0 else None,
        float(scale),
        float(softcap) if softcap > 0.0 else None,
        splits,
        HEADS=heads,
        GROUP=heads // shared,
        HEAD_DIM=width,
        VALUE_DIM=value_width,
        BLOCK_D=block_d,
        BLOCK_E=block_e,
        PRECISION=dot_precision(query, "matmul"),
    )
    launch(
        attention_merge_kernel,
        (batch * heads * queries,),
        configs.MERGE[architecture()]["all"],
        acc,
        maxima,
        sums,
        output,
        lse,
        output.stride()[:3],
        queries,
        splits,
        HEADS=heads,
        VALUE_DIM=value_width,
        BLOCK_E=block_e,
        SPLITS=triton.next_power_of_2(splits),
    )
    return output, lse


def kv_cache_append(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens: Tensor,
    page_table: Tensor | None,
) -> None:
    config = configs.STREAM[architecture()]["all"]
    for cache, new in ((key_cache, key), (value_cache, value)):
        batch, heads, rows, width = new.shape
        capacity, page_size, pages = _geometry(cache, page_table)
        check_lengths(seqlens, capacity, rows)
        launch(
            attention_append_kernel,
            (batch * heads * triton.cdiv(rows, config["BLOCK_M"]),),
            config,
            new,
            cache,
            seqlens.contiguous(),
            page_table,
            new.stride(),
            cache.stride(),
            0 if page_table is None else page_table.stride(0),
            heads,
            rows,
            capacity,
            page_size,
            pages,
            WIDTH=width,
            COLUMNS=padded_width(width),
        )
