"""Depthwise convolutions on CUDA C++ kernels: see csrc/cuda/depthwise_conv.h.

``depthwise_forward``
    input ``(N, C, H, W)``, weight ``(C * M, 1, KH, KW)``, bias ``(C * M)``, state
    ``(N, C, H, S)``: the S columns before the first, or None for zeros; all contiguous and of one
    dtype. padding: top, bottom, left, right; the state is part of the left one. Returns
    ``activation(conv + bias)`` and, with ``save_for_backward`` and an activation other than relu,
    the pre-activation.
``depthwise_backward``
    saved: the pre-activation, or the output of a relu, or None without activation. Returns the
    gradients of input, state, weight and bias; empty tensors of shape ``(0,)`` for what is not
    needed. The same bits in each run.
``depthwise_problem``
    Why the device cannot take such a convolution; empty if it can.

``conv_forward`` and ``conv_backward`` below are the ops of schema.py for depthwise convolutions of
contiguous images with one or two axes. Bias and activation are fused; scale, shift and residual
are passes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels._dispatch import SUPPORTED, Support
from fmkernels.ops import _activations
from fmkernels.ops._cuda_support import cuda_support, problem_of
from fmkernels.ops.conv.geometry import ConvOptions, is_channels_last, per_channel

_library = torch.library.Library("fmkernels", "FRAGMENT")
_OPTIONS = "int[] stride, int[] padding, int[] dilation, str? activation"
_library.define(
    "depthwise_forward(Tensor input, Tensor weight, Tensor? bias, Tensor? state, "
    f"{_OPTIONS}, bool save_for_backward) -> (Tensor output, Tensor saved)"
)
_library.define(
    "depthwise_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? state, "
    f"Tensor? saved, {_OPTIONS}, bool need_input, bool need_state, bool need_weight, "
    "bool need_bias) "
    "-> (Tensor grad_input, Tensor grad_state, Tensor grad_weight, Tensor grad_bias)"
)
_library.define(
    "depthwise_problem(int device, str dtype, int[] input, int[] weight, int[] stride, "
    "int[] padding, int[] dilation) -> str"
)
_ops = torch.ops.fmkernels


def _output_shape(input, weight, stride, padding, dilation) -> tuple[int, ...]:
    sizes = [
        (input.size(2 + a) + padding[2 * a] + padding[2 * a + 1]
         - dilation[a] * (weight.size(2 + a) - 1) - 1) // stride[a] + 1
        for a in range(2)
    ]  # fmt: skip
    return (input.size(0), weight.size(0), *sizes)


@torch.library.register_fake("fmkernels::depthwise_forward", lib=_library)
def _forward_fake(
    input, weight, bias, state, stride, padding, dilation, activation, save_for_backward
):
    shape = _output_shape(input, weight, stride, padding, dilation)
    saves = save_for_backward and activation not in (None, "relu")
    return input.new_empty(shape), input.new_empty(shape if saves else (0,))


@torch.library.register_fake("fmkernels::depthwise_backward", lib=_library)
def _backward_fake(
    grad_output,
    input,
    weight,
    state,
    saved,
    stride,
    padding,
    dilation,
    activation,
    need_input,
    need_state,
    need_weight,
    need_bias,
):
    absent = (0,)
    return (
        input.new_empty(input.shape if need_input else absent),
        input.new_empty(state.shape if need_state and state is not None else absent),
        input.new_empty(weight.shape if need_weight or need_bias else absent),
        input.new_empty((weight.size(0),) if need_bias else absent),
    )


# Why these stand before Triton and cuDNN where they serve: a depthwise convolution is bound by
# memory, so what counts is that each element is read once (the halo lies in shared memory) and
# that bias and activation are no passes of their own. Channels last is left to Triton, whose tiles
# of channels suit it. From counts of bytes, not measured.
def depthwise_supports(
    input: Tensor, weight: Tensor, options: ConvOptions, has_epilogue: bool = False
) -> Support:
    """Whether the kernels serve a convolution."""
    support = cuda_support(input)
    if not support.ok:
        return support
    axes = len(options.stride)
    if options.groups != input.size(1) or weight.size(1) != 1 or options.transposed:
        return Support(False, "takes depthwise convolutions only")
    if axes > 2:
        return Support(False, f"takes one or two axes, got {axes}")
    if options.padding_mode != "zeros":
        return Support(False, f"has no {options.padding_mode} padding")
    if options.pool is not None:
        return Support(False, "has no pool in its epilogue")
    if is_channels_last(input):
        return Support(False, "takes contiguous images, got channels last")
    one = (1,) * (2 - axes)
    shapes = ((*t.shape[:2], *one, *t.shape[2:]) for t in (input, weight))
    problem = problem_of(
        "depthwise_problem", input.device.index, input.dtype, *shapes, *_numbers(options)
    )
    return Support(False, problem) if problem else SUPPORTED


def _two_axes(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """With an axis of height 1 where there is but one."""
    if input.dim() == 3:
        input, weight = input.unsqueeze(2), weight.unsqueeze(2)
    return input.contiguous(), weight.contiguous()


def _numbers(options: ConvOptions) -> tuple[tuple[int, ...], ...]:
    """Stride, padding and dilation for two axes."""
    if len(options.stride) == 2:
        return tuple(options.stride), tuple(options.padding), tuple(options.dilation)
    return (1, *options.stride), (0, 0, *options.padding), (1, *options.dilation)


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
    """The op ``conv_forward``."""
    image, filters = _two_axes(input, weight)
    numbers = _numbers(ConvOptions(stride, padding, dilation))
    absent, no_argmax = input.new_empty(0), input.new_empty(0, dtype=torch.uint8)
    plain = scale is None and shift is None and residual is None
    output, saved = _ops.depthwise_forward(
        image, filters, bias, None, *numbers, activation if plain else None, save_for_backward
    )
    output = output.view(*output.shape[:2], *output.shape[2:][-(input.dim() - 2) :])
    if plain:
        return output, saved.view(output.shape) if saved.numel() else saved, no_argmax
    dims = input.dim() - 2
    result = output.to(_activations.opmath_dtype(input.dtype))
    if scale is not None:
        result = result * per_channel(scale, dims)
    if shift is not None:
        result = result + per_channel(shift, dims)
    if residual is not None:
        result = result + residual
    saves = save_for_backward and _activations.needs_preactivation(activation)
    output = _activations.apply(activation, result).to(input.dtype)
    return output, result.to(input.dtype) if saves else absent, no_argmax


def causal_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    options: ConvOptions,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor]:
    """``activation(conv + bias)`` of (N, C, L) after the state (N, C, padding), and what the
    backward wants of an activation other than relu."""
    output, saved = _ops.depthwise_forward(
        *_two_axes(input, weight), bias, state.unsqueeze(2), *_numbers(options),
        options.activation, save_for_backward,
    )  # fmt: skip
    return output.squeeze(2), saved.view(output.squeeze(2).shape) if saved.numel() else saved


def causal_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    state: Tensor,
    kept: Tensor,
    options: ConvOptions,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of input, weight, bias and state."""
    image, filters = _two_axes(input, weight)
    grad_input, grad_state, grad_weight, grad_bias = _ops.depthwise_backward(
        grad_output.unsqueeze(2), image, filters, state.unsqueeze(2),
        None if options.activation is None else kept.unsqueeze(2), *_numbers(options),
        options.activation, need_input, need_state, need_weight, need_bias,
    )  # fmt: skip
    return (
        grad_input.squeeze(2) if need_input else grad_input,
        grad_weight.view(weight.shape) if need_weight else grad_weight,
        grad_bias,
        grad_state.squeeze(2) if need_state else grad_state,
    )


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
    """The op ``conv_backward``."""
    image, filters = _two_axes(input, weight)
    numbers = _numbers(ConvOptions(stride, padding, dilation))
    dims, dtype = input.dim() - 2, input.dtype
    opmath = _activations.opmath_dtype(dtype)
    pixels = (0, *range(2, dims + 2))
    grad, kept = grad_output, output if activation == "relu" else saved
    grad_scale, grad_shift = (input.new_empty(0, dtype=opmath) for _ in range(2))
    grad_residual = input.new_empty(0)
    if scale is not None or need_shift or need_residual:
        # These need the pre-activation's gradient as a tensor; else the kernels compute it.
        exact_grad = _activations.apply_backward(activation, grad.to(opmath), saved, output)
        activation = None
        if need_shift:
            grad_shift = exact_grad.sum(pixels)
        if need_residual:
            grad_residual = exact_grad.to(dtype)
        if need_scale:
            convolved, _ = _ops.depthwise_forward(
                image, filters, bias, None, *numbers, None, False
            )
            grad_scale = (exact_grad * convolved.view(grad.shape)).sum(pixels)
        if scale is not None:
            exact_grad = exact_grad * per_channel(scale, dims)
        grad = exact_grad.to(dtype)
    shape = grad.shape if dims == 2 else (*grad.shape[:2], 1, grad.shape[2])
    grad_input, _, grad_weight, grad_bias = _ops.depthwise_backward(
        grad.contiguous().view(shape), image, filters, None,
        None if activation is None else kept.contiguous().view(shape), *numbers, activation,
        need_input, False, need_weight, need_bias,
    )  # fmt: skip
    if need_input:
        grad_input = grad_input.view(input.shape)
    grad_weight = grad_weight.view(weight.shape) if need_weight else input.new_empty(0)
    return grad_input, grad_weight, grad_bias, grad_scale, grad_shift, grad_residual
