"""Attention as functions of whole, equally long sequences."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from fmkernels import _checks as check
from fmkernels._remember import remember
from fmkernels.functional import _attention_options as common
from fmkernels.functional.packed_attention import nested_attention
from fmkernels.ops.attention import autograd, quick
from fmkernels.ops.attention.schema import Options


@remember
def _leading(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...] | None,
    enable_gqa: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dimensions before positions and features: of the query and of the keys, broadcast."""
    skipped = 3 if enable_gqa else 2
    names = "query and key" if value is None else "query, key and value"
    shapes = (query, key) if value is None else (query, key, value)
    outer = common.broadcast(
        f"the leading dimensions of {names}", *(shape[:-skipped] for shape in shapes)
    )
    if enable_gqa:
        return (*outer, query[-3]), (*outer, key[-3])
    return tuple(outer), tuple(outer)


def _four_dimensional(tensor: Tensor, leading: tuple[int, ...]) -> Tensor:
    """``tensor`` with its leading dimensions broadcast to ``leading`` and folded into two."""
    if len(leading) == 2:
        if tensor.shape[:-2] == leading:
            return tensor
        return tensor.expand(*leading, *tensor.shape[-2:])
    tensor = tensor.expand(*leading, *tensor.shape[-2:])
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


class _Problem(NamedTuple):
    """The checked call with four-dimensional operands."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    options: Options
    leading: tuple[int, ...]  # of the result, as the caller has them


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    attn_mask: Tensor | None,
    enable_gqa: bool,
    is_causal: bool,
    **options,
) -> _Problem:
    check.boolean("enable_gqa", enable_gqa)
    common.check_operands(query, key, value, enable_gqa)
    if enable_gqa and value is not None and key.size(-3) != value.size(-3):
        heads = query.size(-3)
        key = key.repeat_interleave(heads // key.size(-3), dim=-3)
        value = value.repeat_interleave(heads // value.size(-3), dim=-3)
    value_shape = None if value is None else value.shape
    leading, shared_leading = _leading(query.shape, key.shape, value_shape, enable_gqa)
    checked = common.options_of(query, leading, is_causal=is_causal, **options)
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask must be None when is_causal is True")
        common.check_mask(attn_mask, query, (*leading, query.size(-2), key.size(-2)))
        checked = checked._replace(attn_mask=_four_dimensional_mask(attn_mask, leading))
    return _Problem(
        _four_dimensional(query, leading),
        _four_dimensional(key, shared_leading),
        None if value is None else _four_dimensional(value, shared_leading),
        checked,
        leading,
    )


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
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * query key^T + mask) value`` without holding the matrix of weights.

    Semantics of :func:`torch.nn.functional.scaled_dot_product_attention`. The online softmax is
    that of Milakov and Gimelshein 2018 as FlashAttention (Dao et al. 2022) tiles it. The score of
    query i and key j is ``scale * q_i . k_j``, then ``softcap * tanh(s / softcap)``, then
    ``- slope * |i - j| + mask``.

    Args:
        query: ``(..., Hq, Sq, D)``, with any number of leading dimensions including none; float32,
            bfloat16, float16 or float64. Or jagged nested tensors, all three: see
            :func:`fmkernels.functional.varlen_attention`.
        key: ``(..., Hkv, Sk, D)``.
        value: ``(..., Hkv, Sk, Dv)``. The leading dimensions of the three broadcast.
        attn_mask: broadcastable to ``(..., Hq, Sq, Sk)``; bool (True: take part), the query's
            dtype or float32 (added to the scaled scores; may require a gradient). Not together
            with ``is_causal``.
        dropout_p: probability of zeroing a weight. As in torch it is applied whenever it is
            positive: pass 0 in evaluation. The weights kept are a function of one seed drawn from
            torch's default generator, given in ``fmkernels/ops/_dropout.py``.
        is_causal: query i sees keys 0..i (aligned at the top left when Sq and Sk differ).
        scale: factor on the scores; None means ``1 / sqrt(D)``.
        enable_gqa: key and value may have fewer heads than the query, a divisor of its number.
        window: ``(left, right)``, the keys that query i sees before and after key i; -1: all.
        softcap: bound on the scores (Gemma 2), positive.
        alibi_slopes: ``(Hq,)`` or ``(..., Hq)``: ALiBi (Press et al. 2022).
        sinks: ``(Hq,)``, one more logit in each row's softmax, without a value.
        return_lse: also return the logarithm of the softmax's denominator.
        backend: ``"auto"``, ``"cpu"`` or ``"reference"``; None takes the surrounding
            :class:`fmkernels.use_backend`.

    Returns:
        output ``(..., Hq, Sq, Dv)``; with ``return_lse`` a tuple ``(output, lse)``, lse
        ``(..., Hq, Sq)`` in float32 (float64 for float64), natural logarithm, sink included. A
        query that sees no key has output 0, lse -inf (or the sink), and passes no gradient to
        query, key and value. Differentiable once, with respect to every floating-point tensor and
        through both results.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    if (
        type(return_lse) is bool
        and type(dropout_p) is float
        and dropout_p == 0.0
        and enable_gqa is False
        and window is softcap is alibi_slopes is sinks is None
    ):
        results = quick.attention(
            query, key, value, attn_mask, is_causal, scale, return_lse, backend
        )
        if results is not None:
            return results if return_lse else results[0]
    check.boolean("return_lse", return_lse)
    options = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
    }
    if isinstance(query, Tensor) and query.is_nested:
        if attn_mask is not None:
            raise ValueError("attn_mask must be None for nested tensors")
        return nested_attention(
            query, key, value, heads_first=True, return_lse=return_lse, backend=backend, **options
        )
    problem = _problem(query, key, value, attn_mask, **options)
    output, lse = autograd.attention(
        problem.query, problem.key, problem.value, problem.options, backend
    )
    if len(problem.leading) != 2:
        output = output.reshape(*problem.leading, *output.shape[-2:])
        lse = lse.reshape(*problem.leading, lse.size(-1))
    return (output, lse) if return_lse else output


class AttentionStatistics(NamedTuple):
    """What :func:`attention_statistics` returns, each ``(..., Hq, Sq)``.

    Attributes:
        entropy: of the row's softmax in nats; the sink counts as an outcome.
        top_key: int64 index of the key of the largest weight, the first of equals; -1 where no
            key is visible.
        top_weight: that weight.
        lse: as :func:`scaled_dot_product_attention` returns it.
    """

    entropy: Tensor
    top_key: Tensor
    top_weight: Tensor
    lse: Tensor


def attention_statistics(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> AttentionStatistics:
    """Where each query of :func:`scaled_dot_product_attention` looks, and how sharply.

    Takes that function's arguments, without values and dropout, and holds no matrix of weights
    either. Not differentiable.

    Returns:
        :class:`AttentionStatistics`; float32 (float64 for float64).

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    problem = _problem(
        query,
        key,
        None,
        attn_mask,
        enable_gqa,
        is_causal,
        scale=scale,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    results = autograd.statistics(problem.query, problem.key, problem.options, backend)
    if len(problem.leading) != 2:
        results = (t.reshape(*problem.leading, t.size(-1)) for t in results)
    return AttentionStatistics(*results)


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    average: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`scaled_dot_product_attention` that also returns the weights it otherwise never holds.

    Takes that function's arguments, but no nested tensors.

    Args:
        average: return the mean of the weights over the heads, of which there must be at least
            one. The kernels then hold no weights of single heads; only Triton's gradient through
            the mean takes PyTorch's operators, and does.

    Returns:
        output ``(..., Hq, Sq, Dv)`` and weights ``(..., Hq, Sq, Sk)``, with ``average``
        ``(..., Sq, Sk)``, in the query's dtype and after dropout; 0 where a query does not see the
        key. Differentiable once, with respect to every floating-point tensor and through both
        results.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    if (
        type(average) is bool
        and type(dropout_p) is float
        and dropout_p == 0.0
        and enable_gqa is False
        and window is softcap is alibi_slopes is sinks is None
    ):
        results = quick.attention_with_weights(
            query, key, value, attn_mask, is_causal, scale, average, backend
        )
        if results is not None:
            return results
    check.boolean("average", average)
    problem = _problem(
        query,
        key,
        value,
        attn_mask,
        enable_gqa,
        is_causal,
        dropout_p=dropout_p,
        scale=scale,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    leading = problem.leading
    if average and (not leading or leading[-1] == 0):
        raise ValueError(f"query must have heads to average over, got {check.describe(query)}")
    output, weights = autograd.attention_with_weights(
        problem.query, problem.key, problem.value, problem.options, average, backend
    )
    if len(leading) != 2:
        output = output.reshape(*leading, *output.shape[-2:])
        weights = weights.reshape(*(leading[:-1] if average else leading), *weights.shape[-2:])
    return output, weights
