"""The linear ops as Triton kernels, with the signatures of reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels.ops import _activations
from fmkernels.ops._triton.gemm import activation_backward, gemm_backward, gemm_forward


def linear_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed_weight: Tensor | None,
    activation: str | None,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor]:
    """See schema.py. ``packed_weight`` is not read. One launch."""
    output = input.new_empty((*input.shape[:-1], weight.shape[0]))
    save = save_for_backward and _activations.needs_preactivation(activation)
    saved = torch.empty_like(output) if save else input.new_empty(0)
    gemm_forward(input, weight, bias, residual, activation, output, saved if save else None)
    return output, saved


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
    """See schema.py. At most three launches: activation, gradients, sum of the splits."""
    absent = input.new_empty
    grad_pre = grad_output
    if activation is not None:
        operand = output if activation == "relu" else saved
        grad_pre, _ = activation_backward(grad_output, operand, activation)
    elif need_residual:
        grad_pre = grad_output.clone()  # an op's result must not alias its argument
    grad_input, grad_weight, grad_bias = gemm_backward(
        grad_pre, input, weight, need_input, need_weight, need_bias
    )
    return (
        absent(0) if grad_input is None else grad_input,
        absent(0) if grad_weight is None else grad_weight,
        absent(0) if grad_bias is None else grad_bias,
        grad_pre if need_residual else absent(0),
    )
