"""Differentiable convolution: backend, layout, autocast, graph."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import current_precision, select
from fmkernels.ops._activations import opmath_dtype
from fmkernels.ops._autograd import cast_for_autocast, needs_graph, once_differentiable
from fmkernels.ops.conv.autograd_causal import causal_conv
from fmkernels.ops.conv.autograd_pool import pool
from fmkernels.ops.conv.backends import CONV, fuses_pool
from fmkernels.ops.conv.geometry import ConvOptions, in_layout, is_channels_last, window_parts
from fmkernels.ops.conv.schema import PACKED_POOL_STRIDE

_OP_NAMES = (
    ("conv1d", "conv2d", "conv3d"),
    ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
)
_OPTION_COUNT = len(ConvOptions._fields)


class _Conv(torch.autograd.Function):
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
        backend,
        exact,
        statistics,
        *options,
    ):
        options = ConvOptions(*options)
        results = _forward(
            (input, weight, bias, scale, shift, residual),
            packed_weight,
            CONV[backend],
            exact,
            statistics,
            options,
            True,
        )
        output, saved, argmax, *moments = results
        # Only an unpooled relu's derivative reads the output; for the others `saved` stands in for
        # it, so that the output is not kept alive, and may be overwritten in place.
        unpooled_relu = options.activation == "relu" and options.pool is None
        kept_bias = bias if scale is not None and scale.requires_grad else None
        ctx.save_for_backward(
            input, weight, kept_bias, scale, output if unpooled_relu else saved, saved, argmax
        )
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.backend = backend
        ctx.exact = exact
        if not statistics:
            return output
        ctx.mark_non_differentiable(*moments)
        return output, *moments

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, *_):
        nothing = (None,) * (4 + _OPTION_COUNT)
        if grad_output is None:
            return (None,) * 6 + nothing
        input, weight, bias, scale, output, saved, argmax = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:6])
        need_residual = needs[5]
        grad_output = in_layout(grad_output, is_channels_last(input))
        # Without activation and pool the residual's gradient is grad_output itself: no copy.
        if ctx.options.activation is None and ctx.options.pool is None:
            needs[5] = False
        *grads, grad_residual = CONV[ctx.backend].backward(
            grad_output,
            input,
            weight,
            bias,
            scale,
            output,
            saved,
            argmax,
            *ctx.options,
            *needs,
            ctx.exact,
        )
        if need_residual and not needs[5]:
            grad_residual, needs[5] = grad_output, True
        grads = (*grads, grad_residual)
        grads = tuple(g if need else None for g, need in zip(grads, needs, strict=True))
        return grads + nothing


def _forward(tensors, packed_weight, implementation, exact, statistics, options, save):
    """``(output, saved, argmax)`` of conv_forward, and what conv_statistics adds if wanted."""
    if not statistics:
        return implementation.forward(*tensors, packed_weight, *options, save, exact)
    output, mean, variance = implementation.statistics(
        *tensors[:3], packed_weight, *options[:4], options.padding_mode, exact
    )
    nothing = output.new_empty((0,)), output.new_empty((0,), dtype=torch.uint8)
    return output, *nothing, mean, variance


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    packed_weight: Tensor | None,
    options: ConvOptions,
    backend: str | None,
    state: Tensor | None = None,
) -> Tensor:
    """``pool(activation(scale * (conv(input, weight) + bias) + shift + residual))``.

    Args:
        input: (N, C, *spatial) of any strides; the arguments have been checked.
        scale, shift: of the dtype of ``input`` or the one it is accumulated in.
        packed_weight: result of :func:`pack_conv_weight`; ignored where autocast casts the weight.
        backend: as in :func:`fmkernels._dispatch.select`.
        state: (N, C, padding) of a convolution over one axis that is padded on the left alone,
            what stands there instead of zeros.
    """
    raw_weight = weight
    input, weight, bias, residual, state = cast_for_autocast(input, weight, bias, residual, state)
    if weight is not raw_weight:
        packed_weight = None
    has_epilogue = not (scale is None and shift is None and residual is None)
    if state is not None:
        if not has_epilogue:
            output = causal_conv(input, weight, bias, state, options, backend)
            if output is not None:
                return output
        input, options = torch.cat((state, input), -1), options._replace(padding=(0, 0))
    if options.pool is not None and not fuses_pool(window_parts(options.window)[0], options):
        bare = options._replace(pool=None, window=())
        output = conv(input, weight, bias, scale, shift, residual, packed_weight, bare, backend)
        return pool(output, options.pool, options.window, backend)
    tensors = (input, weight, bias, scale, shift, residual)
    return _dispatch(tensors, packed_weight, options, backend, has_epilogue, False)[0]


def conv_with_statistics(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed_weight: Tensor | None,
    options: ConvOptions,
    backend: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(output, mean, biased variance)`` of a convolution without epilogue.

    The statistics are those of each channel of the output, (O) and without graph, for a batch norm
    that follows; None from a backend that does not gather them on the way.
    """
    raw_weight = weight
    input, weight, bias = cast_for_autocast(input, weight, bias)
    if weight is not raw_weight:
        packed_weight = None
    tensors = (input, weight, bias, None, None, None)
    return _dispatch(tensors, packed_weight, options, backend, False, True)


def _dispatch(
    tensors: tuple[Tensor | None, ...],
    packed_weight: Tensor | None,
    options: ConvOptions,
    backend: str | None,
    has_epilogue: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Chooses the backend, and gives it the operands in a layout that it takes."""
    input, weight, bias, scale, shift, residual = tensors
    name, implementation = select(
        op_name(options), CONV, backend, input, weight, options, has_epilogue
    )
    statistics = statistics and implementation.statistics is not None
    channels_last = is_channels_last(input)
    opmath = opmath_dtype(input.dtype)
    exact = current_precision() == "exact"
    graph = needs_graph(*tensors)
    input = in_layout(input, channels_last)
    # Triton's kernels read a channels-last weight in place; packing it would be another launch.
    if name != "triton" or torch.compiler.is_compiling():
        unread = packed_weight if name == "cpu" and not graph and not statistics else None
        weight = readable_weight(weight, unread, options, exact)
    bias = None if bias is None else bias.contiguous()
    scale = None if scale is None else scale.to(opmath).contiguous()
    shift = None if shift is None else shift.to(opmath).contiguous()
    residual = None if residual is None else in_layout(residual, channels_last)
    tensors = (input, weight, bias, scale, shift, residual)
    if graph:
        results = _Conv.apply(*tensors, packed_weight, name, exact, statistics, *options)
        return results if statistics else (results, None, None)
    output, _, _, *moments = _forward(
        tensors, packed_weight, implementation, exact, statistics, options, False
    )
    return (output, *moments) if statistics else (output, None, None)


def readable_weight(
    weight: Tensor, packed_weight: Tensor | None, options: ConvOptions, exact: bool
) -> Tensor:
    """The weight as conv_forward of the native kernels wants it: any, where it is not read."""
    if weight.is_contiguous():
        return weight
    packed = packed_weight is not None and not exact and max(weight.shape[2:]) > 1
    if packed and max(window_parts(options.window)[1], default=0) <= PACKED_POOL_STRIDE:
        return weight
    return weight.contiguous()


def op_name(options: ConvOptions) -> str:
    """The name of the convolution in messages and decisions."""
    return _OP_NAMES[options.transposed][len(options.stride) - 1]


def pack_conv_weight(weight: Tensor, options: ConvOptions, backend: str | None) -> Tensor | None:
    """The weight as the chosen backend wants it, or None if that backend packs nothing.

    What is packed under ``precision("exact")`` serves exact calls without packing anew.
    """
    options = options._replace(activation=None, pool=None, window=())
    _, implementation = select(op_name(options), CONV, backend, weight, weight, options)
    if implementation.pack is None:
        return None
    with torch.no_grad():
        exact = current_precision() == "exact"
        return implementation.pack(weight.contiguous(), *options[:6], exact)
