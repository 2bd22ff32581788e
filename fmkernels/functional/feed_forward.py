"""The feed-forward block of a Transformer, plain and gated."""

from __future__ import annotations

from torch import Tensor

from fmkernels import _checks as check
from fmkernels.functional import _options
from fmkernels.ops import _activations
from fmkernels.ops.feed_forward import autograd, quick


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str | None = "relu",
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
    packed_weights: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """``dropout(hidden) @ weight2.T + bias2 + residual``, hidden being written once and read once.

    Plain (Vaswani et al. 2017, section 3.3): ``hidden = activation(input @ weight1.T + bias1)``.
    Gated (Shazeer 2020: SwiGLU with ``"silu"``, GeGLU with ``"gelu"``):
    ``hidden = activation(input @ gate_weight.T + gate_bias) * (input @ weight1.T + bias1)``.

    Args:
        input: (..., in_features), float32, bfloat16, float16 or float64; any strides.
        weight1, gate_weight: (hidden, in_features); bias1, gate_bias: (hidden) or None.
        weight2: (out_features, hidden); bias2: (out_features) or None.
        activation: None or a name as in :func:`fmkernels.functional.linear`.
        dropout_p: probability of zeroing an element of hidden. The mask comes from a seed that
            torch's generator gives, and is not stored. Applies whenever it is not 0: the caller
            knows whether this is training.
        residual: (..., out_features) or None.
        backend: an explicit backend never falls back; None takes that of ``use_backend``.
        packed_weights: what ``freeze`` packed from the weights; saves packing on each call.

    Returns:
        (..., out_features), contiguous. Sums are accumulated in float32 (float64 for float64).
        Differentiable once with respect to every tensor.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    if type(dropout_p) is float and dropout_p == 0.0:
        operands = (input, weight1, bias1, gate_weight, gate_bias, weight2, bias2, residual)
        output = quick.feed_forward(operands, packed_weights, activation, backend)
        if output is not None:
            return output
    check.tensor("input", input)
    tensors = {
        "weight1": weight1,
        "bias1": bias1,
        "weight2": weight2,
        "bias2": bias2,
        "gate_weight": gate_weight,
        "gate_bias": gate_bias,
        "residual": residual,
    }
    for name, operand in tensors.items():
        if operand is not None or name in ("weight1", "weight2"):
            check.tensor(name, operand)
            check.same_kind(name, operand, "input", input)
    for name in ("weight1", "weight2"):
        check.rank(name, tensors[name], 2)
        check.not_empty(name, tensors[name])
    hidden, in_features = weight1.shape
    out_features = weight2.shape[0]
    if input.dim() == 0 or input.shape[-1] != in_features:
        raise ValueError(
            f"input must have in_features = {in_features} (the second dimension of weight1) as "
            f"its last dimension, got {check.describe(input)}"
        )
    check.shape("weight2", weight2, (out_features, hidden), "out_features, hidden")
    if gate_weight is not None:
        check.shape("gate_weight", gate_weight, weight1.shape, "the shape of weight1")
    elif gate_bias is not None:
        raise ValueError("gate_bias must be None without a gate_weight")
    if bias1 is not None:
        check.shape("bias1", bias1, (hidden,), "hidden")
    if gate_bias is not None:
        check.shape("gate_bias", gate_bias, (hidden,), "hidden")
    if bias2 is not None:
        check.shape("bias2", bias2, (out_features,), "out_features")
    if residual is not None:
        expected = (*input.shape[:-1], out_features)
        check.shape("residual", residual, expected, "the shape of the output")
    check.choice("activation", activation, _activations.CHOICES)
    dropout_p = _options.probability("dropout_p", dropout_p)
    for packed, weight in zip(packed_weights, (weight1, weight2), strict=True):
        if packed is not None:
            check.packed_weight("packed_weights", packed, weight)
    return autograd.feed_forward(
        input,
        weight1,
        bias1,
        gate_weight,
        gate_bias,
        weight2,
        bias2,
        residual,
        packed_weights,
        activation,
        dropout_p,
        backend,
    )
