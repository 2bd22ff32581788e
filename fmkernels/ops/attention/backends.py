"""The backends of the attention family, best first."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import SUPPORTED, Backend, Support
from fmkernels.ops._native_support import native_cpu_support, native_ops_support
from fmkernels.ops._triton.support import triton_backend, triton_op, triton_support
from fmkernels.ops.attention import cuda, reference
from fmkernels.ops.attention.schema import PLAIN, Options

# Tiles of wider heads exceed a multiprocessor's registers.
_WIDEST_HEAD = 512
_TRITON = "fmkernels.ops.attention.triton"
_TRITON_CACHE = "fmkernels.ops.attention.triton_cache"
_NATIVE = native_ops_support("sdpa_forward", "sdpa_inference", "sdpa_backward")
_NATIVE_WEIGHTS = native_ops_support("sdpa_weights", "sdpa_weights_backward", "sdpa_backward")
_NATIVE_STATISTICS = native_ops_support("sdpa_statistics")
_NATIVE_CACHE = native_ops_support("sdpa_cached", "kv_cache_append")


def _cpu_supports(query: Tensor, options: Options = PLAIN) -> Support:
    return _cpu_serves(native_cpu_support(query, _NATIVE), query, options)


def _cpu_weights_supports(query: Tensor, options: Options = PLAIN) -> Support:
    return _cpu_serves(native_cpu_support(query, _NATIVE_WEIGHTS), query, options)


def _cpu_statistics_supports(query: Tensor, options: Options) -> Support:
    return _cpu_serves(native_cpu_support(query, _NATIVE_STATISTICS), query, options)


def _cpu_serves(support: Support, query: Tensor, options: Options) -> Support:
    if not support.ok:
        return support
    mask = options.attn_mask
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return Support(
            False,
            f"adds masks of float32 or the query's dtype ({query.dtype}) only, got {mask.dtype}",
        )
    return SUPPORTED


def _triton_supports(query: Tensor, options: Options) -> Support:
    return _triton_serves(query)


def _triton_serves(query: Tensor) -> Support:
    if query.dtype == torch.float64:
        return Support(False, "attends in float32, bfloat16 and float16; got torch.float64")
    if query.size(-1) > _WIDEST_HEAD:
        return Support(
            False, f"takes up to {_WIDEST_HEAD} features per head, got {query.size(-1)}"
        )
    return SUPPORTED


def _triton_inference_supports(query: Tensor, *rest: object) -> Support:
    common = triton_support(query)
    return _triton_serves(query) if common.ok else common


def _reference_supports(query: Tensor, options: Options) -> Support:
    return SUPPORTED


SDPA = {
    "cpu": Backend(
        supports=_cpu_supports,
        forward=torch.ops.fmkernels.sdpa_forward.default,
        backward=torch.ops.fmkernels.sdpa_backward.default,
    ),
    "triton": triton_backend(_TRITON, _triton_supports, "sdpa_forward", "sdpa_backward"),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.sdpa_forward,
        backward=reference.sdpa_backward,
    ),
}


# With the weights as a result; where these have no gradient, SDPA's backward serves.
WEIGHTS = {
    "cpu": Backend(
        supports=_cpu_weights_supports,
        forward=torch.ops.fmkernels.sdpa_weights.default,
        backward=torch.ops.fmkernels.sdpa_weights_backward.default,
    ),
    # Gradients of the weights themselves, which few callers ask for, take PyTorch's operators.
    "triton": Backend(
        supports=_triton_inference_supports,
        forward=triton_op("fmkernels.ops.attention.triton_weights", "sdpa_weights"),
        backward=reference.sdpa_weights_backward,
    ),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.sdpa_weights,
        backward=reference.sdpa_weights_backward,
    ),
}

# Native alone: the output without what only training wants.
INFERENCE = torch.ops.fmkernels.sdpa_inference.default


def _no_backward(*arguments) -> None:
    raise RuntimeError("this operator has no gradient")


STATISTICS = {
    "cpu": Backend(
        supports=_cpu_statistics_supports,
        forward=torch.ops.fmkernels.sdpa_statistics.default,
        backward=_no_backward,
    ),
    "triton": Backend(
        supports=_triton_inference_supports,
        forward=triton_op("fmkernels.ops.attention.triton_statistics", "sdpa_statistics"),
        backward=_no_backward,
    ),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.sdpa_statistics,
        backward=_no_backward,
    ),
}

# Attention to a cache, and what adds to it.
CACHED = {
    "cpu": Backend(
        supports=lambda query, *rest: native_cpu_support(query, _NATIVE_CACHE),
        forward=torch.ops.fmkernels.sdpa_cached.default,
        backward=_no_backward,
    ),
    "cuda": Backend(
        supports=cuda.decode_supports,
        forward=cuda.sdpa_cached,
        backward=_no_backward,
    ),
    "triton": Backend(
        supports=_triton_inference_supports,
        forward=triton_op(_TRITON_CACHE, "sdpa_cached"),
        backward=_no_backward,
    ),
    "reference": Backend(
        supports=lambda query, *rest: SUPPORTED,
        forward=reference.sdpa_cached,
        backward=_no_backward,
    ),
}
APPEND = {
    "cpu": torch.ops.fmkernels.kv_cache_append.default,
    "cuda": reference.kv_cache_append,  # a copy of a few rows
    "triton": triton_op(_TRITON_CACHE, "kv_cache_append"),
    "reference": reference.kv_cache_append,
}
