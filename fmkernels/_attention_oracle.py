"""Attention with every option, written out for autograd: the oracle in float64.

Below float32 it is what autocast makes of it: products of matrices in the operands' dtype, the
rest in float32. As in every kernel that does not keep the weights, PyTorch's own included, the
backward's ``sum_j p_j dp_j`` is taken from the rounded output.
"""

from __future__ import annotations

import math

import torch

from fmkernels.ops import _dropout


def attend(
    query,
    key,
    value,
    attn_mask=None,
    alibi_slopes=None,
    sinks=None,
    *,
    is_causal=False,
    scale=None,
    window=None,
    softcap=None,
    factors=None,
    first_position=0,
    return_lse=False,
    return_weights=False,
):
    """Four-dimensional operands; fewer key heads are shared.

    Args:
        factors: what dropout multiplies the weights by.
        first_position: of the queries.
        return_weights: also return the weights, after dropout, instead of lse.
    """
    dtype, heads = query.dtype, query.size(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    keys, values = (t.repeat_interleave(heads // t.size(1), dim=1) for t in (key, value))
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = (query @ keys.transpose(-1, -2)).to(wide) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(query.size(2))[:, None] + first_position
    j = torch.arange(key.size(2))
    # What is the same for all keys of a query does not change its weights. Were it in the scores,
    # the gradient of the slopes would be a sum of large numbers that cancel out.
    common = torch.zeros((), dtype=wide)
    if alibi_slopes is not None and key.size(2) > 0:
        slopes = alibi_slopes.to(wide).reshape(-1, heads, 1, 1)
        distance = (i - j).abs()
        nearest = distance.amin(-1, keepdim=True)
        scores = scores - slopes * (distance - nearest)
        common = -slopes * nearest
    visible = torch.ones(1, 1, query.size(2), key.size(2), dtype=torch.bool)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            visible = visible & attn_mask
        else:
            scores = scores + attn_mask.to(wide)
            visible = visible & (attn_mask != float("-inf"))
    left, right = (-1, -1) if window is None else window
    if is_causal:
        right = 0
    if left >= 0:
        visible = visible & (j >= i - left)
    if right >= 0:
        visible = visible & (j <= i + right)
    visible = visible.expand(scores.shape)
    # A finite stand-in for -inf keeps autograd free of NaN; rows without any key are cut out.
    scores = torch.where(visible, scores, torch.full_like(scores, -1e30))
    logits = scores
    if sinks is not None:
        column = (sinks.to(wide)[:, None, None] - common).expand(*scores.shape[:-1], 1)
        logits = torch.cat([scores, column], dim=-1)
    lse = logits.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp() * visible
    if factors is not None:
        weights = weights * factors.to(wide)
    output = weights.to(dtype) @ values
    if wide != dtype:
        rounding = output.to(wide) - weights.to(wide) @ values.to(wide)
        output = output - (rounding.detach() * (lse - lse.detach()).unsqueeze(-1)).to(dtype)
    if return_weights:
        return output, weights.to(dtype)
    return (output, lse + common.squeeze(-1) if common.dim() else lse) if return_lse else output


def dropout_factors(seed, dropout_p, shape):
    """0 or 1 / (1 - p) for each weight of a contiguous (B, H, Sq, Sk)."""
    batch, heads, queries, keys = shape
    rows = torch.arange(batch * heads * queries).view(batch, heads, queries, 1)
    kept = _dropout.kept(seed, dropout_p, rows, torch.arange(keys))
    return kept.to(torch.float64) * _dropout.factor(dropout_p)
