"""Schemas and fake kernels of the linear ops.

linear_forward: ``output = activation(input @ weight.T + bias + residual)``.
``input`` is (..., K) contiguous, ``weight`` (N, K), contiguous or the transpose of a contiguous
(K, N), ``bias`` (N), ``residual`` and ``output`` (..., N), all of one dtype. ``saved`` is what the
backward needs besides the output: the pre-activation where the activation is not relu, and only if
``save_for_backward``; otherwise an empty tensor.

linear_inference: that output alone, which small calls get in less time.

linear_backward returns an empty tensor of shape (0,) for every gradient that is not asked for;
that of the weight has the weight's strides.

linear_pack_weight rearranges ``weight`` for the kernels; the result is opaque.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels.ops._activations import needs_preactivation

_library = torch.library.Library("fmkernels", "FRAGMENT")
_library.define(
    "linear_forward(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, "
    "Tensor? packed_weight, str? activation, bool save_for_backward) "
    "-> (Tensor output, Tensor saved)"
)
_library.define(
    "linear_inference(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, "
    "Tensor? packed_weight, str? activation) -> Tensor"
)
_library.define(
    "linear_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor output, "
    "Tensor saved, str? activation, bool need_input, bool need_weight, bool need_bias, "
    "bool need_residual) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)"
)
_library.define("linear_pack_weight(Tensor weight) -> Tensor")


@torch.library.register_fake("fmkernels::linear_forward", lib=_library)
def _linear_forward_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed_weight: Tensor | None,
    activation: str | None,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor]:
    output = input.new_empty((*input.shape[:-1], weight.shape[0]))
    save = save_for_backward and needs_preactivation(activation)
    return output, input.new_empty(output.shape if save else (0,))


@torch.library.register_fake("fmkernels::linear_inference", lib=_library)
def _linear_inference_fake(input: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.library.register_fake("fmkernels::linear_backward", lib=_library)
def _linear_backward_fake(
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
    return (
        input.new_empty(input.shape if need_input else (0,)),
        torch.empty_like(weight) if need_weight else input.new_empty((0,)),
        input.new_empty((weight.shape[0],) if need_bias else (0,)),
        input.new_empty(grad_output.shape if need_residual else (0,)),
    )


@torch.library.register_fake("fmkernels::linear_pack_weight", lib=_library)
def _linear_pack_weight_fake(weight: Tensor) -> Tensor:
    # The packed size depends on the ISA of the machine, which only the kernel knows.
    size = torch.library.get_ctx().new_dynamic_size(min=64)
    return weight.new_empty((size,), dtype=torch.uint8)
