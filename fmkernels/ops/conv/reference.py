"""The convolution ops in plain PyTorch: any device and dtype, explicit backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fmkernels.ops import _activations
from fmkernels.ops.conv.geometry import (
    ConvOptions,
    conv_shape,
    edges_of,
    in_layout,
    is_channels_last,
    padding_source,
    per_channel,
    window_parts,
)
from fmkernels.ops.conv.reference_pool import (
    avg_pool_backward,
    avg_pool_forward,
    max_pool_backward,
    max_pool_forward,
)
from fmkernels.ops.conv.schema import RELU_ZERO


def conv_forward(
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
    transposed: bool,
    padding_mode: str,
    activation: str | None,
    pool: str | None,
    window: Sequence[int],
    save_for_backward: bool,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See schema.py. ``packed_weight`` and ``exact`` are not read."""
    options = ConvOptions(
        stride, padding, dilation, groups, transposed, padding_mode, activation, pool, window
    )
    channels_last, dims = is_channels_last(input), input.dim() - 2
    output = _convolution(input, weight, bias, options)
    saved = input.new_empty((0,))
    argmax = input.new_empty((0,), dtype=torch.uint8)
    if activation is not None or any(t is not None for t in (scale, shift, residual)):
        # The epilogue runs in the accumulation dtype, so that only its result is rounded again.
        pre = output.to(_activations.opmath_dtype(input.dtype))
        if scale is not None:
            pre = pre * per_channel(scale, dims)
        if shift is not None:
            pre = pre + per_channel(shift, dims)
        if residual is not None:
            pre = pre + residual
        if save_for_backward and _activations.needs_preactivation(activation):
            saved = in_layout(pre.to(input.dtype), channels_last)
        output = _activations.apply(activation, pre).to(input.dtype)
    output = in_layout(output, channels_last)
    if pool == "max":
        output, positions = max_pool_forward(output, *window_parts(window), (1,) * dims, False)
        if save_for_backward:
            argmax = positions
            if activation == "relu":
                argmax = positions.masked_fill(output <= 0, RELU_ZERO)
    elif pool == "avg":
        if save_for_backward and activation == "relu":
            argmax = in_layout((~(output <= 0)).to(torch.uint8), channels_last)
        output = avg_pool_forward(output, *window_parts(window), False, True, None)
    return output, saved, argmax


def conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    output: Tensor,
    saved: Tensor,
    argmax: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    padding_mode: str,
    activation: str | None,
    pool: str | None,
    window: Sequence[int],
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_scale: bool,
    need_shift: bool,
    need_residual: bool,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See schema.py."""
    options = ConvOptions(
        stride, padding, dilation, groups, transposed, padding_mode, activation, pool, window
    )
    dtype, channels_last, dims = input.dtype, is_channels_last(input), input.dim() - 2
    absent = input.new_empty((0,))
    grad = grad_output.to(_activations.opmath_dtype(dtype))
    absent_vector = grad.new_empty((0,))
    if pool:
        grad = _unpool(grad, argmax, conv_shape(input, weight, options), options)
    if not (pool and activation == "relu"):
        grad = _activations.apply_backward(activation, grad, saved, output)
    # grad is now that of the pre-activation: scale * (conv + bias) + shift + residual.
    pixels = (0, *range(2, dims + 2))
    grad_shift = grad.sum(pixels) if need_shift else absent_vector
    grad_residual = in_layout(grad.to(dtype), channels_last) if need_residual else absent
    grad_scale = absent_vector
    if need_scale:
        grad_scale = (grad * _convolution(input, weight, bias, options)).sum(pixels)
    if scale is not None:
        grad = grad * per_channel(scale, dims)
    grad_bias = grad.sum(pixels).to(dtype) if need_bias else absent
    grad_input = grad_weight = absent
    if need_input or need_weight:
        grad_input, grad_weight = _convolution_backward(
            grad.to(dtype), input, weight, options, need_input, need_weight
        )
    return (
        in_layout(grad_input, channels_last) if need_input else absent,
        grad_weight.contiguous() if need_weight else absent,
        grad_bias,
        grad_scale,
        grad_shift,
        grad_residual,
    )


def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, options: ConvOptions
) -> Tensor:
    padded, arguments = _as_torch(input, options)
    return torch.ops.aten.convolution(padded, weight, bias, *arguments)


def _convolution_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    options: ConvOptions,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    padded, arguments = _as_torch(input, options)
    grad_padded, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, padded, weight, None, *arguments, (need_input, need_weight, False)
    )
    if not need_input or padded is input:
        return grad_padded, grad_weight
    # Every padded position hands its gradient to the position that it repeats.
    grad_input = grad_padded.to(_activations.opmath_dtype(grad.dtype))
    for axis, (before, after) in enumerate(edges_of(options.padding)):
        size, dim = input.shape[2 + axis], 2 + axis
        if options.padding_mode == "zeros":
            grad_input = grad_input.narrow(dim, before, size)
        elif before or after:
            source = padding_source(size, before, after, options.padding_mode, input.device)
            shape = (*grad_input.shape[:dim], size, *grad_input.shape[dim + 1 :])
            grad_input = grad_input.new_zeros(shape).index_add(dim, source, grad_input)
    return grad_input.to(grad.dtype), grad_weight


def _as_torch(input: Tensor, options: ConvOptions) -> tuple[Tensor, tuple]:
    """The input with the padding that torch's op cannot do, and that op's integer arguments."""
    o = options
    edges = edges_of(o.padding)
    pads = tuple(before for before, _ in edges)
    output_padding = (0,) * len(edges)
    if o.transposed:
        output_padding = tuple(before - after for before, after in edges)
    elif o.padding_mode != "zeros" or any(before != after for before, after in edges):
        pads = (0,) * len(edges)
        if o.padding_mode == "zeros":
            input = F.pad(input, [amount for edge in reversed(edges) for amount in edge])
        else:
            for axis, (before, after) in enumerate(edges):
                if before or after:
                    source = padding_source(
                        input.shape[2 + axis], before, after, o.padding_mode, input.device
                    )
                    input = input.index_select(2 + axis, source)
    return input, (o.stride, pads, o.dilation, o.transposed, output_padding, o.groups)


def _unpool(grad: Tensor, argmax: Tensor, shape: tuple[int, ...], options: ConvOptions) -> Tensor:
    """The gradient before the pool, and, as argmax tells it, before a relu."""
    parts = window_parts(options.window)
    relu = options.activation == "relu"
    if options.pool == "avg":
        grad = avg_pool_backward(grad, shape, *parts, True, None)
        return grad * argmax if relu else grad
    if relu:
        dead = argmax == RELU_ZERO
        grad = grad.masked_fill(dead, 0)
        argmax = argmax.masked_fill(dead, 0)  # which may lie outside, see max_pool_backward
    return max_pool_backward(grad, argmax, shape, *parts, (1,) * (grad.dim() - 2))
