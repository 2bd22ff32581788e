"""The everyday call of attention; see fmkernels/ops/_quick.py."""

from __future__ import annotations

import math
from functools import lru_cache

from torch import Tensor

from fmkernels.ops._quick import CLOSER_LOOK, is_ordinary
from fmkernels.ops.attention.autograd import OP_NAME, run
from fmkernels.ops.attention.backends import SDPA
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
        shape = query.shape
        if (
            len(shape) != 4
            or key.shape[:2] != shape[:2]
            or (attn_mask is not None and (is_causal or attn_mask.dim() != 4))
            or type(is_causal) is not bool
            or not is_ordinary(OP_NAME, SDPA, backend, query, key, value, attn_mask)
        ):
            return None
        if scale is not None and type(scale) is not float:
            return None
        options = _options(is_causal, scale, shape[3])
        if attn_mask is not None:
            options = options._replace(attn_mask=attn_mask)
        return run("cpu", query, key, value, options)
    except CLOSER_LOOK:
        return None


@lru_cache(maxsize=256)
def _options(is_causal: bool, scale: float | None, head_dim: int) -> Options:
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    return Options(window_right=0 if is_causal else -1, scale=scale)
