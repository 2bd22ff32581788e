"""The everyday call of attention; see fmkernels/ops/_quick.py."""

from __future__ import annotations

import math
from functools import lru_cache

from torch import Tensor

from fmkernels._dispatch import Backend
from fmkernels.ops._autograd import needs_graph
from fmkernels.ops._quick import CLOSER_LOOK, is_ordinary
from fmkernels.ops.attention.autograd import (
    OP_NAME,
    WEIGHTS_OP_NAME,
    run,
    run_with_weights,
    unit_stride,
)
from fmkernels.ops.attention.backends import INFERENCE, SDPA, WEIGHTS
from fmkernels.ops.attention.schema import Options


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    return_lse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None] | None:
    """Output and, if asked for, lse of four-dimensional operands with as many heads, without other
    options."""
    try:
        options = _everyday(OP_NAME, SDPA, query, key, value, attn_mask, is_causal, scale, backend)
        if options is None:
            return None
        if return_lse or needs_graph(query, key, value, attn_mask):
            return run("cpu", query, key, value, options)
        query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
        return INFERENCE(query, key, value, attn_mask, is_causal, options.scale), None
    except CLOSER_LOOK:
        return None


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    average: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor] | None:
    """The same with the weights or their mean."""
    try:
        options = _everyday(
            WEIGHTS_OP_NAME, WEIGHTS, query, key, value, attn_mask, is_causal, scale, backend
        )
        if options is None:
            return None
        return run_with_weights("cpu", query, key, value, options, average)
    except CLOSER_LOOK:
        return None


def _everyday(
    op: str,
    backends: dict[str, Backend],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    backend: str | None,
) -> Options | None:
    shape, key_shape = query.shape, key.shape
    if (
        len(shape) != 4
        or key_shape[0] != shape[0]
        or key_shape[1] != shape[1]
        or (attn_mask is not None and (is_causal or attn_mask.dim() != 4))
        or type(is_causal) is not bool
        or (scale is not None and type(scale) is not float)
        or not is_ordinary(op, backends, backend, query, key, value, attn_mask)
    ):
        return None
    options = _options(is_causal, scale, shape[3])
    return options if attn_mask is None else options._replace(attn_mask=attn_mask)


@lru_cache(maxsize=256)
def _options(is_causal: bool, scale: float | None, head_dim: int) -> Options:
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    return Options(window_right=0 if is_causal else -1, scale=scale)
