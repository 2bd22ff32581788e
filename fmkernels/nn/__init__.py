"""Layers: subclasses of the torch.nn classes whose forward is one functional call."""

from fmkernels.nn.linear import Linear

__all__ = ["Linear"]
