"""Differentiable conv2d and max_pool2d: backend, memory format, autocast, graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmkernels._dispatch import current_precision, select
from fmkernels.ops import _activations
from fmkernels.ops._autograd import cast_for_autocast, needs_graph
from fmkernels.ops.conv.backends import CONV2D, MAX_POOL2D
from fmkernels.ops.conv.reference import flat_indices  # noqa: F401 - part of this interface
from fmkernels.ops.conv.schema import memory_format_of

IntPair = tuple[int, int]


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        input,
        weight,
        bias,
        scale,
        shift,
        residual,
        packed_weight,
        stride,
        padding,
        dilation,
        groups,
        activation,
        pool,
        backend,
        exact,
    ):
        options = (stride, padding, dilation, groups, activation, pool)
        output, saved, argmax = CONV2D[backend].forward(
            input, weight, bias, scale, shift, residual, packed_weight, *options, True, exact
        )
        # Only an unpooled relu's derivative reads the output; for the others `saved` stands in for
        # it, so that the output is not kept alive, and may be overwritten in place.
        kept_output = output if activation == "relu" and not pool else saved
        ctx.save_for_backward(input, weight, scale, kept_output, saved, argmax)
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.backend = backend
        ctx.exact = exact
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * 15
        input, weight, scale, output, saved, argmax = ctx.saved_tensors
        need_input, need_weight, need_bias, _, need_shift, need_residual = ctx.needs_input_grad[:6]
        grad_output = grad_output.contiguous(memory_format=memory_format_of(input))
        activation, pool = ctx.options[4:]
        # Without activation and pool the residual's gradient is grad_output itself: no copy.
        alias_residual = need_residual and activation is None and not pool
        backward = CONV2D[ctx.backend].backward
        grad_input, grad_weight, grad_bias, grad_shift, grad_residual = backward(
            grad_output,
            input,
            weight,
            scale,
            output,
            saved,
            argmax,
            *ctx.options,
            need_input,
            need_weight,
            need_bias,
            need_shift,
            need_residual and not alias_residual,
            ctx.exact,
        )
        if alias_residual:
            grad_residual = grad_output
        return (
            grad_input if need_input else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            None,
            grad_shift if need_shift else None,
            grad_residual if need_residual else None,
        ) + (None,) * 9


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    packed_weight: Tensor | None,
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair,
    groups: int,
    activation: str | None,
    pool: tuple[int, ...],
    backend: str | None,
) -> Tensor:
    """``maxpool(activation(scale * (conv2d(input, weight) + bias) + shift + residual))``.

    Args:
        input: (N, C, H, W) of any strides; the arguments have been checked.
        packed_weight: result of :func:`pack_conv2d_weight`; ignored where autocast casts the
            weight.
        pool: empty or (kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w).
        backend: as in :func:`fmkernels._dispatch.select`.
    """
    raw_weight = weight
    input, weight, bias, scale, shift, residual = cast_for_autocast(
        input, weight, bias, scale, shift, residual
    )
    if weight is not raw_weight:
        packed_weight = None
    if scale is not None and needs_graph(scale):
        # The gradient of scale needs the convolution's output, which the fused op does not keep.
        output = conv2d(
            input, weight, bias, None, None, None, packed_weight, stride, padding, dilation,
            groups, None, (), backend,
        )  # fmt: skip
        return _epilogue(output, scale, shift, residual, activation, pool, backend)
    name, implementation = select("conv2d", CONV2D, backend, input, weight, activation, pool)
    memory_format = image_format(input)
    input = input.contiguous(memory_format=memory_format)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    scale = None if scale is None else scale.contiguous()
    shift = None if shift is None else shift.contiguous()
    if residual is not None:
        residual = residual.contiguous(memory_format=memory_format)
    tensors = (input, weight, bias, scale, shift, residual)
    options = (stride, padding, dilation, groups, activation, pool)
    exact = current_precision() == "exact"
    if needs_graph(*tensors):
        return _Conv2d.apply(*tensors, packed_weight, *options, name, exact)
    return implementation.forward(*tensors, packed_weight, *options, False, exact)[0]


def pack_conv2d_weight(
    weight: Tensor,
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair,
    groups: int,
    backend: str | None,
) -> Tensor | None:
    """The weight as the chosen backend wants it, or None if that backend packs nothing.

    What is packed under ``precision("exact")`` serves exact calls without packing anew.
    """
    _, implementation = select("conv2d", CONV2D, backend, weight, weight, None, ())
    if implementation.pack is None:
        return None
    with torch.no_grad():
        exact = current_precision() == "exact"
        return implementation.pack(weight.contiguous(), stride, padding, dilation, groups, exact)


def _epilogue(
    conv: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    pool: tuple[int, ...],
    backend: str | None,
) -> Tensor:
    """The epilogue op by op, for the case that the fused op cannot differentiate."""
    output = conv * scale.view(-1, 1, 1)
    if shift is not None:
        output = output + shift.view(-1, 1, 1)
    if residual is not None:
        output = output + residual
    output = _activations.apply(activation, output)
    if pool:
        output, _ = max_pool2d(output, pool[0:2], pool[2:4], pool[4:6], (1, 1), False, backend)
    return output


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, kernel_size, stride, padding, dilation, ceil_mode, backend):
        output, argmax = MAX_POOL2D[backend].forward(
            input, kernel_size, stride, padding, dilation, ceil_mode
        )
        ctx.save_for_backward(argmax)
        ctx.mark_non_differentiable(argmax)
        ctx.set_materialize_grads(False)
        ctx.input_size = tuple(input.shape)
        ctx.memory_format = memory_format_of(input)
        ctx.options = (kernel_size, stride, padding, dilation)
        ctx.backend = backend
        return output, argmax

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return (None,) * 7
        (argmax,) = ctx.saved_tensors
        grad_output = grad_output.contiguous(memory_format=ctx.memory_format)
        grad_input = MAX_POOL2D[ctx.backend].backward(
            grad_output, argmax, ctx.input_size, *ctx.options
        )
        return (grad_input,) + (None,) * 6


def max_pool2d(
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair,
    ceil_mode: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Max-pooling of (N, C, H, W) on checked arguments.

    Returns:
        ``(output, argmax)``, argmax being the uint8 window-local position of each maximum.
    """
    name, implementation = select("max_pool2d", MAX_POOL2D, backend, input, kernel_size)
    input = input.contiguous(memory_format=image_format(input))
    options = (kernel_size, stride, padding, dilation, ceil_mode)
    if needs_graph(input):
        return _MaxPool2d.apply(input, *options, name)
    return implementation.forward(input, *options)


def image_format(input: Tensor) -> torch.memory_format:
    """The memory format an image of any strides is brought to: its own, else contiguous."""
    if not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
