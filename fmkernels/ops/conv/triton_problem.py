"""What the convolution's launchers share: the problem with three axes, weights, grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fmkernels.ops._triton.launch import Config
from fmkernels.ops.conv.geometry import (
    ConvOptions,
    conv_shape,
    edges_of,
    in_layout,
    is_channels_last,
)

# A group whose one side is a single channel, and whose other has at most so many, is computed
# without matrix products: they would multiply zeros.
DEPTHWISE_CHANNELS = 16


@dataclass(frozen=True)
class Problem:
    """A convolution with three spatial axes."""

    options: ConvOptions
    x_size: tuple[int, ...]
    y_size: tuple[int, ...]  # before the pool
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]  # before each axis
    batch: int
    x_channels: int  # per group
    y_channels: int

    @property
    def groups(self) -> int:
        return self.options.groups

    @property
    def depthwise(self) -> bool:
        few, many = sorted((self.x_channels, self.y_channels))
        return few == 1 and many <= DEPTHWISE_CHANNELS

    @property
    def phases(self) -> int:
        """Of the direction that steps over pixels: the transposed one, or the gradient."""
        return math.prod(self.stride)

    def per_phase(self, size: Sequence[int]) -> tuple[int, ...]:
        return tuple(triton.cdiv(n, s) for n, s in zip(size, self.stride, strict=True))

    def constants(self) -> dict[str, Any]:
        """The kernels' compile-time arguments that describe the geometry."""
        step = tuple(s // math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True))
        return {
            "KERNEL": self.kernel,
            "STRIDE": self.stride,
            "DILATION": self.dilation,
            "STEP": step,
            "TRANSPOSED": self.options.transposed,
            "PADDING_MODE": self.options.padding_mode,
        }


def make_problem(input: Tensor, weight: Tensor, options: ConvOptions) -> Problem:
    dims = input.dim() - 2
    shape = conv_shape(input, weight, options)
    return Problem(
        options=options,
        x_size=three(input.shape[2:]),
        y_size=three(shape[2:]),
        kernel=three(weight.shape[2:]),
        stride=three(options.stride),
        dilation=three(options.dilation),
        padding=(0,) * (3 - dims) + tuple(before for before, _ in edges_of(options.padding)),
        batch=input.shape[0],
        x_channels=input.shape[1] // options.groups,
        y_channels=shape[1] // options.groups,
    )


def three(values: Sequence[int], fill: int = 1) -> tuple[int, ...]:
    return (fill,) * (3 - len(values)) + tuple(values)


def weight_for_kernels(weight: Tensor) -> Tensor:
    """The weight with its second dimension innermost, which the kernels read in wide loads.

    A copy, and so a launch, unless the kernel is 1x1 or the weight is channels_last already.
    """
    if math.prod(weight.shape[2:]) == 1 or is_channels_last(weight):
        return weight
    return in_layout(weight, True)


def weight_strides(weight: Tensor, problem: Problem) -> tuple[int, int, int, int]:
    """Of a group, a channel of the result, a channel of the input, and a tap."""
    outer, inner = weight.stride(0), weight.stride(1)
    tap = tap_stride(weight)
    if problem.options.transposed:
        return problem.x_channels * outer, inner, outer, tap
    return problem.y_channels * outer, outer, inner, tap


def tap_stride(weight: Tensor) -> int:
    """0 for a single tap: torch's 1 would hide from the compiler that loads are aligned."""
    return 0 if math.prod(weight.shape[2:]) == 1 else weight.stride(-1)


def config_family(tensor: Tensor, precision: str) -> str:
    """ "ieee" or "tf32" for float32 and float64, else ""."""
    if tensor.dtype is torch.float64 or tensor.dtype is torch.float32 and precision == "ieee":
        return "ieee"
    return "tf32" if tensor.dtype is torch.float32 else ""


def row_grid(
    setting: Config, batch: int, size: Sequence[int], channels: int, blocks: int = 1
) -> tuple[int, int]:
    rows = batch * math.prod(size)
    return (
        triton.cdiv(triton.cdiv(rows, setting["BLOCK_M"]), blocks),
        triton.cdiv(channels, setting["BLOCK_N"]),
    )
