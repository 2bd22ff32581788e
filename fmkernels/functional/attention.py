"""Attention as functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmkernels import _checks as check
from fmkernels.functional._options import number, probability
from fmkernels.ops.attention import autograd


def _broadcast(name: str, *shapes: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        listed = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name} do not broadcast with one another: {listed}") from None


def _check_operands(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    least = 3 if enable_gqa else 2
    for name, operand in (("query", query), ("key", key), ("value", value)):
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
    if value.size(-2) != key.size(-2):
        raise ValueError(
            f"value must have the key's {key.size(-2)} positions, got {check.describe(value)}"
        )
    if enable_gqa:
        heads = query.size(-3)
        for name, operand in (("key", key), ("value", value)):
            shared = operand.size(-3)
            if shared == 0 or heads % shared != 0:
                raise ValueError(
                    f"{name} must have a number of heads that divides the query's {heads} "
                    f"(enable_gqa), got {check.describe(operand)}"
                )


def _check_mask(attn_mask: Tensor, query: Tensor, full_shape: tuple[int, ...]) -> None:
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a Tensor or None, got {check.describe(attn_mask)}")
    if attn_mask.device != query.device:
        raise RuntimeError(
            f"attn_mask must be on the device of query ({query.device}), "
            f"got {check.describe(attn_mask)}"
        )
    allowed = (torch.bool, torch.float32, query.dtype)
    if attn_mask.dtype not in allowed and not torch.is_autocast_enabled(query.device.type):
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


def _scale(scale: float | None, query: Tensor) -> float:
    """The factor on the scores; without features every score is 0 and any factor will do."""
    if scale is not None:
        return number("scale", scale)
    return 1.0 / math.sqrt(query.size(-1)) if query.size(-1) > 0 else 1.0


def _four_dimensional(tensor: Tensor, leading: tuple[int, ...]) -> Tensor:
    """``tensor`` with its leading dimensions broadcast to ``leading`` and folded into two."""
    tensor = tensor.expand(*leading, *tensor.shape[-2:])
    if len(leading) == 2:
        return tensor
    if len(leading) < 2:
        return tensor[(None,) * (2 - len(leading))]
    return tensor.reshape(math.prod(leading[:-1]), leading[-1], *tensor.shape[-2:])


def _four_dimensional_mask(attn_mask: Tensor, leading: tuple[int, ...]) -> Tensor:
    """The mask with four dimensions; those it broadcasts over stay of size 1 where they can."""
    rank = max(len(leading), 2) + 2
    attn_mask = attn_mask[(None,) * (rank - attn_mask.dim())]
    if rank == 4:
        return attn_mask
    if all(size == 1 for size in attn_mask.shape[:-3]):
        return attn_mask.reshape(1, *attn_mask.shape[-3:])
    return _four_dimensional(attn_mask, leading)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * query key^T + mask) value`` without holding the matrix of weights.

    Semantics of :func:`torch.nn.functional.scaled_dot_product_attention`. The online softmax is
    that of Milakov and Gimelshein 2018 as FlashAttention (Dao et al. 2022) tiles it.

    Args:
        query: ``(..., Hq, Sq, D)``, with any number of leading dimensions including none; float32,
            bfloat16, float16 or float64.
        key: ``(..., Hkv, Sk, D)``.
        value: ``(..., Hkv, Sk, Dv)``. The leading dimensions of the three broadcast.
        attn_mask: broadcastable to ``(..., Hq, Sq, Sk)``; bool (True: take part), the query's
            dtype or float32 (added to the scaled scores). Not together with ``is_causal``.
        dropout_p: probability of zeroing a weight. As in torch it is applied whenever it is
            positive: pass 0 in evaluation.
        is_causal: query i sees keys 0..i (aligned at the top left when Sq and Sk differ).
        scale: factor on the scores; None means ``1 / sqrt(D)``.
        enable_gqa: key and value may have fewer heads than the query, a divisor of its number.
        return_lse: also return the logarithm of the softmax's denominator.
        backend: ``"auto"``, ``"cpu"`` or ``"reference"``; None takes the surrounding
            :class:`fmkernels.use_backend`. Dropout, a mask that requires a gradient and a
            float32 mask on half-precision operands are served by the reference alone.

    Returns:
        output ``(..., Hq, Sq, Dv)``; with ``return_lse`` a tuple ``(output, lse)``, lse
        ``(..., Hq, Sq)`` in float32 (float64 for float64), natural logarithm. A query that sees no
        key has output 0, lse -inf, and passes no gradient on. Differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    for name, flag in (
        ("is_causal", is_causal),
        ("enable_gqa", enable_gqa),
        ("return_lse", return_lse),
    ):
        check.boolean(name, flag)
    _check_operands(query, key, value, enable_gqa)
    dropout_p = probability("dropout_p", dropout_p)
    factor = _scale(scale, query)

    if enable_gqa:
        heads = query.size(-3)
        if key.size(-3) != value.size(-3):
            key = key.repeat_interleave(heads // key.size(-3), dim=-3)
            value = value.repeat_interleave(heads // value.size(-3), dim=-3)
        outer = _broadcast(
            "the leading dimensions of query, key and value",
            query.shape[:-3],
            key.shape[:-3],
            value.shape[:-3],
        )
        leading, shared_leading = (*outer, heads), (*outer, key.size(-3))
    else:
        leading = shared_leading = tuple(
            _broadcast(
                "the leading dimensions of query, key and value",
                query.shape[:-2],
                key.shape[:-2],
                value.shape[:-2],
            )
        )
    result_shape = (*leading, query.size(-2))
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask must be None when is_causal is True")
        _check_mask(attn_mask, query, (*result_shape, key.size(-2)))
        attn_mask = _four_dimensional_mask(attn_mask, leading)
    output, lse = autograd.attention(
        _four_dimensional(query, leading),
        _four_dimensional(key, shared_leading),
        _four_dimensional(value, shared_leading),
        attn_mask,
        dropout_p,
        is_causal,
        factor,
        backend,
    )
    if len(leading) != 2:
        output = output.reshape(*result_shape, output.size(-1))
        lse = lse.reshape(result_shape)
    return (output, lse) if return_lse else output


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`scaled_dot_product_attention` that also returns the weights it otherwise never holds.

    Takes four-dimensional query, key and value with the same batch and heads, and a mask that is
    four-dimensional; only the reference backend serves it.

    Returns:
        output ``(B, H, Sq, Dv)`` and weights ``(B, H, Sq, Sk)``, after dropout; the weights of a
        query that sees no key are 0.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: another backend was asked for.
    """
    _check_operands(query, key, value, False)
    for name, operand in (("query", query), ("key", key), ("value", value)):
        check.rank(name, operand, 4)
        check.shape(name, operand, (*query.shape[:2], *operand.shape[2:]), "the query's first two")
    if attn_mask is not None:
        _check_mask(attn_mask, query, (*query.shape[:-1], key.size(-2)))
        check.rank("attn_mask", attn_mask, 4)
    dropout_p = probability("dropout_p", dropout_p)
    scale = _scale(None, query)
    return autograd.attention_with_weights(
        query, key, value, attn_mask, dropout_p, False, scale, backend
    )
