"""Differentiable pooling: backend, layout, graph."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import select
from fmkernels.ops._autograd import needs_graph, once_differentiable
from fmkernels.ops.conv.backends import AVG_POOL, MAX_POOL
from fmkernels.ops.conv.geometry import in_layout, is_channels_last, window_parts
from fmkernels.ops.conv.reference_pool import flat_indices  # noqa: F401 - part of this interface

Ints = tuple[int, ...]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, kernel_size, stride, padding, dilation, ceil_mode, backend):
        output, argmax = MAX_POOL[backend].forward(
            input, kernel_size, stride, padding, dilation, ceil_mode
        )
        ctx.save_for_backward(argmax)
        ctx.mark_non_differentiable(argmax)
        ctx.set_materialize_grads(False)
        ctx.input_size = tuple(input.shape)
        ctx.channels_last = is_channels_last(input)
        ctx.options = (kernel_size, stride, padding, dilation)
        ctx.backend = backend
        return output, argmax

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return (None,) * 7
        (argmax,) = ctx.saved_tensors
        grad_input = MAX_POOL[ctx.backend].backward(
            in_layout(grad_output, ctx.channels_last), argmax, ctx.input_size, *ctx.options
        )
        return (grad_input,) + (None,) * 6


def max_pool(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Max-pooling of (N, C, *spatial) on checked arguments.

    Returns:
        ``(output, argmax)``, argmax being the uint8 window-local position of each maximum.
    """
    op = f"max_pool{len(kernel_size)}d"
    name, implementation = select(op, MAX_POOL, backend, input, kernel_size)
    input = in_layout(input, is_channels_last(input))
    options = (kernel_size, stride, padding, dilation, ceil_mode)
    if needs_graph(input):
        return _MaxPool.apply(input, *options, name)
    return implementation.forward(input, *options)


class _AvgPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor, backend
    ):
        ctx.set_materialize_grads(False)
        ctx.input_size = tuple(input.shape)
        ctx.channels_last = is_channels_last(input)
        ctx.options = (kernel_size, stride, padding, count_include_pad, divisor)
        ctx.backend = backend
        return AVG_POOL[backend].forward(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * 8
        grad_input = AVG_POOL[ctx.backend].backward(
            in_layout(grad_output, ctx.channels_last), ctx.input_size, *ctx.options
        )
        return (grad_input,) + (None,) * 7


def avg_pool(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    backend: str | None,
) -> Tensor:
    """Average-pooling of (N, C, *spatial) on checked arguments."""
    op = f"avg_pool{len(kernel_size)}d"
    name, implementation = select(op, AVG_POOL, backend, input, kernel_size)
    input = in_layout(input, is_channels_last(input))
    options = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if needs_graph(input):
        return _AvgPool.apply(input, *options, name)
    return implementation.forward(input, *options)


def pool(input: Tensor, kind: str, window: Ints, backend: str | None) -> Tensor:
    """The pool of a convolution's epilogue (ConvOptions.pool and .window) on its own."""
    kernel_size, stride, padding = window_parts(window)
    if kind == "avg":
        return avg_pool(input, kernel_size, stride, padding, False, True, None, backend)
    dilation = (1,) * len(kernel_size)
    return max_pool(input, kernel_size, stride, padding, dilation, False, backend)[0]
