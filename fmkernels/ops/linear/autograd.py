"""Differentiable linear: chooses the backend, applies autocast, records the graph if needed."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import select
from fmkernels.ops._autograd import cast_for_autocast, distinct, needs_graph, once_differentiable
from fmkernels.ops.linear.backends import LINEAR, READ_TRANSPOSED_WEIGHTS


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, residual, packed_weight, activation, backend):
        output, saved = LINEAR[backend].forward(
            input, weight, bias, residual, packed_weight, activation, True
        )
        # Without an activation nothing but the operands is read again; keeping `output` alive
        # would cost memory. `saved` is empty then, and stands in for it.
        kept_output = output if activation == "relu" else saved  # only relu reads it
        ctx.save_for_backward(input, weight, kept_output, saved)
        ctx.set_materialize_grads(False)
        ctx.activation = activation
        ctx.backend = backend
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * 7
        input, weight, output, saved = ctx.saved_tensors
        need_input, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        grad_output = grad_output.contiguous()
        # Without an activation the residual's gradient is grad_output itself: no copy.
        alias_residual = need_residual and ctx.activation is None
        grads = LINEAR[ctx.backend].backward(
            grad_output,
            input,
            weight,
            output,
            saved,
            ctx.activation,
            need_input,
            need_weight,
            need_bias,
            need_residual and not alias_residual,
        )
        grad_input, grad_weight, grad_bias, grad_residual = grads
        return (
            grad_input if need_input else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            (grad_output if alias_residual else grad_residual) if need_residual else None,
            None,
            None,
            None,
        )


def as_read_by(backend: str, weight: Tensor) -> Tensor:
    """``weight`` as the backend takes it, copied only if it must be."""
    if weight.is_contiguous():
        return weight
    if backend in READ_TRANSPOSED_WEIGHTS and weight.t().is_contiguous():
        return weight
    return weight.contiguous()


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed_weight: Tensor | None,
    activation: str | None,
    backend: str | None,
) -> Tensor:
    """``activation(input @ weight.T + bias + residual)`` on checked arguments.

    Args:
        packed_weight: result of the pack op for ``weight``; ignored where autocast casts the
            weight.
        backend: as in :func:`fmkernels._dispatch.select`.
    """
    raw_weight = weight
    input, weight, bias, residual = cast_for_autocast(input, weight, bias, residual)
    if weight is not raw_weight:
        packed_weight = None
    name, _ = select("linear", LINEAR, backend, input, weight, activation)
    bias = None if bias is None else bias.contiguous()
    return run(name, input, weight, bias, residual, packed_weight, activation)


def run(
    backend: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed_weight: Tensor | None,
    activation: str | None,
) -> Tensor:
    """:func:`linear` by that backend, which has been found to serve it."""
    input, weight = input.contiguous(), as_read_by(backend, weight)
    residual = None if residual is None else distinct(residual.contiguous(), input)
    if needs_graph(input, weight, bias, residual):
        return _Linear.apply(input, weight, bias, residual, packed_weight, activation, backend)
    return LINEAR[backend].forward(
        input, weight, bias, residual, packed_weight, activation, False
    )[0]


def pack_linear_weight(weight: Tensor, backend: str | None) -> Tensor | None:
    """The weight as the chosen backend wants it, or None if that backend packs nothing."""
    name, implementation = select("linear", LINEAR, backend, weight, weight, None)
    if implementation.pack is None:
        return None
    with torch.no_grad():
        return implementation.pack(as_read_by(name, weight))
