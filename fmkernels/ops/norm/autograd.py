"""Differentiable normalisation: chooses the backend, records the graph if needed.

Autocast leaves the operands alone, as it does for torch's layer_norm on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import select
from fmkernels.ops import _dropout
from fmkernels.ops._activations import opmath_dtype
from fmkernels.ops._autograd import distinct, needs_graph, once_differentiable
from fmkernels.ops.norm.backends import NORM


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, residual, weight, bias, rms, eps, dropout_p, seed, backend):
        output, total, mean, rstd = NORM[backend].forward(
            input, residual, weight, bias, rms, eps, dropout_p, seed, True, True
        )
        # Without a residual `total` is empty, and the input is what was normalised.
        normalised = input if residual is None else total
        ctx.save_for_backward(normalised, weight, mean, rstd, seed)
        ctx.set_materialize_grads(False)
        ctx.rms, ctx.dropout_p, ctx.backend = rms, dropout_p, backend
        return output if residual is None else (output, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_sum=None):
        if grad_output is None and grad_sum is None:
            return (None,) * 9
        normalised, weight, mean, rstd, seed = ctx.saved_tensors
        need_input, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        grad_output = (
            torch.zeros_like(normalised) if grad_output is None else grad_output.contiguous()
        )
        # Unless dropout acts between them, input and residual have the same gradient.
        shared = ctx.dropout_p == 0.0
        grads = NORM[ctx.backend].backward(
            grad_output,
            None if grad_sum is None else grad_sum.contiguous(),
            normalised,
            weight,
            mean,
            rstd,
            ctx.rms,
            ctx.dropout_p,
            seed,
            need_input or (shared and need_residual),
            need_residual and not shared,
            need_weight,
            need_bias,
        )
        grad_input, grad_residual, grad_weight, grad_bias = grads
        return (
            grad_input if need_input else None,
            (grad_input if shared else grad_residual) if need_residual else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            *(None,) * 5,
        )


def norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
    dropout_p: float,
    return_sum: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    """``normalise(dropout(input) + residual) * weight + bias`` over the last dimension.

    Checked arguments of one dtype, weight and bias one-dimensional; see schema.py.

    Returns:
        the output, and the sum where there is a residual and ``return_sum``.
    """
    name, _ = select(op_name(rms), NORM, backend, input)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return run(name, input, residual, weight, bias, rms, eps, dropout_p, return_sum)


def run(
    backend: str,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
    dropout_p: float,
    return_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    """:func:`norm` by that backend, which has been found to serve it."""
    input = input.contiguous()
    residual = None if residual is None else residual.contiguous()
    seed = _dropout.new_seed(input.device) if dropout_p > 0.0 else None
    if needs_graph(input, residual, weight, bias):
        operands = (input, distinct(residual, input), weight, bias)
        result = _Norm.apply(*operands, rms, eps, dropout_p, seed, backend)
        return (result, None) if residual is None else result
    return NORM[backend].forward(
        input, residual, weight, bias, rms, eps, dropout_p, seed, False, return_sum
    )[:2]


def op_name(rms: bool) -> str:
    """The name of the normalisation in messages and decisions."""
    return "rms_norm" if rms else "layer_norm"


def default_eps(dtype: torch.dtype) -> float:
    """The machine epsilon of the dtype that statistics of ``dtype`` have, as torch's rms_norm."""
    return torch.finfo(opmath_dtype(dtype)).eps
