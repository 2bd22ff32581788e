"""Layers: subclasses of the torch.nn classes whose forward is one functional call."""

from fmkernels.nn.conv import Conv1d, Conv2d, ConvBlock2d
from fmkernels.nn.linear import Linear

__all__ = ["Conv1d", "Conv2d", "ConvBlock2d", "Linear"]
