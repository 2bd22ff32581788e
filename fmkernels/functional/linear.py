"""Linear transformation with a fused epilogue."""

from __future__ import annotations

from torch import Tensor

from fmkernels import _checks
from fmkernels.ops import _activations
from fmkernels.ops.linear import autograd, quick


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
    packed_weight: Tensor | None = None,
) -> Tensor:
    """``activation(input @ weight.T + bias + residual)``.

    Args:
        input: (..., in_features), float32, bfloat16, float16 or float64; any strides.
        weight: (out_features, in_features), dtype and device of ``input``.
        bias: (out_features) or None.
        activation: None, ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"elu"``, ``"gelu"``,
            ``"gelu_tanh"``, ``"silu"``, ``"sigmoid"``, ``"tanh"``, ``"hardswish"``,
            ``"hardsigmoid"`` or ``"mish"``, each with torch's default parameters.
        residual: (..., out_features), added before the activation, or None.
        backend: an explicit backend never falls back; None takes that of ``use_backend``.
        packed_weight: what ``freeze`` packed from ``weight``; saves packing on each call.

    Returns:
        (..., out_features), contiguous. Sums are accumulated in float32 (float64 for float64).
        Differentiable once with respect to input, weight, bias and residual.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    output = quick.linear(input, weight, bias, residual, packed_weight, activation, backend)
    if output is not None:
        return output
    _checks.tensor("input", input)
    _checks.operand("weight", weight, "input", input)
    _checks.rank("weight", weight, 2)
    out_features, in_features = weight.shape
    if out_features == 0 or in_features == 0:
        raise ValueError(f"weight must not be empty, got {_checks.describe(weight)}")
    if input.dim() == 0 or input.shape[-1] != in_features:
        raise ValueError(
            f"input must have in_features = {in_features} (the second dimension of weight) as its "
            f"last dimension, got {_checks.describe(input)}"
        )
    if bias is not None:
        _checks.operand("bias", bias, "input", input)
        _checks.shape("bias", bias, (out_features,), "out_features")
    if residual is not None:
        _checks.operand("residual", residual, "input", input)
        _checks.shape(
            "residual", residual, (*input.shape[:-1], out_features), "the shape of the output"
        )
    _checks.choice("activation", activation, _activations.CHOICES)
    if packed_weight is not None:
        _checks.packed_weight("packed_weight", packed_weight, weight)
    return autograd.linear(input, weight, bias, residual, packed_weight, activation, backend)
