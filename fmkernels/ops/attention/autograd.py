"""Differentiable attention: chooses the backend, applies autocast, records the graph if needed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmkernels._dispatch import select
from fmkernels.ops._autocast import autocast_off
from fmkernels.ops._autograd import cast_for_autocast, needs_graph
from fmkernels.ops.attention import reference
from fmkernels.ops.attention.backends import SDPA, needs_weights_in_memory


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, attn_mask, is_causal, scale, backend):
        output, lse = SDPA[backend].forward(query, key, value, attn_mask, is_causal, scale)
        ctx.save_for_backward(query, key, value, output, lse, attn_mask)
        ctx.set_materialize_grads(False)
        ctx.is_causal = is_causal
        ctx.scale = scale
        ctx.backend = backend
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_lse):
        if grad_output is None and grad_lse is None:
            return (None,) * 7
        query, key, value, output, lse, attn_mask = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        grad_output = torch.zeros_like(output) if grad_output is None else unit_stride(grad_output)
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        with autocast_off(query.device.type):
            grads = SDPA[ctx.backend].backward(
                grad_output,
                grad_lse,
                query,
                key,
                value,
                output,
                lse,
                attn_mask,
                ctx.is_causal,
                ctx.scale,
                *needed,
            )
        return (
            *(grad if need else None for grad, need in zip(grads, needed, strict=True)),
            *(None,) * 4,
        )


def unit_stride(tensor: Tensor) -> Tensor:
    """``tensor``, copied only if its last dimension is not adjacent in memory."""
    if tensor.stride(-1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Attention on checked, four-dimensional arguments; shapes as in schema.py, any strides.

    Args:
        dropout_p: probability of zeroing a weight; the caller passes 0 in evaluation.
        backend: as in :func:`fmkernels._dispatch.select`.

    Returns:
        output ``(B, Hq, Sq, Dv)`` and lse ``(B, Hq, Sq)``.
    """
    query, key, value, attn_mask = cast_for_autocast(query, key, value, attn_mask)
    name, implementation = select(
        "scaled_dot_product_attention", SDPA, backend, query, attn_mask, dropout_p
    )
    with autocast_off(query.device.type):
        if needs_weights_in_memory(attn_mask, dropout_p) is not None:
            output, _, lse = reference.attention_with_weights(
                query, key, value, attn_mask, is_causal, scale, dropout_p
            )
            return output, lse
        query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
        if needs_graph(query, key, value):
            return _Attention.apply(query, key, value, attn_mask, is_causal, scale, name)
        return implementation.forward(query, key, value, attn_mask, is_causal, scale)


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`attention`, returning output and weights ``(B, Hq, Sq, Sk)``: reference only."""
    query, key, value, attn_mask = cast_for_autocast(query, key, value, attn_mask)
    only_reference = {"reference": SDPA["reference"]}
    select("attention_with_weights", only_reference, backend, query, attn_mask, dropout_p)
    with autocast_off(query.device.type):
        output, weights, _ = reference.attention_with_weights(
            query, key, value, attn_mask, is_causal, scale, dropout_p
        )
    return output, weights
