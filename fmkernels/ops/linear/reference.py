"""The linear ops in plain PyTorch: any device, any floating dtype, explicit backward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fmkernels.ops import _activations


def linear_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed_weight: Tensor | None,
    activation: str | None,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor]:
    """See schema.py. ``packed_weight`` is not read."""
    product = F.linear(input, weight, bias)
    absent = input.new_empty((0,))
    if activation is None and residual is None:
        return product, absent
    # The epilogue runs in the accumulation dtype, so that only the final result is rounded again.
    pre = product.to(_activations.opmath_dtype(input.dtype))
    if residual is not None:
        pre = pre + residual
    output = _activations.apply(activation, pre).to(input.dtype)
    save = save_for_backward and _activations.needs_preactivation(activation)
    return output, pre.to(input.dtype) if save else absent


def linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    saved: Tensor,
    activation: str | None,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See schema.py."""
    dtype = input.dtype
    grad = grad_output.to(_activations.opmath_dtype(dtype))
    grad = _activations.apply_backward(activation, grad, saved, output)
    grad_pre = grad.to(dtype)
    absent = input.new_empty((0,))
    rows = grad_pre.reshape(-1, weight.shape[0])
    grad_weight = absent
    if need_weight:
        inputs = input.reshape(-1, weight.shape[1])
        # With the strides of the weight.
        transposed = not weight.is_contiguous()
        grad_weight = inputs.t().matmul(rows).t() if transposed else rows.t().matmul(inputs)
    return (
        grad_pre.matmul(weight) if need_input else absent,
        grad_weight,
        grad.reshape(rows.shape).sum(0).to(dtype) if need_bias else absent,
        grad_pre if need_residual else absent,
    )
