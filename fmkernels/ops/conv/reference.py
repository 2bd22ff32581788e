"""The convolution and pooling ops in plain PyTorch: any device and dtype, explicit backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fmkernels.ops import _activations
from fmkernels.ops.conv.schema import RELU_ZERO, conv_output_size, memory_format_of


def conv2d_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    packed_weight: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    pool: Sequence[int],
    save_for_backward: bool,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See schema.py. ``packed_weight`` and ``exact`` are not read."""
    memory_format = memory_format_of(input)
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    saved = input.new_empty((0,))
    argmax = input.new_empty((0,), dtype=torch.uint8)
    if activation is not None or any(t is not None for t in (scale, shift, residual)):
        # The epilogue runs in the accumulation dtype, so that only its result is rounded again.
        pre = output.to(_activations.opmath_dtype(input.dtype))
        if scale is not None:
            pre = pre * _per_channel(scale)
        if shift is not None:
            pre = pre + _per_channel(shift)
        if residual is not None:
            pre = pre + residual
        if save_for_backward and _activations.needs_preactivation(activation):
            saved = pre.to(input.dtype).contiguous(memory_format=memory_format)
        output = _activations.apply(activation, pre).to(input.dtype)
    if pool:
        output, positions = max_pool2d_forward(
            output.contiguous(memory_format=memory_format),
            pool[0:2],
            pool[2:4],
            pool[4:6],
            (1, 1),
            False,
        )
        if save_for_backward:
            argmax = positions
            if activation == "relu":
                argmax = positions.masked_fill(output <= 0, RELU_ZERO)
    return output.contiguous(memory_format=memory_format), saved, argmax


def conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    output: Tensor,
    saved: Tensor,
    argmax: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    pool: Sequence[int],
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_shift: bool,
    need_residual: bool,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See schema.py."""
    dtype, memory_format = input.dtype, memory_format_of(input)
    grad = grad_output.to(_activations.opmath_dtype(dtype))
    if pool:
        if activation == "relu":
            dead = argmax == RELU_ZERO
            grad = grad.masked_fill(dead, 0)
            argmax = argmax.masked_fill(dead, 0)  # which may lie outside, see below
        spatial = conv_output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
        conv_shape = (input.shape[0], weight.shape[0], *spatial)
        grad = max_pool2d_backward(
            grad.contiguous(memory_format=memory_format),
            argmax,
            conv_shape,
            pool[0:2],
            pool[2:4],
            pool[4:6],
            (1, 1),
        )
    if not (pool and activation == "relu"):
        grad = _activations.apply_backward(activation, grad, saved, output)
    # grad is now that of the pre-activation: scale * (conv + bias) + shift + residual.
    absent = input.new_empty((0,))
    grad_shift = grad.sum((0, 2, 3)).to(dtype) if need_shift else absent
    grad_residual = absent
    if need_residual:
        grad_residual = grad.to(dtype).contiguous(memory_format=memory_format)
    if scale is not None:
        grad = grad * _per_channel(scale)
    grad_bias = grad.sum((0, 2, 3)).to(dtype) if need_bias else absent
    grad_input = grad_weight = absent
    if need_input or need_weight:
        grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad.to(dtype),
            input,
            weight,
            None,
            stride,
            padding,
            dilation,
            False,
            (0, 0),
            groups,
            (need_input, need_weight, False),
        )
    return (
        grad_input.contiguous(memory_format=memory_format) if need_input else absent,
        grad_weight.contiguous() if need_weight else absent,
        grad_bias,
        grad_shift,
        grad_residual,
    )


def max_pool2d_forward(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """See schema.py."""
    memory_format = memory_format_of(input)
    output, indices = F.max_pool2d(
        input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True
    )
    width = input.shape[3]
    top, left = _window_origins(output.shape[2:], stride, padding, input.device)
    row = (indices // width - top) // dilation[0]
    column = (indices % width - left) // dilation[1]
    argmax = (row * kernel_size[1] + column).to(torch.uint8)
    return (
        output.contiguous(memory_format=memory_format),
        argmax.contiguous(memory_format=memory_format),
    )


def max_pool2d_backward(
    grad_output: Tensor,
    argmax: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See schema.py. Windows that overlap add up in the accumulation dtype."""
    memory_format = memory_format_of(grad_output)
    indices = flat_indices(argmax, input_size[3], kernel_size, stride, padding, dilation)
    indices = indices.clamp(min=0)  # a window's first element may lie in the padding
    batch, channels, height, width = input_size
    grad_input = grad_output.new_zeros(
        (batch, channels, height * width), dtype=_activations.opmath_dtype(grad_output.dtype)
    )
    grad_input = grad_input.scatter_add(
        2, indices.flatten(2), grad_output.to(grad_input.dtype).flatten(2)
    )
    grad_input = grad_input.to(grad_output.dtype).view(batch, channels, height, width)
    return grad_input.contiguous(memory_format=memory_format)


def flat_indices(
    argmax: Tensor,
    width: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Window-local positions as torch's indices: int64, ``row * width + column`` of the input."""
    top, left = _window_origins(argmax.shape[2:], stride, padding, argmax.device)
    position = argmax.to(torch.int64)
    row = top + position // kernel_size[1] * dilation[0]
    column = left + position % kernel_size[1] * dilation[1]
    return row * width + column


def _window_origins(
    output_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Input row (as a column vector) and input column at which each window starts."""
    top = torch.arange(output_size[0], device=device) * stride[0] - padding[0]
    left = torch.arange(output_size[1], device=device) * stride[1] - padding[1]
    return top[:, None], left


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1)
