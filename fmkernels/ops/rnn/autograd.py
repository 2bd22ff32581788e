"""Differentiable LSTM: chooses the backend, applies autocast, stacks the layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmkernels._dispatch import select
from fmkernels.ops._autocast import autocast_off
from fmkernels.ops._autograd import cast_for_autocast, needs_graph
from fmkernels.ops.rnn.backends import LSTM


class _LSTMLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, h0, c0, packed_weight, batch_first, backend, *weights):
        output, h_n, c_n, gates, cells = LSTM[backend].forward(
            input, h0, c0, list(weights), packed_weight, batch_first, True
        )
        ctx.save_for_backward(input, h0, c0, output, gates, cells, *weights)
        ctx.set_materialize_grads(False)
        ctx.batch_first = batch_first
        ctx.backend = backend
        return output, h_n, c_n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_h_n, grad_c_n):
        input, h0, c0, output, gates, cells, *weights = ctx.saved_tensors
        if grad_output is None and grad_h_n is None and grad_c_n is None:
            return (None,) * (6 + len(weights))
        need_input, need_h0, need_c0 = ctx.needs_input_grad[:3]
        need_each_weight = ctx.needs_input_grad[6:]
        with autocast_off(input.device.type):
            grad_input, grad_h0, grad_c0, grad_weights = LSTM[ctx.backend].backward(
                _dense_or_zeros(grad_output, output),
                _dense_or_zeros(grad_h_n, h0),
                _dense_or_zeros(grad_c_n, c0),
                input,
                h0,
                c0,
                weights,
                output,
                gates,
                cells,
                ctx.batch_first,
                need_input,
                need_h0 or need_c0,
                any(need_each_weight),
            )
        return (
            grad_input if need_input else None,
            grad_h0 if need_h0 else None,
            grad_c0 if need_c0 else None,
            None,
            None,
            None,
            *(g if need else None for g, need in zip(grad_weights, need_each_weight, strict=True)),
        )


def _dense_or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad.contiguous()


def _layer(
    name: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    packed_weight: Tensor | None,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer on the chosen backend; shapes as in schema.py, any strides."""
    if input.stride(-1) != 1:
        input = input.contiguous()
    h0, c0 = h0.contiguous(), c0.contiguous()
    weights = [weight.contiguous() for weight in weights]
    if needs_graph(input, h0, c0, *weights):
        return _LSTMLayer.apply(input, h0, c0, packed_weight, batch_first, name, *weights)
    return LSTM[name].forward(input, h0, c0, weights, packed_weight, batch_first, False)[:3]


def _dropout(input: Tensor, p: float, batch_first: bool) -> Tensor:
    """Dropout whose mask is drawn in time-first order, so that torch's seed gives torch's mask."""
    if not batch_first:
        return F.dropout(input, p)
    batch, steps, features = input.shape
    return input * F.dropout(input.new_ones(steps, batch, features), p).transpose(0, 1)


def lstm(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    layers: Sequence[Sequence[Tensor]],
    packed_weights: Sequence[Tensor | None],
    batch_first: bool,
    dropout: float,
    training: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of LSTM layers on checked arguments.

    Args:
        input: ``(T, B, I)`` or ``(B, T, I)``.
        h0, c0: ``(layers * D, B, H)``.
        layers: per layer the weights of all its directions, in the order of the op.
        packed_weights: per layer the result of the pack op or None; ignored where autocast casts.
        dropout: probability of zeroing a feature between two layers while ``training``.
        backend: as in :func:`fmkernels._dispatch.select`.

    Returns:
        output, h_n, c_n. Under autocast all three have its dtype, as torch's LSTM has.
    """
    device_type = input.device.type
    raw_weight = layers[0][0]
    input, h0, c0 = cast_for_autocast(input, h0, c0)
    layers = [cast_for_autocast(*weights) for weights in layers]
    if layers[0][0] is not raw_weight:
        packed_weights = [None] * len(layers)
    name, _ = select("lstm", LSTM, backend, input)
    directions = h0.size(0) // len(layers)
    hiddens, cells = [], []
    with autocast_off(device_type):
        for index, weights in enumerate(layers):
            if index > 0 and dropout > 0.0 and training:
                input = _dropout(input, dropout, batch_first)
            own = slice(index * directions, (index + 1) * directions)
            input, h_n, c_n = _layer(
                name, input, h0[own], c0[own], weights, packed_weights[index], batch_first
            )
            hiddens.append(h_n)
            cells.append(c_n)
    if len(layers) == 1:
        return input, hiddens[0], cells[0]
    return input, torch.cat(hiddens), torch.cat(cells)


def pack_lstm_weights(
    weights: Sequence[Tensor], has_biases: bool, backend: str | None
) -> Tensor | None:
    """One layer's weights as the chosen backend wants them, or None if it packs nothing."""
    _, implementation = select("lstm", LSTM, backend, weights[0])
    if implementation.pack is None:
        return None
    with torch.no_grad():
        return implementation.pack([weight.contiguous() for weight in weights], has_biases)


def lstm_cell(
    input: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor], backend: str | None
) -> tuple[Tensor, Tensor]:
    """One step: input ``(B, I)``, h and c ``(B, H)``, weights of one direction.

    Under autocast the step is taken in the widest dtype of its operands instead of a half
    precision, and returned in the state's own dtype, as torch returns it: a state that is rounded
    at every call loses what a long recurrence accumulates in it.
    """
    device_type = input.device.type
    state_dtype = c.dtype
    if torch.is_autocast_enabled(device_type):
        state_dtype = torch.promote_types(c.dtype, torch.get_autocast_dtype(device_type))
        dtype = state_dtype
        for tensor in (input, h, *weights):
            dtype = torch.promote_types(dtype, tensor.dtype)
        input, h, c = input.to(dtype), h.to(dtype), c.to(dtype)
        weights = [weight.to(dtype) for weight in weights]
    name, _ = select("lstm_cell", LSTM, backend, input)
    with autocast_off(device_type):
        _, h_n, c_n = _layer(
            name, input.unsqueeze(0), h.unsqueeze(0), c.unsqueeze(0), weights, None, False
        )
    return h_n.squeeze(0).to(state_dtype), c_n.squeeze(0).to(state_dtype)
