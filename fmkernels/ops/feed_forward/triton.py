"""The feed-forward ops as Triton kernels, with the signatures of reference.py."""

from __future__ import annotations

from torch import Tensor

from fmkernels.ops import _activations
from fmkernels.ops._triton.gemm import (
    activation_backward,
    gemm_backward,
    gemm_forward,
    gemm_gated_forward,
)


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
    """See schema.py. The packed weights are not read. Two launches, gated or not."""
    leading, gated = input.shape[:-1], gate_weight is not None
    hidden = input.new_empty((*leading, weight1.shape[0]))
    keep = save_for_backward and (gated or _activations.needs_preactivation(activation))
    preactivation = hidden.new_empty(hidden.shape) if keep else None
    gate = hidden.new_empty(hidden.shape) if save_for_backward and gated else None
    if gated:
        gemm_gated_forward(
            input, gate_weight, gate_bias, weight1, bias1, activation, hidden,
            (gate, preactivation), dropout_p, seed,
        )  # fmt: skip
    else:
        gemm_forward(
            input, weight1, bias1, None, activation, hidden, preactivation, dropout_p, seed
        )
    output = input.new_empty((*leading, weight2.shape[0]))
    gemm_forward(hidden, weight2, bias2, residual, None, output, None)
    absent = input.new_empty
    return (
        output,
        hidden if save_for_backward else absent(0),
        absent(0) if preactivation is None else preactivation,
        absent(0) if gate is None else gate,
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
    """See schema.py. Five launches, with a gate seven: each product may add up its parts."""
    gated = gate_weight is not None
    first = (need_input, need_weight1, need_bias1, need_gate_weight, need_gate_bias)
    grad_hidden, grad_weight2, grad_bias2 = gemm_backward(
        grad_output, hidden, weight2, any(first), need_weight2, need_bias2
    )
    grads: dict[str, Tensor | None] = {}
    if any(first):
        operand = hidden if activation == "relu" else preactivation
        grad, grad_up = activation_backward(
            grad_hidden,
            gate_preactivation if gated else None if activation is None else operand,
            activation,
            preactivation if gated else None,
            dropout_p,
            seed,
        )
        grad_input = None
        if gated:
            grad_input, grads["gate_weight"], grads["gate_bias"] = gemm_backward(
                grad, input, gate_weight, need_input, need_gate_weight, need_gate_bias
            )
            grad = grad_up
        grads["input"], grads["weight1"], grads["bias1"] = gemm_backward(
            grad, input, weight1, need_input, need_weight1, need_bias1, grad_input
        )
    grads["weight2"], grads["bias2"] = grad_weight2, grad_bias2
    absent = input.new_empty
    names = ("input", "weight1", "bias1", "gate_weight", "gate_bias", "weight2", "bias2")
    return tuple(absent(0) if grads.get(name) is None else grads[name] for name in names)
