"""The attention family's kernels and the production shapes that they are compiled at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmkernels.bench.gpu.registry import Case, Kernel
from fmkernels.ops.attention import triton as kernels
from fmkernels.ops.attention import triton_cache as cache_kernels
from fmkernels.ops.attention import triton_configs as configs
from fmkernels.ops.attention import triton_statistics as statistics_kernels
from fmkernels.ops.attention import triton_weights as weights_kernels
from fmkernels.ops.attention.schema import Options

KERNELS = (
    Kernel("attention_fwd_kernel", configs.FORWARD, matrix=True),
    Kernel("attention_statistics_kernel", configs.FORWARD, matrix=True),
    Kernel("attention_weights_kernel", configs.FORWARD, matrix=True),
    Kernel("attention_bwd_preprocess_kernel", configs.STREAM),
    Kernel("attention_bwd_dkdv_kernel", configs.KEYS_VALUES, matrix=True, m_block="BLOCK_N"),
    Kernel("attention_bwd_dq_kernel", configs.QUERIES, matrix=True),
    Kernel("attention_bwd_dmask_kernel", configs.MASK, matrix=True),
    Kernel("attention_decode_kernel", configs.DECODE, matrix=True),
    Kernel("attention_merge_kernel", configs.MERGE),
    Kernel("attention_append_kernel", configs.STREAM),
)


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(
    width: int,
    *,
    batch: int = 4,
    heads: int = 16,
    shared: int = 16,
    length: int = 4096,
    mask: tuple[int, ...] = (),
    features: bool = False,
    sequences: int = 0,
    **options: Any,
) -> Callable[[torch.dtype], None]:
    """Forward and backward with every gradient.

    Args:
        mask: shape of a float mask that gets its gradient.
        features: softcap, ALiBi and sinks, with their gradients, and dropout.
        sequences: packed ones.
    """

    def call(dtype: torch.dtype) -> None:
        query = _meta(dtype, batch, length, heads, width).transpose(1, 2)
        key, value = (_meta(dtype, batch, length, shared, width).transpose(1, 2) for _ in range(2))
        given = Options(scale=width**-0.5, **options)
        if mask:
            given = given._replace(attn_mask=_meta(dtype, *mask))
        if features:
            given = given._replace(
                softcap=30.0,
                alibi_slopes=_meta(torch.float32, 1, heads),
                sinks=_meta(torch.float32, heads),
                dropout_p=0.1,
                dropout_seed=_meta(torch.int64, 1),
            )
        if sequences:
            bounds = _meta(torch.int32, sequences + 1)
            given = given._replace(cu_seqlens_q=bounds, cu_seqlens_k=bounds)
        output, lse = kernels.sdpa_forward(query, key, value, *given)
        kernels.sdpa_backward(
            torch.empty_like(output), None, query, key, value, output, lse, *given,
            True, True, True, bool(mask), features, features,
        )  # fmt: skip

    return call


def _statistics(width: int, features: bool = False) -> Callable[[torch.dtype], None]:
    """Of the causal softmax of 16 heads over 4096 keys; features: softcap, ALiBi and sinks."""

    def call(dtype: torch.dtype) -> None:
        query, key = (_meta(dtype, 4, 4096, 16, width).transpose(1, 2) for _ in range(2))
        given = Options(scale=width**-0.5, window_right=0)
        if features:
            given = given._replace(
                softcap=30.0,
                alibi_slopes=_meta(torch.float32, 1, 16),
                sinks=_meta(torch.float32, 16),
            )
        statistics_kernels.sdpa_statistics(query, key, *given)

    return call


def _weights(
    width: int, average: bool, mask: tuple[int, ...] = (), features: bool = False
) -> Callable[[torch.dtype], None]:
    """Of 16 heads over 1024 keys; features: softcap, ALiBi, sinks and dropout."""

    def call(dtype: torch.dtype) -> None:
        query, key = (_meta(dtype, 4, 1024, 16, width).transpose(1, 2) for _ in range(2))
        lse = _meta(torch.float32, 4, 16, 1024)
        given = Options(scale=width**-0.5)
        if mask:
            given = given._replace(attn_mask=_meta(torch.bool, *mask))
        if features:
            given = given._replace(
                softcap=30.0,
                alibi_slopes=_meta(torch.float32, 1, 16),
                sinks=_meta(torch.float32, 16),
                dropout_p=0.1,
                dropout_seed=_meta(torch.int64, 1),
            )
        weights_kernels.weights_from_lse(query, key, lse, given, average)

    return call


def _cached(width: int, page: int = 0) -> Callable[[torch.dtype], None]:
    """One new token for each of 32 sequences: 32 heads on 8, caches of 8192 keys."""

    def call(dtype: torch.dtype) -> None:
        query, new = _meta(dtype, 32, 32, 1, width), _meta(dtype, 32, 8, 1, width)
        lengths = _meta(torch.int32, 32)
        if page:
            cache = _meta(dtype, 32 * 8192 // page, 8, page, width)
            table = _meta(torch.int32, 32, 8192 // page)
        else:
            cache, table = _meta(dtype, 32, 8, 8192, width), None
        cache_kernels.kv_cache_append(cache, cache, new, new, lengths, table)
        cache_kernels.sdpa_cached(
            query, cache, cache, lengths, table, None, None, -1, 0, width**-0.5, 0.0
        )

    return call


_BOTH = ("bf16", "fp32")

CASES = (
    Case("causal_d64", _attention(64, window_right=0), dtypes=_BOTH),
    Case("causal_d128", _attention(128, window_right=0), dtypes=("bf16", "fp16", "fp32", "tf32")),
    Case("causal_d256", _attention(256, window_right=0), dtypes=_BOTH),
    Case("causal_d512", _attention(512, window_right=0), dtypes=_BOTH),
    Case("grouped_window_d128", _attention(128, shared=4, window_left=1024, window_right=0),
         dtypes=("bf16",)),
    Case("packed_d64", _attention(64, batch=1, sequences=16, window_right=0), dtypes=("bf16",)),
    Case("features_d64", _attention(64, features=True, window_right=0), dtypes=("bf16",)),
    Case("features_d128", _attention(128, features=True, window_right=0), dtypes=("bf16",)),
    # A mask with a gradient of its own shape, and masks that are broadcast.
    Case("mask_d64", _attention(64, mask=(1, 16, 4096, 4096)), dtypes=("bf16",)),
    Case("key_mask_d64", _attention(64, mask=(4, 1, 1, 4096)), dtypes=("fp32",)),
    Case("key_mask_d128", _attention(128, mask=(4, 1, 1, 4096)), dtypes=_BOTH),
    Case("key_mask_d256", _attention(256, mask=(4, 1, 1, 4096)), dtypes=_BOTH),
    Case("key_mask_d512", _attention(512, mask=(4, 1, 1, 4096)), dtypes=_BOTH),
    *(Case(f"statistics_d{width}", _statistics(width), dtypes=_BOTH)
      for width in (64, 128, 256, 512)),
    *(Case(f"statistics_features_d{width}", _statistics(width, features=True), dtypes=_BOTH)
      for width in (64, 128, 256, 512)),
    *(Case(f"mean_weights_d{width}", _weights(width, True), dtypes=_BOTH)
      for width in (64, 128, 256, 512)),
    *(Case(f"mean_weights_mask_d{width}", _weights(width, True, (4, 1, 1, 1024)), dtypes=_BOTH)
      for width in (64, 128, 256, 512)),
    Case("weights_features_d128", _weights(128, False, features=True), dtypes=("bf16",)),
    Case("decode_d64", _cached(64), dtypes=_BOTH),
    Case("decode_paged_d128", _cached(128, page=16), dtypes=_BOTH),
    Case("decode_d256", _cached(256), dtypes=_BOTH),
    Case("decode_d512", _cached(512), dtypes=_BOTH),
    # Rows of 130 and of 250 bytes.
    Case("unaligned_d65", _attention(65, window_right=0), dtypes=("bf16",), aligned=False),
    Case("unaligned_d125", _attention(125, window_right=0), dtypes=("bf16",), aligned=False),
    Case("unaligned_decode_d65", _cached(65), dtypes=("bf16",), aligned=False),
)  # fmt: skip
