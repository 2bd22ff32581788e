"""The backends of the convolution and pooling ops, best first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels._dispatch import SUPPORTED, Backend, Support
from fmkernels.ops._native_support import native_cpu_support, native_ops_support
from fmkernels.ops.conv import reference, schema

# Windows that the convolution kernels pool in their epilogue; others are pooled by a second op.
FUSED_POOL_WINDOWS = ((2, 2), (3, 3))

_NATIVE_CONV2D = native_ops_support("conv2d_forward", "conv2d_backward", "conv2d_pack_weight")
_NATIVE_MAX_POOL2D = native_ops_support("max_pool2d_forward", "max_pool2d_backward")


def _cpu_supports_conv2d(
    input: Tensor, weight: Tensor, activation: str | None, pool: Sequence[int]
) -> Support:
    if pool and tuple(pool[:2]) not in FUSED_POOL_WINDOWS:
        return Support(False, f"fuses 2x2 and 3x3 max-pooling, got a {pool[0]}x{pool[1]} window")
    return native_cpu_support(input, _NATIVE_CONV2D)


def _reference_supports_conv2d(
    input: Tensor, weight: Tensor, activation: str | None, pool: Sequence[int]
) -> Support:
    return SUPPORTED


CONV2D = {
    "cpu": Backend(
        supports=_cpu_supports_conv2d,
        forward=torch.ops.fmkernels.conv2d_forward.default,
        backward=torch.ops.fmkernels.conv2d_backward.default,
        pack=torch.ops.fmkernels.conv2d_pack_weight.default,
    ),
    "reference": Backend(
        supports=_reference_supports_conv2d,
        forward=reference.conv2d_forward,
        backward=reference.conv2d_backward,
    ),
}


def _cpu_supports_max_pool2d(input: Tensor, kernel_size: Sequence[int]) -> Support:
    if kernel_size[0] * kernel_size[1] > schema.MAX_POOL_AREA:
        return _window_too_large(kernel_size)
    return native_cpu_support(input, _NATIVE_MAX_POOL2D)


def _reference_supports_max_pool2d(input: Tensor, kernel_size: Sequence[int]) -> Support:
    if kernel_size[0] * kernel_size[1] > schema.MAX_POOL_AREA:
        return _window_too_large(kernel_size)
    return SUPPORTED


def _window_too_large(kernel_size: Sequence[int]) -> Support:
    return Support(
        False,
        f"a window holds at most {schema.MAX_POOL_AREA} elements, "
        f"got {kernel_size[0]}x{kernel_size[1]}",
    )


MAX_POOL2D = {
    "cpu": Backend(
        supports=_cpu_supports_max_pool2d,
        forward=torch.ops.fmkernels.max_pool2d_forward.default,
        backward=torch.ops.fmkernels.max_pool2d_backward.default,
    ),
    "reference": Backend(
        supports=_reference_supports_max_pool2d,
        forward=reference.max_pool2d_forward,
        backward=reference.max_pool2d_backward,
    ),
}
