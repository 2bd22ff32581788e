"""Schemas and fake kernels of the feed-forward ops.

feed_forward_forward: ``output = hidden @ weight2.T + bias2 + residual``, where

* plain: ``hidden = dropout(activation(input @ weight1.T + bias1))``;
* gated, with a ``gate_weight`` (Shazeer 2020, "GLU variants improve transformer"):
  ``hidden = dropout(activation(input @ gate_weight.T + gate_bias) * up)``,
  ``up = input @ weight1.T + bias1``.

``input`` is (..., K) contiguous, ``weight1`` and ``gate_weight`` (H, K), ``weight2`` (N, H), the
biases (H), (H), (N), ``residual`` and ``output`` (..., N), all contiguous and of one dtype.
``seed``, int64 of shape (1,), is given if ``dropout_p`` is not 0 (fmkernels/ops/_dropout.py); the
mask's matrix is hidden with its leading dimensions flattened. ``packed_weight1`` comes from
``feed_forward_pack_weight(weight1, gate_weight)`` and ``packed_weight2`` from
``feed_forward_pack_weight(weight2, None)``.

For the backward, only if ``save_for_backward``, else empty: ``hidden`` (..., H), the
``preactivation`` ``input @ weight1.T + bias1`` (empty where plain and the activation is None or
relu, which ``hidden`` tells), and the ``gate_preactivation`` of the gate (empty where plain).

feed_forward_inference: that output alone, without dropout, which small calls get in less time.

feed_forward_backward returns an empty tensor of shape (0,) for every gradient that is not asked
for. The gradient of the residual is ``grad_output``, and no result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels.ops._activations import needs_preactivation

_library = torch.library.Library("fmkernels", "FRAGMENT")
_library.define(
    "feed_forward_forward(Tensor input, Tensor weight1, Tensor? bias1, Tensor? gate_weight, "
    "Tensor? gate_bias, Tensor weight2, Tensor? bias2, Tensor? residual, Tensor? packed_weight1, "
    "Tensor? packed_weight2, str? activation, float dropout_p, Tensor? seed, "
    "bool save_for_backward) "
    "-> (Tensor output, Tensor hidden, Tensor preactivation, Tensor gate_preactivation)"
)
_library.define(
    "feed_forward_inference(Tensor input, Tensor weight1, Tensor? bias1, Tensor? gate_weight, "
    "Tensor? gate_bias, Tensor weight2, Tensor? bias2, Tensor? residual, Tensor? packed_weight1, "
    "Tensor? packed_weight2, str? activation) -> Tensor"
)
_library.define(
    "feed_forward_backward(Tensor grad_output, Tensor input, Tensor weight1, Tensor? gate_weight, "
    "Tensor weight2, Tensor hidden, Tensor preactivation, Tensor gate_preactivation, "
    "str? activation, float dropout_p, Tensor? seed, bool need_input, bool need_weight1, "
    "bool need_bias1, bool need_gate_weight, bool need_gate_bias, bool need_weight2, "
    "bool need_bias2) "
    "-> (Tensor grad_input, Tensor grad_weight1, Tensor grad_bias1, Tensor grad_gate_weight, "
    "Tensor grad_gate_bias, Tensor grad_weight2, Tensor grad_bias2)"
)
_library.define("feed_forward_pack_weight(Tensor weight, Tensor? gate_weight) -> Tensor")


@torch.library.register_fake("fmkernels::feed_forward_forward", lib=_library)
def _feed_forward_forward_fake(
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
    leading, gated = input.shape[:-1], gate_weight is not None
    hidden = (*leading, weight1.shape[0])
    keep = save_for_backward and (gated or needs_preactivation(activation))
    return (
        input.new_empty((*leading, weight2.shape[0])),
        input.new_empty(hidden if save_for_backward else (0,)),
        input.new_empty(hidden if keep else (0,)),
        input.new_empty(hidden if save_for_backward and gated else (0,)),
    )


@torch.library.register_fake("fmkernels::feed_forward_inference", lib=_library)
def _feed_forward_inference_fake(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    weight2: Tensor,
    *rest: object,
) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight2.shape[0]))


@torch.library.register_fake("fmkernels::feed_forward_backward", lib=_library)
def _feed_forward_backward_fake(
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
    width = (weight1.shape[0],)
    return (
        input.new_empty(input.shape if need_input else (0,)),
        input.new_empty(weight1.shape if need_weight1 else (0,)),
        input.new_empty(width if need_bias1 else (0,)),
        input.new_empty(weight1.shape if need_gate_weight else (0,)),
        input.new_empty(width if need_gate_bias else (0,)),
        input.new_empty(weight2.shape if need_weight2 else (0,)),
        input.new_empty((weight2.shape[0],) if need_bias2 else (0,)),
    )


@torch.library.register_fake("fmkernels::feed_forward_pack_weight", lib=_library)
def _feed_forward_pack_weight_fake(weight: Tensor, gate_weight: Tensor | None) -> Tensor:
    # The packed size depends on the ISA of the machine, which only the kernel knows.
    size = torch.library.get_ctx().new_dynamic_size(min=64)
    return weight.new_empty((size,), dtype=torch.uint8)
