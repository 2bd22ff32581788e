"""Differentiable feed-forward: chooses the backend, applies autocast, records the graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels._dispatch import select
from fmkernels.ops import _dropout
from fmkernels.ops._autograd import cast_for_autocast, distinct, needs_graph, once_differentiable
from fmkernels.ops.feed_forward.backends import FEED_FORWARD


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        input,
        weight1,
        bias1,
        gate_weight,
        gate_bias,
        weight2,
        bias2,
        residual,
        packed_weight1,
        packed_weight2,
        activation,
        dropout_p,
        seed,
        backend,
    ):
        output, hidden, preactivation, gate_preactivation = FEED_FORWARD[backend].forward(
            input,
            weight1,
            bias1,
            gate_weight,
            gate_bias,
            weight2,
            bias2,
            residual,
            packed_weight1,
            packed_weight2,
            activation,
            dropout_p,
            seed,
            True,
        )
        ctx.save_for_backward(
            input, weight1, gate_weight, weight2, hidden, preactivation, gate_preactivation, seed
        )
        ctx.set_materialize_grads(False)
        ctx.options = (activation, dropout_p)
        ctx.backend = backend
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * 14
        *tensors, seed = ctx.saved_tensors
        needed, need_residual = ctx.needs_input_grad[:7], ctx.needs_input_grad[7]
        grad_output = grad_output.contiguous()
        grads = (None,) * 7
        if any(needed):
            grads = FEED_FORWARD[ctx.backend].backward(
                grad_output, *tensors, *ctx.options, seed, *needed
            )
        return (
            *(grad if need else None for grad, need in zip(grads, needed, strict=True)),
            grad_output if need_residual else None,
            *(None,) * 6,
        )


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    packed_weights: tuple[Tensor | None, Tensor | None],
    activation: str | None,
    dropout_p: float,
    backend: str | None,
) -> Tensor:
    """The block on checked arguments; see schema.py.

    Args:
        packed_weights: what :func:`pack_feed_forward_weight` made of the weights, or Nones;
            ignored where autocast casts the weights.
        dropout_p: the caller passes 0 in evaluation.
        backend: as in :func:`fmkernels._dispatch.select`.
    """
    raw_weight = weight1
    tensors = cast_for_autocast(
        input, weight1, bias1, gate_weight, gate_bias, weight2, bias2, residual
    )
    name, _ = select("feed_forward", FEED_FORWARD, backend, tensors[0])
    if tensors[1] is not raw_weight:
        packed_weights = (None, None)
    return run(name, tensors, packed_weights, activation, dropout_p)


def run(
    backend: str,
    tensors: Sequence[Tensor | None],
    packed_weights: tuple[Tensor | None, Tensor | None],
    activation: str | None,
    dropout_p: float,
) -> Tensor:
    """:func:`feed_forward` by that backend, which has been found to serve it.

    Args:
        tensors: from ``input`` to ``residual``.
    """
    tensors = [None if t is None else t.contiguous() for t in tensors]
    tensors[-1] = distinct(tensors[-1], tensors[0])
    seed = _dropout.new_seed(tensors[0].device) if dropout_p > 0.0 else None
    arguments = (*tensors, *packed_weights, activation, dropout_p, seed)
    if needs_graph(*tensors):
        return _FeedForward.apply(*arguments, backend)
    return FEED_FORWARD[backend].forward(*arguments, False)[0]


def pack_feed_forward_weight(
    weight: Tensor, gate_weight: Tensor | None, backend: str | None
) -> Tensor | None:
    """``weight``, and side by side with it ``gate_weight``, as the chosen backend wants them.

    None if that backend packs nothing.
    """
    _, implementation = select("feed_forward", FEED_FORWARD, backend, weight)
    if implementation.pack is None:
        return None
    with torch.no_grad():
        gate_weight = None if gate_weight is None else gate_weight.contiguous()
        return implementation.pack(weight.contiguous(), gate_weight)
