"""Differentiable causal convolution that reads its state in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import check_backend_name, current_backend, record_decision
from fmkernels.ops._autograd import needs_graph, once_differentiable
from fmkernels.ops.conv.backends import CAUSAL
from fmkernels.ops.conv.geometry import ConvOptions


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, state, backend, *options):
        options = ConvOptions(*options)
        output, saved = CAUSAL[backend].forward(input, weight, bias, state, options, True)
        kept = output if options.activation == "relu" else saved
        ctx.save_for_backward(input, weight, state, kept)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.options = backend, options
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        nothing = (None,) * (1 + len(ctx.options))
        if grad_output is None:
            return (None,) * 4 + nothing
        needs = ctx.needs_input_grad[:4]
        grads = CAUSAL[ctx.backend].backward(
            grad_output.contiguous(), *ctx.saved_tensors, ctx.options, *needs
        )
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True)) + nothing


def causal_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    options: ConvOptions,
    backend: str | None,
) -> Tensor | None:
    """``activation(conv(input, weight) + bias)`` of (N, C, L), ``state`` in place of the padding.

    Returns:
        (N, O, L), or None where no backend reads a state in place: state and input are to be
        joined then.
    """
    requested = current_backend() if backend is None else check_backend_name(backend)
    for name, implementation in CAUSAL.items():
        if requested in ("auto", name) and implementation.supports(input, weight, options).ok:
            break
    else:
        return None
    if requested == "auto":
        record_decision("conv1d", name)
    weight, state = weight.contiguous(), state.contiguous()
    bias = None if bias is None else bias.contiguous()
    tensors = (input.contiguous(), weight, bias, state)
    if needs_graph(*tensors):
        return _Causal.apply(*tensors, name, *options)
    return implementation.forward(*tensors, options, False)[0]
