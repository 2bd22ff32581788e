"""The pooling ops in plain PyTorch: any device and dtype, explicit backward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fmkernels.ops import _activations
from fmkernels.ops.conv.geometry import in_layout, is_channels_last

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def max_pool_forward(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """See schema_pool.py."""
    channels_last, dims = is_channels_last(input), input.dim() - 2
    output, indices = _MAX_POOL[dims](
        input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True
    )
    origins = _window_origins(output.shape[2:], stride, padding, input.device)
    argmax = torch.zeros_like(indices)
    for axis in range(dims):
        inner = math.prod(input.shape[3 + axis :])
        coordinate = indices // inner % input.shape[2 + axis]
        argmax = argmax * kernel_size[axis] + (coordinate - origins[axis]) // dilation[axis]
    return in_layout(output, channels_last), in_layout(argmax.to(torch.uint8), channels_last)


def max_pool_backward(
    grad_output: Tensor,
    argmax: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See schema_pool.py. Windows that overlap add up in the accumulation dtype."""
    channels_last = is_channels_last(grad_output)
    indices = flat_indices(argmax, input_size[2:], kernel_size, stride, padding, dilation)
    indices = indices.clamp(min=0)  # a window's first element may lie in the padding
    batch, channels, *spatial = input_size
    grad_input = grad_output.new_zeros(
        (batch, channels, math.prod(spatial)), dtype=_activations.opmath_dtype(grad_output.dtype)
    )
    grad_input = grad_input.scatter_add(
        2, indices.flatten(2), grad_output.to(grad_input.dtype).flatten(2)
    )
    return in_layout(grad_input.to(grad_output.dtype).view(tuple(input_size)), channels_last)


def flat_indices(
    argmax: Tensor,
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Window-local positions as torch's indices: int64, counted in the order of the input."""
    origins = _window_origins(argmax.shape[2:], stride, padding, argmax.device)
    position = argmax.to(torch.int64)
    index = torch.zeros_like(position)
    for axis in range(len(kernel_size)):
        inner = math.prod(kernel_size[axis + 1 :])
        step = position // inner % kernel_size[axis]
        index = index * size[axis] + origins[axis] + step * dilation[axis]
    return index


def _window_origins(
    output_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], device: torch.device
) -> list[Tensor]:
    """Per axis, the input position at which each window starts; they broadcast to an image."""
    origins = []
    for axis, count in enumerate(output_size):
        start = torch.arange(count, device=device) * stride[axis] - padding[axis]
        origins.append(start.view(-1, *(1,) * (len(output_size) - 1 - axis)))
    return origins


def avg_pool_forward(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """See schema_pool.py."""
    channels_last = is_channels_last(input)
    planar, arguments = _as_torch(input, kernel_size, stride, padding)
    output = _avg_pool_op(arguments)(
        planar, *arguments, ceil_mode, count_include_pad, divisor_override
    )
    return in_layout(output.squeeze(2) if input.dim() == 3 else output, channels_last)


def avg_pool_backward(
    grad_output: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """See schema_pool.py. The ceil_mode of the forward shows in the size of ``grad_output``."""
    channels_last, dims = is_channels_last(grad_output), grad_output.dim() - 2
    sizes = zip(input_size[2:], kernel_size, stride, padding, strict=True)
    floor = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
    ceil_mode = tuple(grad_output.shape[2:]) != floor
    planar, arguments = _as_torch(grad_output, kernel_size, stride, padding)
    probe = planar.new_empty(tuple(input_size))
    probe = probe.unsqueeze(2) if dims == 1 else probe
    aten = torch.ops.aten
    backward = aten.avg_pool3d_backward if dims == 3 else aten.avg_pool2d_backward
    grad = backward(
        planar.contiguous(), probe, *arguments, ceil_mode, count_include_pad, divisor_override
    )
    return in_layout(grad.squeeze(2) if dims == 1 else grad, channels_last)


def _as_torch(
    image: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, tuple]:
    """One axis as the second of two: torch's op for two has all the options."""
    if image.dim() == 3:
        return image.unsqueeze(2), ((1, *kernel), (1, *stride), (0, *padding))
    return image, (tuple(kernel), tuple(stride), tuple(padding))


def _avg_pool_op(arguments: tuple):
    return F.avg_pool3d if len(arguments[0]) == 3 else F.avg_pool2d
