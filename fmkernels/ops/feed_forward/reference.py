"""The feed-forward ops in plain PyTorch: any device, any floating dtype, explicit backward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fmkernels.ops import _activations, _dropout


def feed_forward_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    packed_weight1: Tensor | None,
    packed_weight2: Tensor | None,
    activation: str | None,
    dropout_p: float,
    seed: Tensor | None,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See schema.py. The packed weights are not read."""
    dtype = _activations.opmath_dtype(input.dtype)
    gated = gate_weight is not None
    preactivation = F.linear(input, weight1, bias1)
    gate_preactivation = F.linear(input, gate_weight, gate_bias) if gated else None
    # The elementwise part runs in the accumulation dtype, so that hidden is rounded once.
    if gated:
        hidden = _activations.apply(activation, gate_preactivation.to(dtype)) * preactivation
    else:
        hidden = _activations.apply(activation, preactivation.to(dtype))
    if dropout_p > 0.0:
        hidden = hidden * _dropout_factors(hidden, dropout_p, seed)
    hidden = hidden.to(input.dtype)
    output = F.linear(hidden, weight2, bias2)
    if residual is not None:
        output = (output.to(dtype) + residual).to(input.dtype)
    absent = input.new_empty((0,))
    keep = save_for_backward and (gated or _activations.needs_preactivation(activation))
    return (
        output,
        hidden if save_for_backward else absent,
        preactivation if keep else absent,
        gate_preactivation if save_for_backward and gated else absent,
    )


def feed_forward_backward(
    grad_output: Tensor,
    input: Tensor,
    weight1: Tensor,
    gate_weight: Tensor | None,
    weight2: Tensor,
    hidden: Tensor,
    preactivation: Tensor,
    gate_preactivation: Tensor,
    activation: str | None,
    dropout_p: float,
    seed: Tensor | None,
    need_input: bool,
    need_weight1: bool,
    need_bias1: bool,
    need_gate_weight: bool,
    need_gate_bias: bool,
    need_weight2: bool,
    need_bias2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See schema.py."""
    dtype = _activations.opmath_dtype(input.dtype)
    gated = gate_weight is not None
    absent = input.new_empty((0,))
    grad_input = grad_gate_weight = grad_gate_bias = absent
    rows = input.reshape(-1, weight1.shape[1])

    grad = grad_output.matmul(weight2).to(dtype)
    if dropout_p > 0.0:
        grad = grad * _dropout_factors(grad, dropout_p, seed)
    if gated:
        gate = gate_preactivation.to(dtype)
        applied = _activations.apply(activation, gate)
        grad_gate = _activations.apply_backward(activation, grad * preactivation, gate, applied)
        grad_gate = grad_gate.to(input.dtype)
        grad = grad * applied
    else:
        grad = _activations.apply_backward(activation, grad, preactivation, hidden)
    grad = grad.to(input.dtype)

    if need_input:
        grad_input = grad.matmul(weight1)
        if gated:
            grad_input = grad_input.to(dtype) + grad_gate.matmul(gate_weight)
            grad_input = grad_input.to(input.dtype)
    if need_gate_weight:
        grad_gate_weight = _flat(grad_gate).t().matmul(rows)
    if need_gate_bias:
        grad_gate_bias = _flat(grad_gate).to(dtype).sum(0).to(input.dtype)
    grad_rows = _flat(grad_output)
    return (
        grad_input,
        _flat(grad).t().matmul(rows) if need_weight1 else absent,
        _flat(grad).to(dtype).sum(0).to(input.dtype) if need_bias1 else absent,
        grad_gate_weight,
        grad_gate_bias,
        grad_rows.t().matmul(_flat(hidden)) if need_weight2 else absent,
        grad_rows.to(dtype).sum(0).to(input.dtype) if need_bias2 else absent,
    )


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _dropout_factors(like: Tensor, p: float, seed: Tensor) -> Tensor:
    width = like.shape[-1]
    return _dropout.factors(seed, like.numel() // width, width, p, like.dtype).reshape(like.shape)
