"""Convolutions with a fused epilogue, for one, two and three spatial axes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fmkernels import _checks
from fmkernels._remember import remember
from fmkernels.functional._conv_arguments import (
    IntOrTuple,
    Pool,
    Window,
    check_image,
    check_image_shape,
    check_kernel_fits,
    check_padding_mode,
    check_transposed_size,
    check_vectors,
    check_weight_shape,
    check_window,
    padding_edges,
    parse_pool,
    transposed_edges,
)
from fmkernels.functional.pool import pool_image
from fmkernels.ops import _activations
from fmkernels.ops.conv import autograd, quick
from fmkernels.ops.conv.backends import fuses_pool
from fmkernels.ops.conv.geometry import ConvOptions


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple | str = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    pool: Pool | None = None,
    backend: str | None = None,
    packed_weight: Tensor | None = None,
) -> Tensor:
    """2-D convolution with a fused epilogue.

    ``y = pool(activation(scale * (conv2d(input, weight) + bias) + shift + residual))``

    Args:
        input: (N, C, H, W) or (C, H, W), float32, bfloat16, float16 or float64. The output has the
            memory format of the input (contiguous or channels_last); any other strides are copied.
        weight: (O, C / groups, KH, KW), dtype and device of ``input``.
        bias: (O) or None.
        stride, dilation: int or pair, at least 1.
        padding: int or pair, at least 0; ``"valid"`` for none; ``"same"`` for an output of the
            input's size (stride 1 only; an odd total puts the extra row and column at the end).
        groups: divides C and O.
        padding_mode: what is padded with: ``"zeros"``, ``"reflect"``, ``"replicate"``,
            ``"circular"``.
        activation: a name as in :func:`fmkernels.functional.linear`, or None.
        scale, shift: (O) or None, for example a folded batch norm; of the dtype of ``input``, or
            float32 (applied unrounded) where that has 16 bits.
        residual: the shape of the convolution's output (before pooling), or None.
        pool: None or ``("max" | "avg", kernel_size, stride, padding)``; stride None or left out is
            kernel_size, padding left out is 0. 2x2 and 3x3 windows are fused, others are pooled by
            a second kernel; max windows of more than 256 elements are left to PyTorch (recorded in
            ``last_decisions``; refused under an explicit native backend).
        backend: an explicit backend never falls back; None takes that of ``use_backend``.
        packed_weight: what ``freeze`` packed from ``weight`` for these arguments.

    Returns:
        (N, O, OH, OW), or without N for a 3-D input. Sums are accumulated in float32 (float64 for
        float64). Differentiable once with respect to every tensor argument.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    return _conv(
        2,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        activation,
        scale,
        shift,
        residual,
        pool,
        backend,
        packed_weight,
    )


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple | str = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    pool: Pool | None = None,
    backend: str | None = None,
    packed_weight: Tensor | None = None,
) -> Tensor:
    """1-D convolution with a fused epilogue.

    ``input`` is (N, C, L) or (C, L), ``weight`` (O, C / groups, K), ``residual`` (N, O, OL); the
    integer arguments are ints or 1-tuples. Everything else, including what is raised, is as in
    :func:`conv2d`; pooling runs as a second kernel.
    """
    return _conv(
        1,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        activation,
        scale,
        shift,
        residual,
        pool,
        backend,
        packed_weight,
    )


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple | str = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    pool: Pool | None = None,
    backend: str | None = None,
    packed_weight: Tensor | None = None,
) -> Tensor:
    """3-D convolution with a fused epilogue.

    ``input`` is (N, C, D, H, W) or (C, D, H, W), contiguous or channels_last_3d, ``weight``
    (O, C / groups, KD, KH, KW), ``residual`` (N, O, OD, OH, OW); the integer arguments are ints or
    triples. Everything else, including what is raised, is as in :func:`conv2d`; pooling runs as a
    second kernel.
    """
    return _conv(
        3,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        activation,
        scale,
        shift,
        residual,
        pool,
        backend,
        packed_weight,
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    pool: Pool | None = None,
    backend: str | None = None,
    packed_weight: Tensor | None = None,
) -> Tensor:
    """2-D transposed convolution with a fused epilogue.

    ``y = pool(activation(scale * (conv_transpose2d(input, weight) + bias) + shift + residual))``

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight: (C, O / groups, KH, KW), dtype and device of ``input``.
        bias: (O) or None.
        stride, dilation: int or pair, at least 1.
        padding: int or pair: what is cut off either end of the output.
        output_padding: int or pair, smaller than stride or dilation: added back at the end.
        groups: divides C.
        padding_mode: ``"zeros"`` only, as in torch.
        activation, scale, shift, residual, pool, backend, packed_weight: as in :func:`conv2d`.

    Returns:
        (N, O, OH, OW), ``OH = (H - 1) * stride - 2 * padding + dilation * (KH - 1) +
        output_padding + 1``; without N for a 3-D input.

    Raises:
        As :func:`conv2d`.
    """
    return _conv_transpose(
        2,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        padding_mode,
        activation,
        scale,
        shift,
        residual,
        pool,
        backend,
        packed_weight,
    )


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    pool: Pool | None = None,
    backend: str | None = None,
    packed_weight: Tensor | None = None,
) -> Tensor:
    """1-D transposed convolution with a fused epilogue: :func:`conv_transpose2d` on one axis."""
    return _conv_transpose(
        1,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        padding_mode,
        activation,
        scale,
        shift,
        residual,
        pool,
        backend,
        packed_weight,
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple = 0,
    output_padding: IntOrTuple = 0,
    groups: int = 1,
    dilation: IntOrTuple = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    pool: Pool | None = None,
    backend: str | None = None,
    packed_weight: Tensor | None = None,
) -> Tensor:
    """3-D transposed convolution with a fused epilogue: :func:`conv_transpose2d` on three axes."""
    return _conv_transpose(
        3,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
        padding_mode,
        activation,
        scale,
        shift,
        residual,
        pool,
        backend,
        packed_weight,
    )


def causal_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
    packed_weight: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """1-D convolution in which no output sees a later input, with a state for streaming.

    ``y[t] = activation(scale * (sum over k of weight[k] x[t - (K - 1 - k) * dilation] + bias) +
    shift + residual[t])``, x before the first input being the state. Feeding a sequence in chunks,
    each with the state that the one before returned, equals one call on the whole.

    Args:
        input: (N, C, L) or (C, L).
        weight: (O, C / groups, K); with groups = C it is depthwise.
        state: (N, C, (K - 1) * dilation), the inputs before ``input`` (without N if that has
            none), or None for zeros.
        return_state: also return the state after ``input``.
        the others: as in :func:`conv1d`.

    Returns:
        (N, O, L), or without N; with ``return_state`` a pair of it and the new state, which has
        the shape of ``state`` and is differentiable too.

    Raises:
        As :func:`conv2d`.
    """
    check_image("input", input, 1)
    _checks.tensor("weight", weight)
    _checks.rank("weight", weight, 3)
    _checks.not_empty("weight", weight)
    (step,) = _checks.integers("dilation", dilation, 1, 1)
    _checks.boolean("return_state", return_state)
    reach = _checks.integer("weight: dilation * (kernel - 1)", step * (weight.shape[2] - 1), 0)
    if state is not None:
        _checks.tensor("state", state)
        _checks.same_kind("state", state, "input", input)
        expected = (*input.shape[:-1], reach)
        _checks.shape("state", state, expected, "the inputs that the kernel reaches back to")
        state = state.to(input.dtype)
    output = _conv(
        1,
        input,
        weight,
        bias,
        1,
        0,
        step,
        groups,
        "zeros",
        activation,
        scale,
        shift,
        residual,
        None,
        backend,
        packed_weight,
        (reach, 0),
        state,
    )
    return (output, _next_state(input, state, reach)) if return_state else output


def _next_state(input: Tensor, state: Tensor | None, reach: int) -> Tensor:
    """The last ``reach`` columns of state and input, in memory of their own."""
    length = input.shape[-1]
    if length >= reach:
        return input[..., length - reach :].clone(memory_format=torch.contiguous_format)
    if state is None:
        return F.pad(input, (reach - length, 0))
    return torch.cat((state[..., length:], input), -1)


def conv_with_statistics(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrTuple,
    padding: IntOrTuple | str,
    dilation: IntOrTuple,
    groups: int,
    *,
    padding_mode: str,
    backend: str | None,
    packed_weight: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A convolution for a batch norm that follows: :func:`conv2d` without an epilogue.

    Returns:
        ``(output, mean, biased variance)``, the statistics (O) of each channel of the output over
        batch and pixels; without graph, and None where the backend has not gathered them.

    Raises:
        ValueError: as :func:`conv2d`, and if ``input`` is a single image: a batch norm has no use
            for it.
    """
    _check_operands(input, weight, None)
    if input.dim() == dims + 1:
        raise ValueError(f"input must have a batch dimension, got {_checks.describe(input)}")
    plan = _plan_of(dims, input, weight, stride, padding, dilation, groups, padding_mode)
    check_vectors(input, weight.shape[0], bias=bias)
    if packed_weight is not None:
        _checks.packed_weight("packed_weight", packed_weight, weight)
    return autograd.conv_with_statistics(input, weight, bias, packed_weight, plan.options, backend)


def conv_output_shape(
    dims: int,
    input: Tensor,
    weight: Tensor,
    stride: IntOrTuple,
    padding: IntOrTuple | str,
    dilation: IntOrTuple,
    groups: int,
    padding_mode: str,
) -> tuple[int, ...]:
    """The shape of a convolution's output, which is that of its residual.

    Raises:
        As :func:`conv2d`.
    """
    _check_operands(input, weight, None)
    plan = _plan_of(dims, input, weight, stride, padding, dilation, groups, padding_mode)
    return plan.output_shape


def _conv(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrTuple,
    padding: IntOrTuple | str,
    dilation: IntOrTuple,
    groups: int,
    padding_mode: str,
    activation: str | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    pool: Pool | None,
    backend: str | None,
    packed_weight: Tensor | None,
    edges: tuple[int, ...] | None = None,
    state: Tensor | None = None,
) -> Tensor:
    """The convolutions. ``edges``: padding before and after each axis, instead of ``padding``;
    ``state``: what stands there instead of zeros."""
    _check_operands(input, weight, residual)
    plan = _plan_of(
        dims,
        input,
        weight,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        activation,
        pool,
        edges,
    )
    return _start(
        plan,
        input,
        weight,
        bias,
        scale,
        shift,
        residual,
        packed_weight,
        backend=backend,
        state=state,
    )


def _plan_of(
    dims: int,
    input: Tensor,
    weight: Tensor,
    stride: IntOrTuple,
    padding: IntOrTuple | str,
    dilation: IntOrTuple,
    groups: int,
    padding_mode: str,
    activation: str | None = None,
    pool: Pool | None = None,
    edges: tuple[int, ...] | None = None,
) -> _Plan:
    return _plan(
        dims,
        input.shape,
        weight.shape,
        _checks.integers("stride", stride, dims, 1),
        padding if isinstance(padding, str) else _checks.integers("padding", padding, dims, 0),
        _checks.integers("dilation", dilation, dims, 1),
        groups,
        padding_mode,
        activation,
        parse_pool(pool, dims),
        edges,
    )


def _conv_transpose(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrTuple,
    padding: IntOrTuple,
    output_padding: IntOrTuple,
    groups: int,
    dilation: IntOrTuple,
    padding_mode: str,
    activation: str | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    pool: Pool | None,
    backend: str | None,
    packed_weight: Tensor | None,
) -> Tensor:
    _check_operands(input, weight, residual)
    plan = _transposed_plan(
        dims,
        input.shape,
        weight.shape,
        _checks.integers("stride", stride, dims, 1),
        _checks.integers("padding", padding, dims, 0),
        _checks.integers("output_padding", output_padding, dims, 0),
        _checks.integers("dilation", dilation, dims, 1),
        groups,
        padding_mode,
        activation,
        parse_pool(pool, dims),
    )
    return _start(
        plan, input, weight, bias, scale, shift, residual, packed_weight, backend=backend
    )


class _Plan(NamedTuple):
    """What a call comes to once its sizes and options have been checked.

    Attributes:
        options: with the pool, where the op has it in its epilogue.
        output_shape: of the convolution, before pooling.
        pool: ``(kind, window)`` of a pool that follows as an op of its own, or None.
    """

    options: ConvOptions
    output_shape: tuple[int, ...]
    pool: tuple[str, Window] | None


@remember
def _plan(
    dims: int,
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
    padding_mode: str,
    activation: str | None,
    pool: tuple[str | None, Window],
    edges: tuple[int, ...] | None,
) -> _Plan:
    check_image_shape("input", input_shape, dims)
    check_weight_shape(weight_shape, dims, input_shape[-dims - 1], groups, False)
    kernel, size = tuple(weight_shape[2:]), input_shape[-dims:]
    edges = padding_edges(padding, kernel, stride, dilation) if edges is None else edges
    check_padding_mode(padding_mode, size, edges)
    output_size = check_kernel_fits(size, kernel, stride, edges, dilation)
    options = ConvOptions(stride, edges, dilation, groups, False, padding_mode, activation)
    batch = input_shape[: -dims - 1]
    return _plan_with_pool(options, (*batch, weight_shape[0], *output_size), *pool)


@remember
def _transposed_plan(
    dims: int,
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    padding_mode: str,
    activation: str | None,
    pool: tuple[str | None, Window],
) -> _Plan:
    check_image_shape("input", input_shape, dims)
    check_weight_shape(weight_shape, dims, input_shape[-dims - 1], groups, True)
    _checks.choice("padding_mode", padding_mode, ("zeros",))
    edges = transposed_edges(padding, output_padding, stride, dilation)
    kernel, size = tuple(weight_shape[2:]), input_shape[-dims:]
    output_size = check_transposed_size(size, kernel, stride, edges, dilation)
    options = ConvOptions(stride, edges, dilation, groups, True, "zeros", activation)
    batch = input_shape[: -dims - 1]
    return _plan_with_pool(options, (*batch, weight_shape[1] * groups, *output_size), *pool)


def _plan_with_pool(
    options: ConvOptions, output_shape: tuple[int, ...], kind: str | None, window: Window
) -> _Plan:
    _checks.choice("activation", options.activation, _activations.CHOICES)
    if kind is None:
        return _Plan(options, output_shape, None)
    dims = len(options.stride)
    check_window("pool: the conv's output", output_shape[-dims:], window, False)
    fused = _with_pool(options, kind, window)
    if fused is None:
        return _Plan(options, output_shape, (kind, window))
    return _Plan(fused, output_shape, None)


def _with_pool(options: ConvOptions, kind: str, window: Window) -> ConvOptions | None:
    """The options of the op that pools in its epilogue, or None if it does not."""
    if not fuses_pool(window[0], options):
        return None
    return options._replace(pool=kind, window=(*window[0], *window[1], *window[2]))


@remember
def layer_options(
    dims: int,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
    padding_mode: str,
    activation: str | None,
    pool: Pool | None,
    output_padding: tuple[int, ...] | None,
) -> ConvOptions | None:
    """What the attributes of a convolution layer come to, for images of any size.

    With an ``output_padding`` it is a transposed one.

    None where it takes more than one op, or where a call would raise.
    """
    try:
        kind, window = parse_pool(pool, dims)
        stride = _checks.integers("stride", stride, dims, 1)
        dilation = _checks.integers("dilation", dilation, dims, 1)
        transposed = output_padding is not None
        if transposed:
            edges = transposed_edges(padding, output_padding, stride, dilation)
        else:
            edges = padding_edges(padding, kernel_size, stride, dilation)
        _checks.choice("activation", activation, _activations.CHOICES)
    except (TypeError, ValueError):
        return None
    options = ConvOptions(stride, edges, dilation, groups, transposed, padding_mode, activation)
    return options if kind is None else _with_pool(options, kind, window)


def _check_operands(input: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    _checks.tensor("input", input)
    _checks.operand("weight", weight, "input", input)
    if residual is not None:
        _checks.operand("residual", residual, "input", input)


def _start(
    plan: _Plan, *operands: Tensor | None, backend: str | None, state: Tensor | None = None
) -> Tensor:
    """The everyday way, where the call is one, else the checked one; operands as ``_run``'s."""
    if state is None and plan.pool is None:
        output = quick.conv(*operands, plan.options, backend)
        if output is not None:
            return output
    return _run(plan, *operands, backend, state)


def _run(
    plan: _Plan,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    packed_weight: Tensor | None,
    backend: str | None,
    state: Tensor | None,
) -> Tensor:
    dims = len(plan.options.stride)
    check_vectors(input, plan.output_shape[-dims - 1], bias=bias, scale=scale, shift=shift)
    if residual is not None:
        _checks.shape("residual", residual, plan.output_shape, "the conv's output")
    if packed_weight is not None:
        _checks.packed_weight("packed_weight", packed_weight, weight)
    unbatched = input.dim() == dims + 1
    if unbatched:
        input = input.unsqueeze(0)
        residual = None if residual is None else residual.unsqueeze(0)
        state = None if state is None else state.unsqueeze(0)
    output = autograd.conv(
        input, weight, bias, scale, shift, residual, packed_weight, plan.options, backend, state
    )
    if plan.pool is not None:
        output = pool_image(output, *plan.pool, backend)
    return output.squeeze(0) if unbatched else output
