"""The backends of the feed-forward ops, best first."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import SUPPORTED, Backend, Support
from fmkernels.ops._native_support import native_cpu_support, native_ops_support
from fmkernels.ops._triton.support import triton_backend
from fmkernels.ops.feed_forward import reference, schema  # noqa: F401 - schema defines the ops

_NATIVE = native_ops_support(
    "feed_forward_forward",
    "feed_forward_inference",
    "feed_forward_backward",
    "feed_forward_pack_weight",
)


def _cpu_supports(input: Tensor) -> Support:
    return native_cpu_support(input, _NATIVE)


def _triton_supports(input: Tensor) -> Support:
    return SUPPORTED


def _reference_supports(input: Tensor) -> Support:
    return SUPPORTED


FEED_FORWARD = {
    "cpu": Backend(
        supports=_cpu_supports,
        forward=torch.ops.fmkernels.feed_forward_forward.default,
        backward=torch.ops.fmkernels.feed_forward_backward.default,
        pack=torch.ops.fmkernels.feed_forward_pack_weight.default,
    ),
    "triton": triton_backend(
        "fmkernels.ops.feed_forward.triton",
        _triton_supports,
        "feed_forward_forward",
        "feed_forward_backward",
    ),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.feed_forward_forward,
        backward=reference.feed_forward_backward,
    ),
}

# Native alone: the output without what only training wants.
INFERENCE = torch.ops.fmkernels.feed_forward_inference.default
