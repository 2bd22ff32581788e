"""The everyday call of attention; see fmkernels/ops/_quick.py."""

from __future__ import annotations

import math
from functools import lru_cache

from torch import Tensor

from fmkernels._dispatch import Backend
from fmkernels.ops._quick import CLOSER_LOOK, is_ordinary
from fmkernels.ops.attention.autograd import OP_NAME, WEIGHTS_OP_NAME, run, run_with_weights
from fmkernels.ops.attention.backends import SDPA, WEIGHTS
from fmkernels.ops.attention.schema import Options


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor] | None:
    """Output and lse of four-dimensional operands with as many heads, without other options."""
    try:
        options = _everyday(OP_NAME, SDPA, query, key, value, attn_mask, is_causal, scale, backend)
        return None if options is None else run("cpu", query, key, value, options)
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
    shape = query.shape
    if (
        len(shape) != 4
        or key.shape[:2] != shape[:2]
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
