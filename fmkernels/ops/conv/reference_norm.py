"""The norm ops in plain PyTorch: any device and dtype, explicit backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels.ops import _activations
from fmkernels.ops.conv.geometry import in_layout, is_channels_last, per_channel, window_parts
from fmkernels.ops.conv.reference_pool import (
    avg_pool_backward,
    avg_pool_forward,
    max_pool_backward,
    max_pool_forward,
)


def channel_norm_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    pool: str | None,
    window: Sequence[int],
    save_for_backward: bool,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See schema_norm.py."""
    channels_last = is_channels_last(input)
    x = input.to(_activations.opmath_dtype(input.dtype))
    if mean is None or variance is None:
        grouped, axes = _grouped(x, groups)
        variance, mean = torch.var_mean(grouped, axes, correction=0)
    else:
        mean, variance = mean.clone(), variance.clone()
    normalised = _normalised(x, mean, variance, eps, groups)
    output = _activations.apply(activation, _affine(normalised, weight, bias, residual))
    output = in_layout(output.to(input.dtype), channels_last)
    argmax = input.new_empty((0,), dtype=torch.uint8)
    if pool == "max":
        dims = input.dim() - 2
        output, positions = max_pool_forward(output, *window_parts(window), (1,) * dims, False)
        argmax = positions if save_for_backward else argmax
    elif pool == "avg":
        output = avg_pool_forward(output, *window_parts(window), False, True, None)
    return output, mean, variance, argmax


def channel_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    argmax: Tensor,
    groups: int,
    eps: float,
    activation: str | None,
    pool: str | None,
    window: Sequence[int],
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See schema_norm.py.

    With g the gradient of the normalised values n, and averages over what a mean is taken over:
    ``grad_input = (g - average(g) - n * average(g * n)) / sqrt(variance + eps)``.
    """
    channels_last, dims = is_channels_last(input), input.dim() - 2
    opmath = _activations.opmath_dtype(input.dtype)
    x, grad = input.to(opmath), grad_output.to(opmath)
    if pool == "max":
        parts = window_parts(window)
        grad = max_pool_backward(grad, argmax, input.shape, *parts, (1,) * dims)
    elif pool == "avg":
        grad = avg_pool_backward(grad, input.shape, *window_parts(window), True, None)
    normalised = _normalised(x, mean, variance, eps, groups)
    pre = _affine(normalised, weight, bias, residual)
    grad = _activations.apply_backward(activation, grad, pre, pre)
    absent, absent_vector = input.new_empty((0,)), x.new_empty((0,))
    pixels = (0, *range(2, dims + 2))
    grad_weight = (grad * normalised).sum(pixels) if need_weight else absent_vector
    grad_bias = grad.sum(pixels) if need_bias else absent_vector
    grad_residual = in_layout(grad.to(input.dtype), channels_last) if need_residual else absent
    grad_input = absent
    if need_input:
        if weight is not None:
            grad = grad * per_channel(weight, dims)
        g, axes = _grouped(grad, groups)
        n, _ = _grouped(normalised, groups)
        centred = g - g.mean(axes, keepdim=True) - n * (g * n).mean(axes, keepdim=True)
        scaled = centred.reshape(x.shape) * _per_group(torch.rsqrt(variance + eps), x, groups)
        grad_input = in_layout(scaled.to(input.dtype), channels_last)
    return grad_input, grad_weight, grad_bias, grad_residual


def _grouped(x: Tensor, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """A view in which the statistics run over whole axes, and those axes."""
    if groups == 0:
        return x, (0, *range(2, x.dim()))
    return x.reshape(x.shape[0], groups, -1), (2,)


def _per_group(statistic: Tensor, x: Tensor, groups: int) -> Tensor:
    """A statistic, to be broadcast over the image."""
    if groups:
        statistic = statistic.repeat_interleave(x.shape[1] // groups, 1)
    return per_channel(statistic, x.dim() - 2)


def _normalised(x: Tensor, mean: Tensor, variance: Tensor, eps: float, groups: int) -> Tensor:
    return (x - _per_group(mean, x, groups)) * _per_group(torch.rsqrt(variance + eps), x, groups)


def _affine(
    normalised: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    dims, pre = normalised.dim() - 2, normalised
    if weight is not None:
        pre = pre * per_channel(weight, dims)
    if bias is not None:
        pre = pre + per_channel(bias, dims)
    return pre if residual is None else pre + residual
