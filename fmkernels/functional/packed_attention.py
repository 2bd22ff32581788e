"""Attention within sequences of different lengths, packed end to end without padding."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels import _checks as check
from fmkernels.functional import _attention_options as common
from fmkernels.ops.attention import autograd


def _check_offsets(name: str, offsets: Tensor, total: int, query: Tensor) -> Tensor:
    """``offsets`` as int32; values are checked where that costs no wait for another device."""
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {check.describe(offsets)}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {check.describe(offsets)}")
    check.rank(name, offsets, 1)
    check.not_empty(name, offsets)
    if offsets.device != query.device:
        raise RuntimeError(
            f"{name} must be on the device of query ({query.device}), "
            f"got {check.describe(offsets)}"
        )
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        values = offsets.tolist()
        ordered = all(a <= b for a, b in zip(values, values[1:], strict=False))
        if values[0] != 0 or values[-1] != total or not ordered:
            raise ValueError(f"{name} must rise from 0 to the {total} packed rows, got {values}")
    return offsets.to(torch.int32).contiguous()


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
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
    """:func:`~fmkernels.functional.scaled_dot_product_attention` in each of several sequences.

    Queries and keys of sequence n are rows ``cu_seqlens[n] .. cu_seqlens[n + 1] - 1``; positions
    (is_causal, window, alibi_slopes) count from the start of each sequence: aligned at the top
    left.

    Args:
        query: ``(total_q, Hq, D)``, or a jagged nested tensor ``(B, j, Hq, D)``.
        key: ``(total_k, Hkv, D)``; value: ``(total_k, Hkv, Dv)``; likewise nested.
        cu_seqlens_q: int32 or int64 ``(sequences + 1,)``, rising from 0 to total_q. None for
            nested tensors, which bring their own.
        cu_seqlens_k: the same for key and value; None means cu_seqlens_q.
        alibi_slopes: ``(Hq,)`` or ``(sequences, Hq)``.

    The other arguments are those of ``scaled_dot_product_attention``. On devices other than the
    CPU, and under torch.compile, the values of the offsets are not checked.

    Returns:
        output ``(total_q, Hq, Dv)``, nested as the query is; with ``return_lse`` also lse
        ``(Hq, total_q)``.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    check.boolean("return_lse", return_lse)
    check.boolean("enable_gqa", enable_gqa)
    options = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
    }
    if isinstance(query, Tensor) and query.is_nested:
        for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if offsets is not None:
                raise ValueError(f"{name} must be None for nested tensors")
        return nested_attention(
            query,
            key,
            value,
            heads_first=False,
            enable_gqa=enable_gqa,
            return_lse=return_lse,
            backend=backend,
            **options,
        )
    operands = (("query", query), ("key", key), ("value", value))
    for name, operand in operands:
        check.tensor(name, operand)
        check.rank(name, operand, 3)
    query, key, value = (operand.transpose(0, 1) for _, operand in operands)
    common.check_operands(query, key, value, enable_gqa)
    heads = query.size(0)
    for name, operand in (("key", key), ("value", value)):
        if not enable_gqa and operand.size(0) != heads:
            raise ValueError(
                f"{name} must have the query's {heads} heads unless enable_gqa, "
                f"got {operand.size(0)}"
            )
    if value.size(0) != key.size(0):
        raise ValueError(f"value must have the key's {key.size(0)} heads, got {value.size(0)}")
    offsets_q = _check_offsets("cu_seqlens_q", cu_seqlens_q, query.size(1), query)
    if cu_seqlens_k is None:
        if key.size(1) != query.size(1):
            raise ValueError("cu_seqlens_k must be given where key and query differ in length")
        offsets_k = offsets_q
    else:
        offsets_k = _check_offsets("cu_seqlens_k", cu_seqlens_k, key.size(1), query)
        check.shape("cu_seqlens_k", offsets_k, offsets_q.shape, "that of cu_seqlens_q")
    sequences = offsets_q.size(0) - 1
    checked = common.options_of(query, (sequences, heads), **options)
    output, lse = autograd.attention(
        query.unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        checked._replace(cu_seqlens_q=offsets_q, cu_seqlens_k=offsets_k),
        backend,
    )
    output = output.squeeze(0).transpose(0, 1)
    return (output, lse.squeeze(0)) if return_lse else output


def nested_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads_first: bool,
    return_lse: bool,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`varlen_attention` on jagged nested tensors.

    Args:
        heads_first: they are ``(B, H, j, D)``, the transpose of the jagged ``(B, j, H, D)``.
        options: those of :func:`varlen_attention`; lse is returned packed, ``(Hq, total_q)``.
    """
    packed = []
    for name, operand in (("query", query), ("key", key), ("value", value)):
        if not isinstance(operand, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {check.describe(operand)}")
        if not operand.is_nested or operand.layout is not torch.jagged or operand.dim() != 4:
            raise ValueError(
                f"{name} must be a nested tensor of layout torch.jagged with 4 dimensions, "
                "as the query is"
            )
        if heads_first:
            operand = operand.transpose(1, 2)
        if operand._ragged_idx != 1 or operand.lengths() is not None:
            raise ValueError(f"{name} must be jagged in its positions, without holes")
        packed.append(operand)
    query, key, value = packed
    result = varlen_attention(
        *(operand.values() for operand in packed),
        query.offsets(),
        key.offsets(),
        return_lse=return_lse,
        **options,
    )
    output = torch.nested.nested_tensor_from_jagged(
        result[0] if return_lse else result, query.offsets()
    )
    if heads_first:
        output = output.transpose(1, 2)
    return (output, result[1]) if return_lse else output
