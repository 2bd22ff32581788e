"""Checks of the arguments that the attention functions share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels import _checks as check
from fmkernels._dispatch import autocast_enabled
from fmkernels._remember import remember
from fmkernels.functional._options import number, probability
from fmkernels.ops.attention.schema import Options


def broadcast(name: str, *shapes: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        listed = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name} do not broadcast with one another: {listed}") from None


def check_operands(query: Tensor, key: Tensor, value: Tensor | None, enable_gqa: bool) -> None:
    check.tensor("query", query)
    check.operand("key", key, "query", query)
    if value is not None:
        check.operand("value", value, "query", query)
    _check_shapes(query.shape, key.shape, None if value is None else value.shape, enable_gqa)


@remember
def _check_shapes(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...] | None,
    enable_gqa: bool,
) -> None:
    least = 3 if enable_gqa else 2
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if shape is not None and len(shape) < least:
            raise ValueError(
                f"{name} must have at least {least} dimensions, got shape {tuple(shape)}"
            )
    if key[-1] != query[-1]:
        raise ValueError(f"key must have the query's {query[-1]} features, got shape {tuple(key)}")
    if value is not None and value[-2] != key[-2]:
        raise ValueError(
            f"value must have the key's {key[-2]} positions, got shape {tuple(value)}"
        )
    if enable_gqa:
        check_shared_heads("key", key, -3, query[-3])
        if value is not None:
            check_shared_heads("value", value, -3, query[-3])


def check_shared_heads(name: str, shape: Sequence[int], dim: int, heads: int) -> None:
    """The number of heads in dimension ``dim`` divides the query's."""
    shared = shape[dim]
    if shared == 0 or heads % shared != 0:
        raise ValueError(
            f"{name} must have a number of heads that divides the query's {heads} "
            f"(enable_gqa), got shape {tuple(shape)}"
        )


def check_mask(attn_mask: Tensor, query: Tensor, full_shape: tuple[int, ...]) -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a Tensor or None, got {check.describe(attn_mask)}")
    _same_device("attn_mask", attn_mask, query)
    allowed = (torch.bool, torch.float32, query.dtype)
    if attn_mask.dtype not in allowed and not autocast_enabled(query.device.type):
        raise TypeError(
            f"attn_mask must be bool, float32 or the query's {query.dtype}, "
            f"got {check.describe(attn_mask)}"
        )
    if attn_mask.dtype is not torch.bool:
        check.tensor("attn_mask", attn_mask)
    if (
        attn_mask.dim() < 2
        or attn_mask.dim() > len(full_shape)
        or any(
            given not in (1, full)
            for given, full in zip(reversed(attn_mask.shape), reversed(full_shape), strict=False)
        )
    ):
        raise ValueError(
            f"attn_mask must have at least 2 dimensions and broadcast to {full_shape}, "
            f"got {check.describe(attn_mask)}"
        )


def _same_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise RuntimeError(
            f"{name} must be on the device of query ({query.device}), got {check.describe(tensor)}"
        )


def score_scale(scale: float | None, query: Tensor) -> float:
    """The factor on the scores; without features every score is 0 and any factor will do."""
    if scale is not None:
        return number("scale", scale)
    return 1.0 / math.sqrt(query.size(-1)) if query.size(-1) > 0 else 1.0


def _window(window: tuple[int, int] | None, is_causal: bool) -> tuple[int, int]:
    if window is None:
        left, right = -1, -1
    else:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(
                f"window must be a pair (left, right) or None, got {check.describe(window)}"
            )
        left, right = check.integers("window", window, 2, -1)
    return left, 0 if is_causal else right


def per_head(
    name: str, tensor: Tensor | None, query: Tensor, *shapes: tuple[int, ...]
) -> Tensor | None:
    """``tensor`` is None or a floating tensor of one of ``shapes``."""
    if tensor is None:
        return None
    check.tensor(name, tensor)
    _same_device(name, tensor, query)
    if tuple(tensor.shape) not in shapes:
        allowed = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} must have shape {allowed}, got {check.describe(tensor)}")
    return tensor


def options_of(
    query: Tensor,
    leading: tuple[int, ...],
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Options:
    """Checks everything but the mask, which comes checked and four-dimensional.

    Args:
        leading: the result's dimensions before the positions; the last is the heads.
    """
    check.boolean("is_causal", is_causal)
    left, right = _window(window, is_causal)
    heads = leading[-1] if leading else 1
    alibi_slopes = per_head("alibi_slopes", alibi_slopes, query, (heads,), leading or (1,))
    return Options(
        attn_mask=attn_mask,
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.reshape(-1, heads),
        sinks=per_head("sinks", sinks, query, (heads,)),
        window_left=left,
        window_right=right,
        scale=score_scale(scale, query),
        softcap=_softcap(softcap),
        dropout_p=probability("dropout_p", dropout_p),
    )


def _softcap(softcap: float | None) -> float:
    """What the ops take: 0 for none."""
    if softcap is None:
        return 0.0
    if not 0.0 < number("softcap", softcap) < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    return float(softcap)
