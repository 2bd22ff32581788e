"""The convolution, pooling and norm ops as Triton kernels, with the signatures of reference.py."""

from fmkernels.ops.conv.triton_backward import conv_backward
from fmkernels.ops.conv.triton_forward import conv_forward
from fmkernels.ops.conv.triton_norm import channel_norm_backward, channel_norm_forward
from fmkernels.ops.conv.triton_pools import (
    avg_pool_backward,
    avg_pool_forward,
    max_pool_backward,
    max_pool_forward,
)

__all__ = [
    "avg_pool_backward",
    "avg_pool_forward",
    "channel_norm_backward",
    "channel_norm_forward",
    "conv_backward",
    "conv_forward",
    "max_pool_backward",
    "max_pool_forward",
]
