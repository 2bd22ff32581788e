"""The attention family in plain PyTorch: forward and a hand-written backward, on any device.

The functions have the signatures of the ops in schema.py and use no autograd. All sums are taken
in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels.ops import _dropout
from fmkernels.ops._activations import opmath_dtype
from fmkernels.ops.attention.schema import Options, check_lengths, empty_output

_MINUS_INFINITY = float("-inf")


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """Give every query head its own copy of the key or value head that it shares."""
    shared = tensor.size(1)
    return tensor if shared == heads else tensor.repeat_interleave(heads // shared, dim=1)


def _sum_heads(grad: Tensor, shared: int) -> Tensor:
    """The gradient of :func:`_repeat_heads`."""
    heads = grad.size(1)
    return grad if heads == shared else grad.unflatten(1, (shared, heads // shared)).sum(dim=2)


class _Geometry(NamedTuple):
    """Where queries and keys stand, broadcastable to ``(B, Hq, Sq, Sk)``.

    Attributes:
        query, key: int64 positions, ``(.., Sq, 1)`` and ``(.., 1, Sk)``.
        sequence: for packed sequences the number of each query's sequence, ``(Sq,)``.
        visible: bool, or None where every query sees every key.
    """

    query: Tensor
    key: Tensor
    sequence: Tensor | None
    visible: Tensor | None


def _packed_positions(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The sequence of each packed row, and the row's position in it."""
    row = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], row, right=True)
    return sequence, row - cu_seqlens[sequence]


def _geometry(queries: int, keys: int, options: Options, device: torch.device) -> _Geometry:
    if options.cu_seqlens_q is not None:
        sequence, query = _packed_positions(options.cu_seqlens_q, queries)
        key_sequence, key = _packed_positions(options.cu_seqlens_k, keys)
        visible = sequence[:, None] == key_sequence
    else:
        sequence, visible = None, None
        query, key = torch.arange(queries, device=device), torch.arange(keys, device=device)
    query = query[:, None]
    return _Geometry(query, key, sequence, _in_window(query, key, visible, options))


def _in_window(
    query: Tensor, key: Tensor, visible: Tensor | None, options: Options
) -> Tensor | None:
    if options.window_left >= 0:
        inside = key >= query - options.window_left
        visible = inside if visible is None else visible & inside
    if options.window_right >= 0:
        inside = key <= query + options.window_right
        visible = inside if visible is None else visible & inside
    return visible


def _slopes(options: Options, geometry: _Geometry) -> Tensor:
    """alibi_slopes, broadcastable to ``(B, Hq, Sq, Sk)``."""
    slopes = options.alibi_slopes
    if geometry.sequence is None or slopes.size(0) == 1:
        return slopes[:, :, None, None]
    return slopes[geometry.sequence].t()[None, :, :, None]


def _scores(
    query: Tensor, key: Tensor, options: Options, geometry: _Geometry
) -> tuple[Tensor, Tensor | None]:
    """The scores, -inf where hidden; and their derivative by ``scale * q . k`` if it is not 1."""
    scores, derivative = (query @ key.transpose(-2, -1)) * options.scale, None
    if options.softcap > 0.0:
        bounded = (scores / options.softcap).tanh()
        scores, derivative = options.softcap * bounded, 1.0 - bounded.square()
    if options.alibi_slopes is not None:
        scores = scores - _slopes(options, geometry) * (geometry.query - geometry.key).abs()
    mask = options.attn_mask
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, _MINUS_INFINITY)
        else:
            scores = scores + mask.to(scores.dtype)
    if geometry.visible is not None:
        scores = scores.masked_fill(~geometry.visible, _MINUS_INFINITY)
    return scores, derivative


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and its log-denominator; a row of -inf gives zeros."""
    if sinks is not None:
        sinks = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    if scores.size(-1) == 0:
        if sinks is None:
            return scores, scores.new_full(scores.shape[:-1], _MINUS_INFINITY)
        return scores, sinks.squeeze(-1).clone()
    maximum = scores.detach().amax(dim=-1, keepdim=True)
    if sinks is not None:
        maximum = torch.maximum(maximum, sinks.detach())
    empty = maximum == _MINUS_INFINITY
    # Subtracting -inf from -inf would be NaN; from a row that is empty subtract 0 instead.
    maximum = maximum.masked_fill(empty, 0.0)
    weights = (scores - maximum).exp()
    denominator = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        denominator = denominator + (sinks - maximum).exp()
    # An empty row sums to 0: divide it by 1, so that neither value nor gradient becomes NaN.
    denominator = denominator.masked_fill(empty, 1.0)
    lse = (maximum + denominator.log()).masked_fill(empty, _MINUS_INFINITY).squeeze(-1)
    return weights / denominator, lse


def _dropout_factors(shape: torch.Size, geometry: _Geometry, options: Options) -> Tensor:
    """0 or the factor of a kept one for each weight of the given shape, in float64."""
    batch, heads, queries, _ = shape
    rows = torch.arange(batch * heads * queries, device=geometry.key.device)
    rows = rows.view(batch, heads, queries, 1)
    kept = _dropout.kept(options.dropout_seed, options.dropout_p, rows, geometry.key)
    return kept.to(torch.float64) * _dropout.factor(options.dropout_p)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, weights after dropout and lse, all in the dtype of the sums."""
    dtype, heads = opmath_dtype(query.dtype), query.size(1)
    keys, values = _repeat_heads(key, heads).to(dtype), _repeat_heads(value, heads).to(dtype)
    geometry = _geometry(query.size(2), key.size(2), options, query.device)
    scores, _ = _scores(query.to(dtype), keys, options, geometry)
    weights, lse = _softmax(scores, options.sinks)
    if options.dropout_p > 0.0:
        weights = weights * _dropout_factors(weights.shape, geometry, options).to(dtype)
    return weights @ values, weights, lse


def sdpa_forward(query: Tensor, key: Tensor, value: Tensor, *options) -> tuple[Tensor, Tensor]:
    result, _, lse = _attend(query, key, value, Options(*options))
    return empty_output(query, value).copy_(result), lse


def sdpa_weights(
    query: Tensor, key: Tensor, value: Tensor, *options_and_average
) -> tuple[Tensor, Tensor, Tensor]:
    *options, average = options_and_average
    result, weights, lse = _attend(query, key, value, Options(*options))
    if average:
        weights = weights.mean(dim=1)
    return empty_output(query, value).copy_(result), weights.to(query.dtype), lse


def sdpa_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *options_and_needs,
) -> tuple[Tensor, ...]:
    count = len(Options._fields)
    options, needs = Options(*options_and_needs[:count]), options_and_needs[count:]
    return _backward(grad_output, grad_lse, None, query, key, value, lse, options, needs)


def sdpa_weights_backward(
    grad_output: Tensor,
    grad_weights: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *options_and_needs,
) -> tuple[Tensor, ...]:
    count = len(Options._fields)
    options, average = Options(*options_and_needs[:count]), options_and_needs[count]
    grad_weights = grad_weights.to(opmath_dtype(query.dtype))
    if average:
        grad_weights = grad_weights.unsqueeze(1) / query.size(1)
    needs = options_and_needs[count + 1 :]
    return _backward(grad_output, None, grad_weights, query, key, value, lse, options, needs)


def _backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    grad_given: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    options: Options,
    needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """``grad_given``: of the weights themselves, broadcastable to ``(B, Hq, Sq, Sk)``."""
    need_query, need_key, need_value, need_mask, need_slopes, need_sinks = needs
    dtype, (heads, shared) = opmath_dtype(query.dtype), (query.size(1), key.size(1))
    grad_output = grad_output.to(dtype)
    queries = query.to(dtype)
    keys, values = _repeat_heads(key, heads).to(dtype), _repeat_heads(value, heads).to(dtype)
    geometry = _geometry(query.size(2), key.size(2), options, query.device)

    empty = lse == _MINUS_INFINITY
    # Rows without a visible key: exp(-inf - inf) = 0 instead of exp(-inf + inf) = NaN.
    normaliser = lse.masked_fill(empty, float("inf")).unsqueeze(-1)
    scores, derivative = _scores(queries, keys, options, geometry)
    if grad_given is None:
        weights = (scores - normaliser).exp()
    else:
        # Triton's backward, too: the rounding of its lse is a factor that a row has in common.
        weights, _ = _softmax(scores, options.sinks)
    grad_weights = grad_output @ values.transpose(-2, -1)
    if grad_given is not None:
        grad_weights = grad_weights + grad_given
    dropped = weights
    if options.dropout_p > 0.0:
        factors = _dropout_factors(weights.shape, geometry, options).to(dtype)
        grad_weights, dropped = grad_weights * factors, weights * factors
    # d softmax: ds = p * (dp - sum_j p_j dp_j). The sum is grad_output . output as well, but the
    # output is rounded, and that error would enter every sum over keys.
    correction = (weights * grad_weights).sum(dim=-1)
    if grad_lse is not None:
        correction = correction - grad_lse.to(dtype)
    correction = correction.masked_fill(empty, 0.0).unsqueeze(-1)
    grad_scores = weights * (grad_weights - correction)
    grad_products = grad_scores * options.scale
    if derivative is not None:
        grad_products = grad_products * derivative

    grads: list[Tensor | None] = [None] * 6
    if need_query:
        grads[0] = (grad_products @ keys).to(query.dtype)
    if need_key:
        grads[1] = _sum_heads(grad_products.transpose(-2, -1) @ queries, shared).to(key.dtype)
    if need_value:
        grads[2] = _sum_heads(dropped.transpose(-2, -1) @ grad_output, shared).to(value.dtype)
    if need_mask:
        mask = options.attn_mask
        grads[3] = grad_scores.sum_to_size(mask.shape).to(mask.dtype)
    correction = correction.squeeze(-1)
    sink_weights = None
    if options.sinks is not None:
        sink_weights = (options.sinks[:, None] - normaliser.squeeze(-1)).exp()
    if need_slopes:
        distances = (geometry.query - geometry.key).abs()
        nearest = distances.amin(dim=-1) if key.size(2) else distances.new_zeros(())
        by_row = (grad_scores * (distances - nearest.unsqueeze(-1))).sum(dim=-1)
        # The rest is the nearest key's distance times a sum that is known without adding up
        # numbers that cancel out.
        total = torch.zeros((), dtype=dtype, device=query.device)
        if grad_lse is not None:
            total = total + grad_lse.to(dtype).masked_fill(empty, 0.0)
        if sink_weights is not None:
            total = total + sink_weights * correction
        grads[4] = _slopes_gradient(-(by_row + nearest * total), options, geometry)
    if need_sinks:
        grads[5] = -(sink_weights * correction).sum(dim=(0, 2))
    return tuple(query.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _slopes_gradient(by_row: Tensor, options: Options, geometry: _Geometry) -> Tensor:
    """``(B, Hq, Sq)`` summed to the shape of alibi_slopes."""
    slopes = options.alibi_slopes
    if geometry.sequence is None or slopes.size(0) == 1:
        return by_row.sum(dim=2).sum_to_size(slopes.shape)
    return torch.zeros_like(slopes).index_add_(0, geometry.sequence, by_row[0].t())


# Numbers of a block of scores in sdpa_statistics: 16 MB in float32.
_STATISTICS_BLOCK = 2**22


def sdpa_statistics(query: Tensor, key: Tensor, *options) -> tuple[Tensor, ...]:
    options = Options(*options)
    dtype = opmath_dtype(query.dtype)
    keys = _repeat_heads(key, query.size(1)).to(dtype)
    geometry = _geometry(query.size(2), key.size(2), options, query.device)
    batch, heads, length = query.shape[:3]
    step = max(1, _STATISTICS_BLOCK // max(1, batch * heads * key.size(2)))
    blocks = []
    for first in range(0, length, step):
        rows = slice(first, min(first + step, length))
        mask, visible = options.attn_mask, geometry.visible
        if mask is not None and mask.size(2) > 1:
            mask = mask[:, :, rows]
        part = geometry._replace(
            query=geometry.query[rows], visible=None if visible is None else visible[rows]
        )
        block = options._replace(attn_mask=mask)
        scores, _ = _scores(query[:, :, rows].to(dtype), keys, block, part)
        blocks.append(_row_statistics(scores, options.sinks))
    if not blocks:
        empty = query.new_empty(batch, heads, 0, dtype=dtype)
        return empty, empty.to(torch.int64), empty.clone(), empty.clone()
    return tuple(torch.cat(parts, dim=2) for parts in zip(*blocks, strict=True))


def _row_statistics(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, ...]:
    weights, lse = _softmax(scores, sinks)
    # lse - s is -log p; where p is 0 both of p log p's limits are 0.
    surprise = (lse.unsqueeze(-1) - scores).masked_fill(weights == 0, 0.0)
    entropy = (weights * surprise).sum(dim=-1)
    if sinks is not None:
        surprise = lse - sinks[:, None]
        share = (-surprise).exp()
        entropy = entropy + (share * surprise).masked_fill(share == 0, 0.0)
    entropy = entropy.masked_fill(lse == _MINUS_INFINITY, 0.0)
    if scores.size(-1) == 0:
        return entropy, torch.full_like(lse, -1, dtype=torch.int64), torch.zeros_like(lse), lse
    top_weight, top_key = weights.max(dim=-1)
    hidden = scores.amax(dim=-1) == _MINUS_INFINITY
    return entropy, top_key.masked_fill(hidden, -1), top_weight, lse


# --- the cache ---


def _gathered(cache: Tensor, page_table: Tensor | None) -> Tensor:
    """The cache as ``(B, Hkv, capacity, width)``."""
    if page_table is None:
        return cache
    # Entries past a sequence's end may be anything.
    pages = cache[page_table.clamp(0, max(cache.size(0) - 1, 0)).long()]
    return pages.permute(0, 2, 1, 3, 4).flatten(2, 3)


def sdpa_cached(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seqlens: Tensor,
    page_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    dtype, (heads, queries) = opmath_dtype(query.dtype), query.shape[1:3]
    options = Options(
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        window_left=window_left,
        window_right=window_right,
        scale=scale,
        softcap=softcap,
    )
    keys, values = _gathered(key_cache, page_table), _gathered(value_cache, page_table)
    check_lengths(seqlens, keys.size(2), 0)
    lengths = seqlens.long()[:, None, None, None]
    key_position = torch.arange(keys.size(2), device=query.device)
    query_position = lengths - queries + torch.arange(queries, device=query.device)[:, None]
    held = key_position < lengths
    visible = _in_window(query_position, key_position, held, options)
    geometry = _Geometry(query_position, key_position, None, visible)
    # What lies past the end may be NaN, which a weight of 0 does not remove.
    past = ~held.transpose(-2, -1)
    keys = _repeat_heads(keys, heads).to(dtype).masked_fill(past, 0.0)
    values = _repeat_heads(values, heads).to(dtype).masked_fill(past, 0.0)
    scores, _ = _scores(query.to(dtype), keys, options, geometry)
    weights, lse = _softmax(scores, sinks)
    return empty_output(query, value_cache).copy_(weights @ values), lse


def kv_cache_append(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens: Tensor,
    page_table: Tensor | None,
) -> None:
    batch, _, count, _ = key.shape
    size = key_cache.size(2)
    check_lengths(seqlens, size * (1 if page_table is None else page_table.size(1)), count)
    position = seqlens.long()[:, None] + torch.arange(count, device=key.device)
    if page_table is None:
        entry = torch.arange(batch, device=key.device)[:, None].expand_as(position)
    else:
        entry = page_table.long().gather(1, position // max(size, 1))
        position = position % max(size, 1)
    for cache, new in ((key_cache, key), (value_cache, value)):
        cache.transpose(1, 2).index_put_((entry, position), new.transpose(1, 2))
