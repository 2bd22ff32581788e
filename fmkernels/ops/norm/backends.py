"""The backends of the normalisation ops, best first."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import SUPPORTED, Backend, Support
from fmkernels.ops._native_support import native_cpu_support, native_ops_support
from fmkernels.ops._triton.support import triton_backend
from fmkernels.ops.norm import reference, schema  # noqa: F401 - schema defines the ops

_NATIVE = native_ops_support("norm_forward", "norm_inference", "norm_backward")
_TRITON_FEATURES = 16384


def _cpu_supports(input: Tensor) -> Support:
    return native_cpu_support(input, _NATIVE)


def _triton_supports(input: Tensor) -> Support:
    if input.shape[-1] > _TRITON_FEATURES:
        return Support(False, f"holds a row of at most {_TRITON_FEATURES} features in registers")
    return SUPPORTED


def _reference_supports(input: Tensor) -> Support:
    return SUPPORTED


NORM = {
    "cpu": Backend(
        supports=_cpu_supports,
        forward=torch.ops.fmkernels.norm_forward.default,
        backward=torch.ops.fmkernels.norm_backward.default,
    ),
    "triton": triton_backend(
        "fmkernels.ops.norm.triton", _triton_supports, "norm_forward", "norm_backward"
    ),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.norm_forward,
        backward=reference.norm_backward,
    ),
}

# Native alone: the output without what only training wants.
INFERENCE = torch.ops.fmkernels.norm_inference.default
