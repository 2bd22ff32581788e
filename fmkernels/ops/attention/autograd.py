"""Differentiable attention: chooses the backend, applies autocast, records the graph if needed."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import select
from fmkernels.ops import _dropout
from fmkernels.ops._activations import opmath_dtype
from fmkernels.ops._autocast import autocast_off
from fmkernels.ops._autograd import cast_for_autocast, needs_graph, once_differentiable
from fmkernels.ops.attention.backends import APPEND, CACHED, SDPA, STATISTICS, WEIGHTS
from fmkernels.ops.attention.schema import Options

# In messages and decisions.
OP_NAME, WEIGHTS_OP_NAME = "scaled_dot_product_attention", "attention_with_weights"

_FIELDS = len(Options._fields)
_TENSOR_OPTIONS = 6
_DIFFERENTIABLE_OPTIONS = 3  # attn_mask, alibi_slopes, sinks


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, query, key, value, *options):
        output, lse = SDPA[backend].forward(query, key, value, *options)
        options = Options(*options)
        ctx.save_for_backward(query, key, value, output, lse, *options[:_TENSOR_OPTIONS])
        ctx.set_materialize_grads(False)
        ctx.numbers = options[_TENSOR_OPTIONS:]
        ctx.backend = backend
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_lse):
        if grad_output is None and grad_lse is None:
            return (None,) * (4 + _FIELDS)
        query, key, value, output, lse, *tensor_options = ctx.saved_tensors
        needed = ctx.needs_input_grad[1 : 4 + _DIFFERENTIABLE_OPTIONS]
        grad_output = torch.zeros_like(output) if grad_output is None else unit_stride(grad_output)
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        with autocast_off(query.device.type):
            grads = SDPA[ctx.backend].backward(
                grad_output,
                grad_lse,
                query,
                key,
                value,
                output,
                lse,
                *tensor_options,
                *ctx.numbers,
                *needed,
            )
        return (
            None,
            *(grad if need else None for grad, need in zip(grads, needed, strict=True)),
            *(None,) * (_FIELDS - _DIFFERENTIABLE_OPTIONS),
        )


class _AttentionWithWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, average, query, key, value, *options):
        output, weights, lse = WEIGHTS[backend].forward(query, key, value, *options, average)
        options = Options(*options)
        ctx.save_for_backward(query, key, value, output, lse, *options[:_TENSOR_OPTIONS])
        ctx.set_materialize_grads(False)
        ctx.numbers = options[_TENSOR_OPTIONS:]
        ctx.backend, ctx.average = backend, average
        return output, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_weights):
        if grad_output is None and grad_weights is None:
            return (None,) * (5 + _FIELDS)
        query, key, value, output, lse, *tensor_options = ctx.saved_tensors
        needed = ctx.needs_input_grad[2 : 5 + _DIFFERENTIABLE_OPTIONS]
        grad_output = torch.zeros_like(output) if grad_output is None else unit_stride(grad_output)
        inputs = (query, key, value, output, lse, *tensor_options, *ctx.numbers)
        with autocast_off(query.device.type):
            if grad_weights is None:
                grads = SDPA[ctx.backend].backward(grad_output, None, *inputs, *needed)
            else:
                grads = WEIGHTS[ctx.backend].backward(
                    grad_output, grad_weights, *inputs, ctx.average, *needed
                )
        return (
            None,
            None,
            *(grad if need else None for grad, need in zip(grads, needed, strict=True)),
            *(None,) * (_FIELDS - _DIFFERENTIABLE_OPTIONS),
        )


def unit_stride(tensor: Tensor) -> Tensor:
    """``tensor``, copied only if its last dimension is not adjacent in memory."""
    if tensor.stride(-1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, each a Python object of its own: torch.compile traces no Function otherwise."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    seen: list[Tensor] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in seen)
        seen.append(tensor.view(tensor.shape) if again else tensor)
    return seen


def _prepared(
    query: Tensor, key: Tensor, value: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Options]:
    """The operands in autocast's dtype, the small options in lse's, and a seed for dropout."""
    query, key, value, mask = cast_for_autocast(query, key, value, options.attn_mask)
    if mask is not options.attn_mask:
        options = options._replace(attn_mask=mask)
    if options.alibi_slopes is not None or options.sinks is not None:
        slopes, sinks = (
            None if tensor is None else tensor.to(opmath_dtype(query.dtype)).contiguous()
            for tensor in (options.alibi_slopes, options.sinks)
        )
        options = options._replace(alibi_slopes=slopes, sinks=sinks)
    if options.dropout_p > 0.0:
        options = options._replace(dropout_seed=_dropout.new_seed(query.device))
    return query, key, value, options


def attention(
    query: Tensor, key: Tensor, value: Tensor, options: Options, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Attention on checked, four-dimensional arguments; shapes as in schema.py, any strides.

    Args:
        options: alibi_slopes and sinks of any floating dtype; the seed is drawn here.
        backend: as in :func:`fmkernels._dispatch.select`.

    Returns:
        output ``(B, Hq, Sq, Dv)`` and lse ``(B, Hq, Sq)``.
    """
    query, key, value, options = _prepared(query, key, value, options)
    name, _ = select(OP_NAME, SDPA, backend, query, options)
    with autocast_off(query.device.type):
        return run(name, query, key, value, options)


def run(
    backend: str, query: Tensor, key: Tensor, value: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """:func:`attention` by that backend, which has been found to serve it, without autocast."""
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    if needs_graph(query, key, value, *options[:_DIFFERENTIABLE_OPTIONS]):
        operands = _distinct(query, key, value, *options[:_TENSOR_OPTIONS])
        return _Attention.apply(backend, *operands, *options[_TENSOR_OPTIONS:])
    return SDPA[backend].forward(query, key, value, *options)


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    average: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`attention`, returning output and the weights as ``sdpa_weights`` does."""
    query, key, value, options = _prepared(query, key, value, options)
    name, _ = select(WEIGHTS_OP_NAME, WEIGHTS, backend, query, options)
    with autocast_off(query.device.type):
        return run_with_weights(name, query, key, value, options, average)


def run_with_weights(
    backend: str, query: Tensor, key: Tensor, value: Tensor, options: Options, average: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`run`, for :func:`attention_with_weights`."""
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    if needs_graph(query, key, value, *options[:_DIFFERENTIABLE_OPTIONS]):
        operands = _distinct(query, key, value, *options[:_TENSOR_OPTIONS])
        return _AttentionWithWeights.apply(backend, average, *operands, *options[_TENSOR_OPTIONS:])
    output, weights, _ = WEIGHTS[backend].forward(query, key, value, *options, average)
    return output, weights


@torch.no_grad()
def statistics(
    query: Tensor, key: Tensor, options: Options, backend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entropy, top key, top weight and lse of each query, as ``sdpa_statistics`` returns them."""
    query, key, _, options = _prepared(query, key, key, options)
    _, implementation = select("attention_statistics", STATISTICS, backend, query, options)
    with autocast_off(query.device.type):
        return implementation.forward(unit_stride(query), unit_stride(key), *options)


def cached(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    new: tuple[Tensor, Tensor] | None,
    seqlens: Tensor,
    page_table: Tensor | None,
    options: Options,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Appends ``new`` (key and value) to the caches, if given, and attends to what they hold.

    Args:
        seqlens: int32 ``(B,)``, the lengths before appending.
        options: of which the op ``sdpa_cached`` takes what it takes.

    Returns:
        output ``(B, Hq, Sq, Dv)`` and lse ``(B, Hq, Sq)``.
    """
    # The caches are written to, so it is the query that takes their dtype under autocast.
    query, dtype = query.to(key_cache.dtype), opmath_dtype(key_cache.dtype)
    slopes, sinks = (
        None if tensor is None else tensor.to(dtype).contiguous()
        for tensor in (options.alibi_slopes, options.sinks)
    )
    name, implementation = select(
        "attention_with_kv_cache",
        CACHED,
        backend,
        query,
        key_cache,
        value_cache,
        page_table is not None,
        options,
    )
    with autocast_off(query.device.type), torch.no_grad():
        if new is not None:
            key, value = (unit_stride(tensor.to(key_cache.dtype)) for tensor in new)
            APPEND[name](key_cache, value_cache, key, value, seqlens, page_table)
            seqlens = seqlens + key.size(2)
        return implementation.forward(
            unit_stride(query),
            key_cache,
            value_cache,
            seqlens,
            page_table,
            slopes,
            sinks,
            options.window_left,
            options.window_right,
            options.scale,
            options.softcap,
        )
