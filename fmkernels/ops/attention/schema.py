"""The attention family's ops: schemas and fake kernels.

B batch, Hq query heads, Hkv key and value heads (Hq a multiple of Hkv), Sq queries, Sk keys.

``sdpa_forward(query, key, value, *options)``
    query ``(B, Hq, Sq, D)``, key ``(B, Hkv, Sk, D)``, value ``(B, Hkv, Sk, Dv)``: unit last
    stride, other strides free. Returns ``output`` ``(B, Hq, Sq, Dv)`` and ``lse``, the natural
    logarithm of the softmax's denominator (its maximum and the sink included), ``(B, Hq, Sq)`` in
    float32 (float64 for float64). A row without any visible key has output 0; its lse is the sink,
    or -inf. The output is contiguous, except that it is the transpose of a contiguous
    ``(B, Sq, Hq, Dv)`` tensor when the query has the heads of a position side by side, as the
    transpose of a ``(B, Sq, Hq, D)`` tensor or of a third of a packed projection does.
    The options, see :class:`Options`, apply in this order to the score of query i and key j:
    ``s = scale * q_i . k_j``; ``s = softcap * tanh(s / softcap)``; ``s = s - slope * |i - j| +
    mask``; hidden (-inf) unless ``i - window_left <= j <= i + window_right``; softmax over the
    keys and the sink; dropout.
``sdpa_inference(query, key, value, attn_mask, is_causal, scale)``
    That output alone, without other options, which small calls get in less time.
``sdpa_backward(grad_output, grad_lse, query, key, value, output, lse, *options, need_...)``
    grad_output has unit last stride and otherwise any strides; grad_lse is contiguous. Returns the
    gradients of query, key, value, attn_mask, alibi_slopes and sinks, contiguous; an empty tensor
    of shape ``(0,)`` for each that is not needed.
``sdpa_weights(query, key, value, *options, average)``
    As ``sdpa_forward``, and between output and lse the weights after dropout, ``(B, Hq, Sq, Sk)``
    contiguous in the query's dtype, or with ``average`` their mean over the heads ``(B, Sq, Sk)``
    (at least one head); 0 where the query does not see the key. Not for packed sequences.
``sdpa_weights_backward(grad_output, grad_weights, query, key, value, output, lse, *options,
average, need_...)``
    As ``sdpa_backward``, with the gradient of the weights in the query's dtype, any strides, and
    none of lse.
``sdpa_statistics(query, key, *options)``
    Of each query's softmax, without dropout: its entropy in nats (the sink counts as an outcome;
    0 for a row without any), the key of the largest weight (the first of equals; -1 if none is
    visible) in int64, that weight, and lse. All ``(B, Hq, Sq)``, float32 (float64 for float64)
    but for the keys. Not for packed sequences.
``sdpa_cached(query, key_cache, value_cache, seqlens, page_table, alibi_slopes, sinks,
window_left, window_right, scale, softcap)``
    Attention to the first ``seqlens[b]`` keys of a cache, at whose end the queries stand: query i
    has position ``seqlens[b] - Sq + i``. query as above; caches ``(B, Hkv, capacity, D or Dv)``,
    or with page_table ``(B, pages)`` int32 the pool ``(pages of the pool, Hkv, page size, ..)``,
    key j of sequence b being row ``j % page size`` of page ``page_table[b, j // page size]``;
    seqlens ``(B,)`` int32. Returns output and lse as ``sdpa_forward``.
``kv_cache_append(key_cache, value_cache, key, value, seqlens, page_table)``
    Writes key ``(B, Hkv, n, D)`` and value to positions ``seqlens[b] .. seqlens[b] + n - 1``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels.ops._activations import opmath_dtype


class Options(NamedTuple):
    """What modifies plain attention; the ops take the fields in this order.

    Attributes:
        attn_mask: four-dimensional and broadcastable to ``(B, Hq, Sq, Sk)``, bool (True: take
            part), float32 or the query's dtype (added), any strides.
        alibi_slopes: ``(B or 1, Hq)``, of lse's dtype.
        sinks: ``(Hq,)``, of lse's dtype: one more logit in the denominator, without a value.
        cu_seqlens_q, cu_seqlens_k: int32 ``(sequences + 1,)``, both or neither: B is 1, and rows
            ``cu[n] .. cu[n + 1] - 1`` are sequence n, which sees only its own keys. Positions i
            and j then count from the start of the sequence. No mask; alibi_slopes may then be
            ``(sequences, Hq)``.
        dropout_seed: int64 ``(1,)`` where dropout_p > 0, see ``ops/_dropout.py``.
        window_left, window_right: keys visible before and after the query's position; -1: all.
            Causal attention is ``window_right = 0``.
        scale: factor on the scores, any number.
        softcap: 0 for none.
        dropout_p: probability of zeroing a weight.
    """

    attn_mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    dropout_seed: Tensor | None = None
    window_left: int = -1
    window_right: int = -1
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0


PLAIN = Options()  # attention without any of them, but for the scale

_library = torch.library.Library("fmkernels", "FRAGMENT")

_OPTIONS = (
    "Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? dropout_seed, int window_left, int window_right, float scale, "
    "float softcap, float dropout_p"
)
_library.define(
    f"sdpa_forward(Tensor query, Tensor key, Tensor value, {_OPTIONS}) "
    "-> (Tensor output, Tensor lse)"
)
_library.define(
    "sdpa_inference(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
    "float scale) -> Tensor"
)
_library.define(
    "sdpa_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    f"Tensor output, Tensor lse, {_OPTIONS}, bool need_query, bool need_key, bool need_value, "
    "bool need_mask, bool need_slopes, bool need_sinks) -> (Tensor grad_query, Tensor grad_key, "
    "Tensor grad_value, Tensor grad_mask, Tensor grad_slopes, Tensor grad_sinks)"
)
_library.define(
    f"sdpa_weights(Tensor query, Tensor key, Tensor value, {_OPTIONS}, bool average) "
    "-> (Tensor output, Tensor weights, Tensor lse)"
)
_library.define(
    "sdpa_weights_backward(Tensor grad_output, Tensor grad_weights, Tensor query, Tensor key, "
    f"Tensor value, Tensor output, Tensor lse, {_OPTIONS}, bool average, bool need_query, "
    "bool need_key, bool need_value, bool need_mask, bool need_slopes, bool need_sinks) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, "
    "Tensor grad_slopes, Tensor grad_sinks)"
)
_library.define(
    f"sdpa_statistics(Tensor query, Tensor key, {_OPTIONS}) "
    "-> (Tensor entropy, Tensor top_key, Tensor top_weight, Tensor lse)"
)
_library.define(
    "sdpa_cached(Tensor query, Tensor key_cache, Tensor value_cache, Tensor seqlens, "
    "Tensor? page_table, Tensor? alibi_slopes, Tensor? sinks, int window_left, int window_right, "
    "float scale, float softcap) -> (Tensor output, Tensor lse)"
)
_library.define(
    "kv_cache_append(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, "
    "Tensor seqlens, Tensor? page_table) -> ()"
)


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """Allocate ``(B, Hq, Sq, Dv)`` in the memory layout that the op promises for this query."""
    batch, heads, length, _ = query.shape
    width = value.size(-1)
    if heads > 1 and length > 1 and query.stride(1) < query.stride(2):
        return query.new_empty(batch, length, heads, width).transpose(1, 2)
    return query.new_empty(batch, heads, length, width)


def empty_weights(query: Tensor, key: Tensor, average: bool) -> Tensor:
    """Allocate what ``sdpa_weights`` returns beside the output."""
    batch, heads, length, _ = query.shape
    if average:
        return query.new_empty(batch, length, key.size(2))
    return query.new_empty(batch, heads, length, key.size(2))


def check_lengths(seqlens: Tensor, capacity: int, appended: int) -> None:
    """On the CPU a length past the cache must raise; kernels of other devices clamp it."""
    if seqlens.device.type != "cpu" or torch.compiler.is_compiling() or seqlens.numel() == 0:
        return
    least, most = seqlens.min().item(), seqlens.max().item() + appended
    if least < 0 or most > capacity:
        raise RuntimeError(
            f"cache_seqlens: lengths must stay in [0, {capacity}], got {least} to {most}"
        )


def _row_terms(query: Tensor) -> Tensor:
    """One number per query, of lse's dtype."""
    return query.new_empty(query.shape[:-1], dtype=opmath_dtype(query.dtype))


@torch.library.register_fake("fmkernels::sdpa_forward", lib=_library)
def _sdpa_forward_fake(query: Tensor, key: Tensor, value: Tensor, *options) -> tuple[Tensor, ...]:
    return empty_output(query, value), _row_terms(query)


@torch.library.register_fake("fmkernels::sdpa_inference", lib=_library)
def _sdpa_inference_fake(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return empty_output(query, value)


@torch.library.register_fake("fmkernels::sdpa_backward", lib=_library)
def _sdpa_backward_fake(
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
    inputs = (query, key, value, options.attn_mask, options.alibi_slopes, options.sinks)
    return tuple(
        tensor.new_empty(tensor.shape) if needed else query.new_empty(0)
        for tensor, needed in zip(inputs, needs, strict=True)
    )


@torch.library.register_fake("fmkernels::sdpa_weights", lib=_library)
def _sdpa_weights_fake(
    query: Tensor, key: Tensor, value: Tensor, *options_and_average
) -> tuple[Tensor, ...]:
    weights = empty_weights(query, key, options_and_average[-1])
    return empty_output(query, value), weights, _row_terms(query)


@torch.library.register_fake("fmkernels::sdpa_weights_backward", lib=_library)
def _sdpa_weights_backward_fake(
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
    rest = (*options_and_needs[:count], *options_and_needs[count + 1 :])  # without `average`
    return _sdpa_backward_fake(grad_output, None, query, key, value, output, lse, *rest)


@torch.library.register_fake("fmkernels::sdpa_statistics", lib=_library)
def _sdpa_statistics_fake(query: Tensor, key: Tensor, *options) -> tuple[Tensor, ...]:
    top_key = query.new_empty(query.shape[:-1], dtype=torch.int64)
    return _row_terms(query), top_key, _row_terms(query), _row_terms(query)


@torch.library.register_fake("fmkernels::sdpa_cached", lib=_library)
def _sdpa_cached_fake(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest
) -> tuple[Tensor, Tensor]:
    return empty_output(query, value_cache), _row_terms(query)


@torch.library.register_fake("fmkernels::kv_cache_append", lib=_library)
def _kv_cache_append_fake(key_cache: Tensor, value_cache: Tensor, *rest) -> None:
    return None
