"""Scaled-dot-product attention in plain PyTorch: forward and a hand-written backward.

:func:`sdpa_forward` and :func:`sdpa_backward` have the signatures of the ops in schema.py and use
no autograd. :func:`attention_with_weights` is the same mathematics written so that autograd can
differentiate it; it serves what the ops do not: dropout on the weights, a mask that needs a
gradient, and the weights themselves. All sums are taken in float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels.ops._activations import opmath_dtype
from fmkernels.ops.attention.schema import empty_output


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """Give every query head its own copy of the key or value head that it shares."""
    shared = tensor.size(1)
    return tensor if shared == heads else tensor.repeat_interleave(heads // shared, dim=1)


def _sum_heads(grad: Tensor, shared: int) -> Tensor:
    """The gradient of :func:`_repeat_heads`."""
    heads = grad.size(1)
    return grad if heads == shared else grad.unflatten(1, (shared, heads // shared)).sum(dim=2)


def _scores(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """``scale * query key^T + mask`` with -inf wherever the query may not see the key."""
    scores = (query @ key.transpose(-2, -1)) * scale
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask.to(scores.dtype)
    if is_causal:
        length, keys = scores.shape[-2:]
        hidden = torch.ones(length, keys, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and its log-denominator; a row of -inf gives zeros, -inf."""
    if scores.size(-1) == 0:
        return scores, scores.new_full(scores.shape[:-1], float("-inf"))
    maximum = scores.detach().amax(dim=-1, keepdim=True)
    empty = maximum == float("-inf")
    # Subtracting -inf from -inf would be NaN; from a row that is empty subtract 0 instead.
    maximum = maximum.masked_fill(empty, 0.0)
    weights = (scores - maximum).exp()
    # An empty row sums to 0: divide it by 1, so that neither value nor gradient becomes NaN.
    denominator = weights.sum(dim=-1, keepdim=True).masked_fill(empty, 1.0)
    lse = (maximum + denominator.log()).masked_fill(empty, float("-inf")).squeeze(-1)
    return weights / denominator, lse


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention that autograd differentiates, with dropout and with the weights as a result.

    Shapes and dtypes as for ``sdpa_forward``; the mask may have any floating dtype.

    Returns:
        output ``(B, Hq, Sq, Dv)``, weights ``(B, Hq, Sq, Sk)`` after dropout in the query's dtype,
        lse ``(B, Hq, Sq)``.
    """
    dtype, heads = opmath_dtype(query.dtype), query.size(1)
    keys, values = _repeat_heads(key, heads).to(dtype), _repeat_heads(value, heads).to(dtype)
    weights, lse = _softmax(_scores(query.to(dtype), keys, attn_mask, is_causal, scale))
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, True)
    return (weights @ values).to(query.dtype), weights.to(query.dtype), lse


def sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    result, _, lse = attention_with_weights(query, key, value, attn_mask, is_causal, scale)
    output = empty_output(query, value)
    return output.copy_(result), lse


def sdpa_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    need_query: bool,
    need_key: bool,
    need_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (heads, shared) = opmath_dtype(query.dtype), (query.size(1), key.size(1))
    grad_output = grad_output.to(dtype)
    queries = query.to(dtype)
    keys, values = _repeat_heads(key, heads).to(dtype), _repeat_heads(value, heads).to(dtype)

    empty = lse == float("-inf")
    # Rows without a visible key: exp(-inf - inf) = 0 instead of exp(-inf + inf) = NaN.
    normaliser = lse.masked_fill(empty, float("inf")).unsqueeze(-1)
    weights = (_scores(queries, keys, attn_mask, is_causal, scale) - normaliser).exp()
    # d softmax: ds = p * (dp - sum_j p_j dp_j), and sum_j p_j dp_j = grad_output . output
    correction = (grad_output * output.to(dtype)).sum(dim=-1)
    if grad_lse is not None:
        correction = correction - grad_lse.to(dtype)
    correction = correction.masked_fill(empty, 0.0).unsqueeze(-1)
    grad_scores = weights * (grad_output @ values.transpose(-2, -1) - correction) * scale

    absent = query.new_empty
    grad_query = grad_key = grad_value = None
    if need_query:
        grad_query = (grad_scores @ keys).to(query.dtype)
    if need_key:
        grad_key = _sum_heads(grad_scores.transpose(-2, -1) @ queries, shared).to(key.dtype)
    if need_value:
        grad_value = _sum_heads(weights.transpose(-2, -1) @ grad_output, shared).to(value.dtype)
    return tuple(
        absent(0) if grad is None else grad.contiguous()
        for grad in (grad_query, grad_key, grad_value)
    )
