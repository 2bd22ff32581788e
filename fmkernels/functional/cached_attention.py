"""Attention of new queries to a cache of keys and values (decoding)."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels import _checks as check
from fmkernels.functional import _attention_options as common
from fmkernels.ops.attention import autograd


def _check_index(name: str, tensor: Tensor, query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {check.describe(tensor)}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {check.describe(tensor)}")
    if tensor.device != query.device:
        raise RuntimeError(
            f"{name} must be on the device of query ({query.device}), got {check.describe(tensor)}"
        )


def _check_caches(query: Tensor, key_cache: Tensor, value_cache: Tensor, paged: bool) -> None:
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        check.tensor(name, cache)
        check.same_kind(name, cache, "query", query)
        check.rank(name, cache, 4)
        if cache.size(-1) > 1 and cache.stride(-1) != 1:
            raise ValueError(f"{name} must have adjacent numbers in its last dimension")
        if not paged and cache.size(0) != query.size(0):
            raise ValueError(
                f"{name} must have the query's batch of {query.size(0)} (or be given with "
                f"page_table), got {check.describe(cache)}"
            )
        common.check_shared_heads(name, cache.shape, 1, query.size(1))
    if key_cache.size(-1) != query.size(-1):
        raise ValueError(
            f"key_cache must have the query's {query.size(-1)} features, "
            f"got {check.describe(key_cache)}"
        )
    check.shape(
        "value_cache",
        value_cache,
        (*key_cache.shape[:-1], value_cache.size(-1)),
        "the key cache's, but for the features",
    )
    if paged and key_cache.size(2) == 0:
        raise ValueError(f"key_cache must have pages of at least one row, got {key_cache.shape}")


def attention_with_kv_cache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int,
    page_table: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends key and value to a cache, in place, and attends to all that it then holds.

    The queries stand at the end: with ``n`` keys in the cache after appending, query i has
    position ``n - Sq + i``, which is_causal, window and alibi_slopes refer to (bottom right).
    The caller advances cache_seqlens. For inference: not differentiable.

    Args:
        query: ``(B, Hq, Sq, D)``; float32, bfloat16, float16 or float64.
        key_cache: ``(B, Hkv, capacity, D)``, any strides but adjacent features; Hkv divides Hq.
            With page_table: the pool of pages, ``(pages, Hkv, page size, D)``.
        value_cache: the same with Dv features.
        key: ``(B, Hkv, n, D)`` to append, or None; value: ``(B, Hkv, n, Dv)``.
        cache_seqlens: keys in the cache before appending: an int, or int32 or int64 ``(B,)``. With
            the new keys no more than the capacity: an int is checked on every device, a tensor on
            the CPU alone, see below.
        page_table: int32 or int64 ``(B, pages per sequence)``: row j of sequence b is row
            ``j % page size`` of page ``page_table[b, j // page size]``. Entries past a sequence's
            end are not read.
        is_causal, scale, window, softcap, alibi_slopes ``(Hq,)`` or ``(B, Hq)``, sinks,
            return_lse, backend: as in ``scaled_dot_product_attention``.

    On devices other than the CPU, lengths in a tensor and pages are not checked: the call would
    have to wait for the device. The Triton and CUDA C++ kernels stay inside the cache all the
    same: they drop new keys past the capacity, attend to a full cache where a length exceeds it,
    and to an empty one where it is negative. Where PyTorch's operators serve instead, nothing is
    promised then. Nor are lengths in a tensor and pages checked under torch.compile with the
    reference backend.

    Returns:
        output ``(B, Hq, Sq, Dv)``; with ``return_lse`` also lse ``(B, Hq, Sq)``.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid (a length past the capacity, a
            page that does not exist, as far as they are checked); the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    check.boolean("return_lse", return_lse)
    check.tensor("query", query)
    check.rank("query", query, 4)
    _check_caches(query, key_cache, value_cache, page_table is not None)
    batch, heads = query.shape[:2]
    if (key is None) != (value is None):
        raise ValueError("key and value must be given together")
    new = None
    if key is not None:
        for name, operand, cache in (("key", key, key_cache), ("value", value, value_cache)):
            check.tensor(name, operand)
            check.same_kind(name, operand, "query", query)
            check.rank(name, operand, 4)
            expected = (batch, cache.size(1), key.size(2), cache.size(3))
            check.shape(name, operand, expected, "batch, the cache's heads, new keys, features")
        new = (key, value)
    if page_table is not None:
        _check_index("page_table", page_table, query)
        check.rank("page_table", page_table, 2)
        expected = (batch, page_table.size(1))
        check.shape("page_table", page_table, expected, "batch, pages per sequence")
    if isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        check.integer("cache_seqlens", cache_seqlens, 0)
        capacity = key_cache.size(2) * (1 if page_table is None else page_table.size(1))
        added = 0 if key is None else key.size(2)
        if cache_seqlens + added > capacity:
            raise ValueError(
                f"cache_seqlens: {cache_seqlens} keys and {added} new ones exceed the cache's "
                f"capacity of {capacity}"
            )
        cache_seqlens = torch.full((batch,), cache_seqlens, device=query.device)
    _check_index("cache_seqlens", cache_seqlens, query)
    check.shape("cache_seqlens", cache_seqlens, (batch,), "the batch")
    if page_table is not None:
        page_table = page_table.to(torch.int32).contiguous()
    options = common.options_of(
        query,
        (batch, heads),
        is_causal=is_causal,
        scale=scale,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    tensors = (query, key_cache, value_cache, key, value, alibi_slopes, sinks)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            "query, caches, key, value, alibi_slopes and sinks must not require a gradient: "
            "attention_with_kv_cache has none (call it under torch.no_grad())"
        )
    output, lse = autograd.cached(
        query,
        key_cache,
        value_cache,
        new,
        cache_seqlens.to(torch.int32).contiguous(),
        page_table,
        options,
        backend,
    )
    return (output, lse) if return_lse else output
