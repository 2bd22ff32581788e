"""The backends of the linear ops, best first."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import SUPPORTED, Backend, Support
from fmkernels.ops._native_support import native_cpu_support, native_ops_support
from fmkernels.ops._triton.support import triton_backend
from fmkernels.ops.linear import reference, schema  # noqa: F401 - schema defines the ops

_NATIVE = native_ops_support(
    "linear_forward", "linear_inference", "linear_backward", "linear_pack_weight"
)


def _cpu_supports(input: Tensor, *rest: object) -> Support:
    return native_cpu_support(input, _NATIVE)


def _triton_supports(input: Tensor, weight: Tensor, activation: str | None) -> Support:
    return SUPPORTED


def _reference_supports(input: Tensor, weight: Tensor, activation: str | None) -> Support:
    return SUPPORTED


# These read a weight that is the transpose of a contiguous matrix where it lies; the others are
# given a copy.
READ_TRANSPOSED_WEIGHTS = ("cpu", "reference")

LINEAR = {
    "cpu": Backend(
        supports=_cpu_supports,
        forward=torch.ops.fmkernels.linear_forward.default,
        backward=torch.ops.fmkernels.linear_backward.default,
        pack=torch.ops.fmkernels.linear_pack_weight.default,
    ),
    "triton": triton_backend(
        "fmkernels.ops.linear.triton", _triton_supports, "linear_forward", "linear_backward"
    ),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.linear_forward,
        backward=reference.linear_backward,
    ),
}

# Native alone: the output without what only training wants.
INFERENCE = torch.ops.fmkernels.linear_inference.default
