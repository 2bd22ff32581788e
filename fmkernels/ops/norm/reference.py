"""The normalisation ops in plain PyTorch: any device, any floating dtype, explicit backward."""

from __future__ import annotations

from torch import Tensor

from fmkernels.ops import _dropout
from fmkernels.ops._activations import opmath_dtype


def norm_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    save_for_backward: bool,
    return_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See schema.py."""
    dtype = opmath_dtype(input.dtype)
    total = input
    if residual is not None:
        term = input.to(dtype)
        if dropout_p > 0:
            term = term * _dropout_factors(input, dropout_p, seed)
        total = (term + residual).to(input.dtype)
    x = total.to(dtype)
    mean = None if rms else x.mean(-1)
    if mean is not None:
        x = x - mean.unsqueeze(-1)
    rstd = (x.square().mean(-1) + eps).rsqrt()
    y = x * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    absent, keep_sum = input.new_empty((0,)), save_for_backward or return_sum
    return (
        y.to(input.dtype),
        total if residual is not None and keep_sum else absent,
        mean if save_for_backward and mean is not None else absent.to(dtype),
        rstd if save_for_backward else absent.to(dtype),
    )


def norm_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
    dropout_p: float,
    seed: Tensor | None,
    need_input: bool,
    need_residual: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See schema.py."""
    dtype = opmath_dtype(sum.dtype)
    grad, x, rstd = grad_output.to(dtype), sum.to(dtype), rstd.unsqueeze(-1)
    normed = (x if rms else x - mean.unsqueeze(-1)) * rstd
    absent = sum.new_empty((0,))
    grad_input = grad_residual = grad_weight = grad_bias = absent
    if need_weight:
        grad_weight = (grad * normed).reshape(-1, sum.shape[-1]).sum(0).to(sum.dtype)
    if need_bias:
        grad_bias = grad.reshape(-1, sum.shape[-1]).sum(0).to(sum.dtype)
    if need_input or need_residual:
        scaled = grad if weight is None else grad * weight
        grad_s = scaled - normed * (scaled * normed).mean(-1, keepdim=True)
        if not rms:
            grad_s = grad_s - scaled.mean(-1, keepdim=True)
        grad_s = grad_s * rstd
        if grad_sum is not None:
            grad_s = grad_s + grad_sum
        if need_residual:
            grad_residual = grad_s.to(sum.dtype)
        if need_input:
            if dropout_p > 0:
                grad_s = grad_s * _dropout_factors(sum, dropout_p, seed)
            grad_input = grad_s.to(sum.dtype, copy=True)
    return grad_input, grad_residual, grad_weight, grad_bias


def _dropout_factors(like: Tensor, p: float, seed: Tensor) -> Tensor:
    features = like.shape[-1]
    rows = like.numel() // max(features, 1)
    dtype = opmath_dtype(like.dtype)
    return _dropout.factors(seed, rows, features, p, dtype).reshape(like.shape)
