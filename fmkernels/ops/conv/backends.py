"""The backends of the convolution, pooling and norm ops, best first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels._dispatch import SUPPORTED, Backend, Support
from fmkernels.ops._native_support import native_cpu_support, native_ops_support
from fmkernels.ops._triton.support import triton_backend
from fmkernels.ops.conv import (
    cuda,
    reference,
    reference_norm,
    reference_pool,
    schema,  # noqa: F401 - defines the ops
    schema_norm,  # noqa: F401
    schema_pool,
    triton_pack,
)
from fmkernels.ops.conv.geometry import ConvOptions

# Windows that every backend pools in the epilogue; others are pooled by the pooling ops.
FUSED_POOL_WINDOWS = ((2, 2), (3, 3))

_ops = torch.ops.fmkernels

_NATIVE_CONV = native_ops_support(
    "conv_forward",
    "conv_inference",
    "conv_chain",
    "conv_chain_keep",
    "conv_chain_run",
    "conv_statistics",
    "conv_backward",
    "conv_pack_weight",
)
_NATIVE_MAX_POOL = native_ops_support("max_pool_forward", "max_pool_backward")
_NATIVE_AVG_POOL = native_ops_support("avg_pool_forward", "avg_pool_backward")
_NATIVE_NORM = native_ops_support("channel_norm_forward", "channel_norm_backward")


def fuses_pool(kernel_size: Sequence[int], options: ConvOptions | None = None) -> bool:
    """Whether a pool of this window belongs into the ops that have a pool in their epilogue.

    A transposed convolution of a larger stride computes neighbouring outputs apart.
    """
    apart = options is not None and options.transposed and max(options.stride) > 1
    return tuple(kernel_size) in FUSED_POOL_WINDOWS and not apart


# A convolution's problem: input, weight, options, and whether scale, shift or a residual follows.
def _cpu_supports_conv(input: Tensor, *rest: object) -> Support:
    return native_cpu_support(input, _NATIVE_CONV)


def _cpu_supports_max_pool(input: Tensor, kernel_size: Sequence[int]) -> Support:
    for support in (_few_axes(kernel_size), _reference_supports_max_pool(input, kernel_size)):
        if not support.ok:
            return support
    return native_cpu_support(input, _NATIVE_MAX_POOL)


def _cpu_supports_avg_pool(input: Tensor, kernel_size: Sequence[int]) -> Support:
    support = _few_axes(kernel_size)
    return native_cpu_support(input, _NATIVE_AVG_POOL) if support.ok else support


def _few_axes(kernel_size: Sequence[int]) -> Support:
    return SUPPORTED if len(kernel_size) < 3 else Support(False, "pools over at most two axes")


def _cpu_supports_norm(input: Tensor) -> Support:
    return native_cpu_support(input, _NATIVE_NORM)


def _triton_supports_conv(*problem: object) -> Support:
    return SUPPORTED


def _triton_yields_conv(
    input: Tensor, weight: Tensor, options: ConvOptions, has_epilogue: bool = False
) -> tuple[str, str] | None:
    """Many channels, all of them mixed, and nothing behind the convolution to fuse."""
    dense = options.groups == 1 and min(weight.shape[:2]) >= 64 and input.dim() > 3
    plain = not (has_epilogue or options.activation or options.pool or options.transposed)
    if input.is_cuda and dense and plain and options.padding_mode == "zeros":
        return "reference", "a plain dense convolution is what cuDNN and MIOpen do best"
    return None


def _triton_supports_norm(input: Tensor) -> Support:
    return SUPPORTED


def _triton_supports_avg_pool(input: Tensor, kernel_size: Sequence[int]) -> Support:
    return SUPPORTED


def _reference_supports(*problem: object) -> Support:
    return SUPPORTED


def _reference_supports_max_pool(input: Tensor, kernel_size: Sequence[int]) -> Support:
    if math.prod(kernel_size) > schema_pool.MAX_POOL_AREA:
        return Support(
            False,
            f"a window holds at most {schema_pool.MAX_POOL_AREA} elements, "
            f"got {'x'.join(map(str, kernel_size))}",
        )
    return SUPPORTED


_TRITON = "fmkernels.ops.conv.triton"

CONV = {
    "cpu": Backend(
        supports=_cpu_supports_conv,
        forward=_ops.conv_forward.default,
        backward=_ops.conv_backward.default,
        pack=_ops.conv_pack_weight.default,
        statistics=_ops.conv_statistics.default,
    ),
    "cuda": Backend(
        supports=cuda.depthwise_supports,
        forward=cuda.conv_forward,
        backward=cuda.conv_backward,
    ),
    "triton": triton_backend(
        _TRITON,
        _triton_supports_conv,
        "conv_forward",
        "conv_backward",
        triton_pack.pack_weight,
        _triton_yields_conv,
    ),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.conv_forward,
        backward=reference.conv_backward,
    ),
}

# Native alone: frozen layers in a row as one op, and one without what only training wants.
CHAIN = _ops.conv_chain.default
KEEP_CHAIN, DROP_CHAIN = _ops.conv_chain_keep.default, _ops.conv_chain_drop.default
KEPT_CHAIN = _ops.conv_chain_run.default
INFERENCE = _ops.conv_inference.default

# Causal convolutions that read a state in place of their padding.
CAUSAL = {
    "cuda": Backend(
        supports=cuda.depthwise_supports,
        forward=cuda.causal_forward,
        backward=cuda.causal_backward,
    ),
}

MAX_POOL = {
    "cpu": Backend(
        supports=_cpu_supports_max_pool,
        forward=_ops.max_pool_forward.default,
        backward=_ops.max_pool_backward.default,
    ),
    "triton": triton_backend(
        _TRITON, _reference_supports_max_pool, "max_pool_forward", "max_pool_backward"
    ),
    "reference": Backend(
        supports=_reference_supports_max_pool,
        forward=reference_pool.max_pool_forward,
        backward=reference_pool.max_pool_backward,
    ),
}

AVG_POOL = {
    "cpu": Backend(
        supports=_cpu_supports_avg_pool,
        forward=_ops.avg_pool_forward.default,
        backward=_ops.avg_pool_backward.default,
    ),
    "triton": triton_backend(
        _TRITON, _triton_supports_avg_pool, "avg_pool_forward", "avg_pool_backward"
    ),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference_pool.avg_pool_forward,
        backward=reference_pool.avg_pool_backward,
    ),
}

NORM = {
    "cpu": Backend(
        supports=_cpu_supports_norm,
        forward=_ops.channel_norm_forward.default,
        backward=_ops.channel_norm_backward.default,
    ),
    "triton": triton_backend(
        _TRITON, _triton_supports_norm, "channel_norm_forward", "channel_norm_backward"
    ),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference_norm.channel_norm_forward,
        backward=reference_norm.channel_norm_backward,
    ),
}
