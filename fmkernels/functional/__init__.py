"""Functional interface: the signatures of torch.nn.functional plus keyword-only extras."""

from fmkernels.functional.conv import conv1d, conv2d, max_pool2d
from fmkernels.functional.linear import linear

__all__ = ["conv1d", "conv2d", "linear", "max_pool2d"]
