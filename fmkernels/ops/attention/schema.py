"""The attention family's ops: schemas and fake kernels.

B batch, Hq query heads, Hkv key and value heads (Hq a multiple of Hkv), Sq queries, Sk keys.

``sdpa_forward``
    query ``(B, Hq, Sq, D)``, key ``(B, Hkv, Sk, D)``, value ``(B, Hkv, Sk, Dv)``: unit last
    stride, other strides free. attn_mask: None, or four-dimensional and broadcastable to
    ``(B, Hq, Sq, Sk)``, bool (True: take part) or the query's dtype (added to the scaled scores),
    any strides. With ``is_causal`` query i sees keys 0..i. Returns
    ``output = softmax(scale * query key^T + mask) value`` of shape ``(B, Hq, Sq, Dv)`` and
    ``lse``, the natural logarithm of the softmax's denominator (its maximum included),
    ``(B, Hq, Sq)`` in float32 (float64 for float64). A row without any visible key has output 0
    and lse -inf.
    The output is contiguous, except that it is the transpose of a contiguous ``(B, Sq, Hq, Dv)``
    tensor when the query has the heads of a position side by side, as the transpose of a
    ``(B, Sq, Hq, D)`` tensor or of a third of a packed projection does.
``sdpa_backward``
    grad_output has unit last stride and otherwise any strides; grad_lse is contiguous. Returns
    the gradients of query, key and value, contiguous; an empty tensor of shape ``(0,)`` for each
    that is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels.ops._activations import opmath_dtype

_library = torch.library.Library("fmkernels", "FRAGMENT")

_library.define(
    "sdpa_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, "
    "float scale) -> (Tensor output, Tensor lse)"
)
_library.define(
    "sdpa_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor output, Tensor lse, Tensor? attn_mask, bool is_causal, float scale, bool need_query, "
    "bool need_key, bool need_value) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """Allocate ``(B, Hq, Sq, Dv)`` in the memory layout that the op promises for this query."""
    batch, heads, length, _ = query.shape
    width = value.size(-1)
    if heads > 1 and length > 1 and query.stride(1) < query.stride(2):
        return query.new_empty(batch, length, heads, width).transpose(1, 2)
    return query.new_empty(batch, heads, length, width)


@torch.library.register_fake("fmkernels::sdpa_forward", lib=_library)
def _sdpa_forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:-1], dtype=opmath_dtype(query.dtype))
    return empty_output(query, value), lse


@torch.library.register_fake("fmkernels::sdpa_backward", lib=_library)
def _sdpa_backward_fake(
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
    wanted = ((query, need_query), (key, need_key), (value, need_value))
    query_grad, key_grad, value_grad = (
        tensor.new_empty(tensor.shape if needed else (0,)) for tensor, needed in wanted
    )
    return query_grad, key_grad, value_grad
