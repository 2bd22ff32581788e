"""Differentiable norm with activation, residual and pool: backend, layout, graph."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import select
from fmkernels.ops._activations import opmath_dtype
from fmkernels.ops._autograd import needs_graph, once_differentiable
from fmkernels.ops.conv.autograd_pool import pool as pool_image
from fmkernels.ops.conv.backends import NORM, fuses_pool
from fmkernels.ops.conv.geometry import in_layout, is_channels_last, window_parts


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        input,
        weight,
        bias,
        residual,
        groups,
        eps,
        activation,
        pool,
        window,
        backend,
        known_mean,
        known_variance,
    ):
        options = (groups, eps, activation, pool, window)
        output, mean, variance, argmax = NORM[backend].forward(
            input, weight, bias, residual, *options, True, known_mean, known_variance
        )
        # Without an activation the derivative does not depend on the residual.
        kept_residual = None if activation is None else residual
        ctx.save_for_backward(input, weight, bias, kept_residual, mean, variance, argmax)
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.backend = backend
        return output, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, _mean, _variance):
        if grad_output is None:
            return (None,) * 12
        needs = ctx.needs_input_grad[:4]
        grad_output = in_layout(grad_output, is_channels_last(ctx.saved_tensors[0]))
        grads = NORM[ctx.backend].backward(grad_output, *ctx.saved_tensors, *ctx.options, *needs)
        grads = tuple(g if need else None for g, need in zip(grads, needs, strict=True))
        return grads + (None,) * 8


def norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    pool: str | None,
    window: tuple[int, ...],
    backend: str | None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``pool(activation(norm(input) * weight + bias + residual))`` on checked arguments.

    Args:
        input: (N, C, *spatial) of any strides.
        groups: 0 for the statistics of the whole batch, else those of each image's groups.
        mean, variance: these statistics of ``input``, both or neither, if they are known.

    Returns:
        ``(output, mean, biased variance)``; the statistics are (C) or (N, groups), without graph.
    """
    if pool is not None and not fuses_pool(window_parts(window)[0]):
        output, mean, variance = norm(
            input,
            weight,
            bias,
            residual,
            groups,
            eps,
            activation,
            None,
            (),
            backend,
            mean,
            variance,
        )
        return pool_image(output, pool, window, backend), mean, variance
    name, implementation = select("channel_norm", NORM, backend, input)
    channels_last, opmath = is_channels_last(input), opmath_dtype(input.dtype)
    input = in_layout(input, channels_last)
    weight = None if weight is None else weight.to(opmath).contiguous()
    bias = None if bias is None else bias.to(opmath).contiguous()
    if residual is not None:
        residual = in_layout(residual.to(input.dtype), channels_last)
    tensors = (input, weight, bias, residual)
    options = (groups, eps, activation, pool, window)
    if needs_graph(*tensors):
        return _Norm.apply(*tensors, *options, name, mean, variance)
    return implementation.forward(*tensors, *options, False, mean, variance)[:3]
