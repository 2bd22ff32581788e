"""Checks of the arguments that the attention functions share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmkernels import _checks as check
from fmkernels._dispatch import autocast_enabled
from fmkernels.functional._options import number, probability
from fmkernels.ops.attention.schema import Options


def broadcast(name: str, *shapes: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        listed = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name} do not broadcast with one another: {listed}") from None


def check_operands(query: Tensor, key: Tensor, value: Tensor | None, enable_gqa: bool) -> None:
    least = 3 if enable_gqa else 2
    named = {"query": query, "key": key, "value": value}
    if value is None:
        del named["value"]
    for name, operand in named.items():
        check.tensor(name, operand)
        check.same_kind(name, operand, "query", query)
        if operand.dim() < least:
            raise ValueError(
                f"{name} must have at least {least} dimensions, got {check.describe(operand)}"
            )
    if key.size(-1) != query.size(-1):
        raise ValueError(
            f"key must have the query's {query.size(-1)} features, got {check.describe(key)}"
        )
    if value is not None and value.size(-2) != key.size(-2):
        raise ValueError(
            f"value must have the key's {key.size(-2)} positions, got {check.describe(value)}"
        )
    if enable_gqa:
        for name in ("key", "value"):
            if name in named:
                shared_heads(name, named[name], -3, query.size(-3))


def shared_heads(name: str, operand: Tensor, dim: int, heads: int) -> None:
    """The number of heads of ``operand`` divides the query's."""
    shared = operand.size(dim)
    if shared == 0 or heads % shared != 0:
        raise ValueError(
            f"{name} must have a number of heads that divides the query's {heads} "
            f"(enable_gqa), got {check.describe(operand)}"
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
    left, right = -1, -1
    if window is not None:
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
    if softcap is not None and not 0.0 < number("softcap", softcap) < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    heads = leading[-1] if leading else 1
    alibi_slopes = per_head("alibi_slopes", alibi_slopes, query, (heads,), leading or (1,))
    return Options(
        attn_mask=attn_mask,
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.reshape(-1, heads),
        sinks=per_head("sinks", sinks, query, (heads,)),
        window_left=left,
        window_right=right,
        scale=score_scale(scale, query),
        softcap=0.0 if softcap is None else float(softcap),
        dropout_p=probability("dropout_p", dropout_p),
    )
