"""Differentiable recurrent layers: choose the backend, apply autocast, stack the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmkernels._dispatch import Backend, autocast_enabled, select
from fmkernels.ops._autocast import autocast_off
from fmkernels.ops._autograd import cast_for_autocast, distinct, needs_graph
from fmkernels.ops.rnn.backends import GRU, LSTM, RNN
from fmkernels.ops.rnn.schema import (
    CELL_STATES,
    LENGTHS,
    MASKS,
    PLAIN_LSTM,
    PROJECTION,
    LSTMOptions,
    Sizes,
)

# What the kinds of layer other than the LSTM hand to their ops besides tensors: nothing for the
# GRU, the nonlinearity for the RNN.
Extra = tuple[Any, ...]
NO_MASKS = (None,) * 4


class _LSTMLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, h0, c0, packed_weight, masks, options, batch_first, return_cells, backend,
        *weights,
    ):  # fmt: skip
        output, h_n, c_n, cell_states, saved = LSTM[backend].forward(
            input, h0, c0, list(weights), packed_weight, *masks, *options, batch_first,
            return_cells, True,
        )  # fmt: skip
        ctx.save_for_backward(input, h0, c0, output, *masks, *weights, *saved)
        ctx.set_materialize_grads(False)
        ctx.arguments = (options, batch_first, return_cells, backend, len(weights))
        return output, h_n, c_n, cell_states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_h_n, grad_c_n, grad_cells):
        options, batch_first, return_cells, backend, count = ctx.arguments
        grads = (grad_output, grad_h_n, grad_c_n, grad_cells)
        if all(grad is None for grad in grads):
            return (None,) * (9 + count)
        input, h0, c0, output, *rest = ctx.saved_tensors
        masks, weights, saved = rest[:4], rest[4 : 4 + count], rest[4 + count :]
        need_input, need_h0, need_c0 = ctx.needs_input_grad[:3]
        need_each_weight = ctx.needs_input_grad[9:]
        with autocast_off(input.device.type):
            grad_input, grad_h0, grad_c0, grad_weights = LSTM[backend].backward(
                _dense_or_zeros(grad_output, output),
                _dense_or_zeros(grad_h_n, h0),
                _dense_or_zeros(grad_c_n, c0),
                grad_cells.contiguous() if return_cells and grad_cells is not None else None,
                input, h0, c0, weights, output, saved, *masks, *options, batch_first,
                need_input, need_h0 or need_c0, any(need_each_weight),
            )  # fmt: skip
        return (
            grad_input if need_input else None,
            grad_h0 if need_h0 else None,
            grad_c0 if need_c0 else None,
            *(None,) * 6,
            *_wanted(grad_weights, need_each_weight),
        )


class _GRULayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, h0, packed_weight, lengths, extra, has_biases, batch_first, backend, *weights
    ):
        output, h_n, gates = GRU[backend].forward(
            input, h0, list(weights), packed_weight, lengths, has_biases, batch_first, True
        )
        ctx.save_for_backward(input, h0, output, gates, lengths, *weights)
        ctx.set_materialize_grads(False)
        ctx.arguments = (has_biases, batch_first, backend)
        return output, h_n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_h_n):
        has_biases, batch_first, backend = ctx.arguments
        input, h0, output, gates, lengths, *weights = ctx.saved_tensors
        return _simple_backward(
            ctx, grad_output, grad_h_n, input, h0, output, weights,
            lambda *grads_and_operands: GRU[backend].backward(
                *grads_and_operands, gates, lengths, has_biases, batch_first, *_needs(ctx)
            ),
        )  # fmt: skip


class _RNNLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input, h0, packed_weight, lengths, extra, has_biases, batch_first, backend, *weights
    ):
        output, h_n = RNN[backend].forward(
            input, h0, list(weights), packed_weight, lengths, *extra, has_biases, batch_first
        )
        ctx.save_for_backward(input, h0, output, lengths, *weights)
        ctx.set_materialize_grads(False)
        ctx.arguments = (extra, has_biases, batch_first, backend)
        return output, h_n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_h_n):
        extra, has_biases, batch_first, backend = ctx.arguments
        input, h0, output, lengths, *weights = ctx.saved_tensors
        return _simple_backward(
            ctx, grad_output, grad_h_n, input, h0, output, weights,
            lambda *grads_and_operands: RNN[backend].backward(
                *grads_and_operands, lengths, *extra, has_biases, batch_first, *_needs(ctx)
            ),
        )  # fmt: skip


def _needs(ctx) -> tuple[bool, bool, bool]:
    """Whether the op is to compute the gradients of input, initial state and weights."""
    needs = ctx.needs_input_grad
    return needs[0], needs[1], any(needs[8:])


def _simple_backward(ctx, grad_output, grad_h_n, input, h0, output, weights, run):
    """The backward of a layer with one state, but for the call of the op."""
    if grad_output is None and grad_h_n is None:
        return (None,) * (8 + len(weights))
    with autocast_off(input.device.type):
        grad_input, grad_h0, grad_weights = run(
            _dense_or_zeros(grad_output, output), _dense_or_zeros(grad_h_n, h0), input, h0,
            weights, output,
        )  # fmt: skip
    return (
        grad_input if ctx.needs_input_grad[0] else None,
        grad_h0 if ctx.needs_input_grad[1] else None,
        *(None,) * 6,
        *_wanted(grad_weights, ctx.needs_input_grad[8:]),
    )


def _wanted(grads: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(grad if need else None for grad, need in zip(grads, needed, strict=True))


def _dense_or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad.contiguous()


def _rows_contiguous(input: Tensor) -> Tensor:
    return input if input.stride(-1) == 1 else input.contiguous()


def lstm_layer(
    name: str,
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    packed_weight: Tensor | None,
    masks: tuple[Tensor | None, ...],
    options: LSTMOptions,
    batch_first: bool,
    return_cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer on the chosen backend; shapes as in schema.py, any strides."""
    input, h0, c0 = _rows_contiguous(input), h0.contiguous(), c0.contiguous()
    weights = [weight.contiguous() for weight in weights]
    if needs_graph(input, h0, c0, *weights):
        return _LSTMLayer.apply(
            input, h0, c0, packed_weight, masks, options, batch_first, return_cells, name, *weights
        )
    return LSTM[name].forward(
        input, h0, c0, weights, packed_weight, *masks, *options, batch_first, return_cells, False
    )[:4]


def _gru_layer(
    name, input, h0, weights, packed_weight, lengths, extra: Extra, has_biases, batch_first
) -> tuple[Tensor, Tensor]:
    input, h0 = _rows_contiguous(input), h0.contiguous()
    weights = [weight.contiguous() for weight in weights]
    if needs_graph(input, h0, *weights):
        return _GRULayer.apply(
            input, h0, packed_weight, lengths, extra, has_biases, batch_first, name, *weights
        )
    return GRU[name].forward(
        input, h0, weights, packed_weight, lengths, has_biases, batch_first, False
    )[:2]


def _rnn_layer(
    name, input, h0, weights, packed_weight, lengths, extra: Extra, has_biases, batch_first
) -> tuple[Tensor, Tensor]:
    input, h0 = _rows_contiguous(input), h0.contiguous()
    weights = [weight.contiguous() for weight in weights]
    if needs_graph(input, h0, *weights):
        return _RNNLayer.apply(
            input, h0, packed_weight, lengths, extra, has_biases, batch_first, name, *weights
        )
    return RNN[name].forward(
        input, h0, weights, packed_weight, lengths, *extra, has_biases, batch_first
    )


# kind: its backends, and what runs one layer of it
SIMPLE: dict[str, tuple[dict[str, Backend], Callable[..., tuple[Tensor, Tensor]]]] = {
    "gru": (GRU, _gru_layer),
    "rnn": (RNN, _rnn_layer),
}


def _dropout(input: Tensor, p: float, batch_first: bool) -> Tensor:
    """Dropout whose mask is drawn in time-first order, so that torch's seed gives torch's mask."""
    if not batch_first:
        return F.dropout(input, p)
    batch, steps, features = input.shape
    return input * F.dropout(input.new_ones(steps, batch, features), p).transpose(0, 1)


def _cast_layers(
    layers: Sequence[Sequence[Tensor]], packed_weights: Sequence[Tensor | None]
) -> tuple[list[Sequence[Tensor]], Sequence[Tensor | None]]:
    """The weights in autocast's dtype; a packed weight does not outlive a cast."""
    cast = [cast_for_autocast(*weights) for weights in layers]
    if cast[0][0] is not layers[0][0]:
        packed_weights = [None] * len(layers)
    return cast, packed_weights


def lstm(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    layers: Sequence[Sequence[Tensor]],
    packed_weights: Sequence[Tensor | None],
    lengths: Tensor | None,
    options: LSTMOptions,
    batch_first: bool,
    dropout: float,
    recurrent_dropout: float,
    training: bool,
    return_cells: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A stack of LSTM layers on checked arguments.

    Args:
        input: ``(T, B, I)`` or ``(B, T, I)``.
        h0: ``(layers * D, B, P)``.
        c0: ``(layers * D, B, H)``.
        layers: per layer the weights of all its directions, in the order of the op.
        packed_weights: per layer the result of the pack op or None; ignored where autocast casts.
        lengths: int64 ``(B)`` on the input's device, or None.
        options: of the op; in ``training``, zoneout draws masks.
        dropout: probability of zeroing a feature between two layers while ``training``.
        recurrent_dropout: probability of zeroing a feature of the hidden state on its way to w_hh,
            the same for all steps of a sequence, while ``training``.
        return_cells: whether the last layer returns its cell states.
        backend: as in :func:`fmkernels._dispatch.select`.

    Returns:
        output, h_n, c_n, cell states (empty unless asked for). Under autocast all have its dtype,
        as torch's LSTM has.
    """
    device_type = input.device.type
    input, h0, c0 = cast_for_autocast(input, h0, c0)
    layers, packed_weights = _cast_layers(layers, packed_weights)
    extras = () if lengths is None else (LENGTHS,)
    if h0.size(-1) != c0.size(-1):
        extras += (PROJECTION,)
    if training and (recurrent_dropout > 0.0 or options.zoneout > 0.0):
        extras += (MASKS,)
    if return_cells:
        extras += (CELL_STATES,)
    width = max(h0.size(-1), c0.size(-1))
    directions, steps = h0.size(0) // len(layers), input.size(1 if batch_first else 0)
    sizes = Sizes(steps, h0.size(1), c0.size(2), directions)
    name, _ = select("lstm", LSTM, backend, input, extras, options, width, sizes)
    hiddens, cells = [], []
    with autocast_off(device_type):
        for index, weights in enumerate(layers):
            own = slice(index * directions, (index + 1) * directions)
            first_h, first_c = h0[own], c0[own]
            masks: tuple[Tensor | None, ...] = (lengths, None, None, None)
            if training:
                if index > 0 and dropout > 0.0:
                    input = _dropout(input, dropout, batch_first)
                if recurrent_dropout > 0.0 or options.zoneout > 0.0:
                    masks = (
                        lengths,
                        *_masks(first_h, first_c, steps, recurrent_dropout, options.zoneout),
                    )
            last = index + 1 == len(layers)
            input, h_n, c_n, cell_states = lstm_layer(
                name, input, first_h, first_c, weights, packed_weights[index], masks, options,
                batch_first, return_cells and last,
            )  # fmt: skip
            hiddens.append(h_n)
            cells.append(c_n)
    if len(layers) == 1:
        return input, hiddens[0], cells[0], cell_states
    return input, torch.cat(hiddens), torch.cat(cells), cell_states


def _masks(
    h0: Tensor, c0: Tensor, steps: int, recurrent_dropout: float, zoneout: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Random recurrent mask ``(D, B, P)`` and zoneout masks ``(D, T, B, P)``, ``(D, T, B, H)``."""
    recurrent = None
    if recurrent_dropout > 0.0:
        recurrent = F.dropout(torch.ones_like(h0), recurrent_dropout)
    if zoneout == 0.0:
        return recurrent, None, None

    def kept(state: Tensor) -> Tensor:
        directions, batch, width = state.shape
        shape = (directions, steps, batch, width)
        return torch.rand(shape, device=state.device) < zoneout

    return recurrent, kept(h0), kept(c0)


def simple(
    kind: str,
    input: Tensor,
    h0: Tensor,
    layers: Sequence[Sequence[Tensor]],
    packed_weights: Sequence[Tensor | None],
    lengths: Tensor | None,
    extra: Extra,
    has_biases: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """A stack of layers with one state, ``kind`` being "gru" or "rnn"; arguments as for the LSTM.

    Returns:
        output, h_n.
    """
    backends, run_layer = SIMPLE[kind]
    device_type = input.device.type
    if kind == "gru" and autocast_enabled(device_type):
        # torch's GRU keeps its state, and so its results, in the widest dtype that it meets.
        _, dtype = _widest(h0, input, *layers[0])
        input, h0 = input.to(dtype), h0.to(dtype)
        if layers[0][0].dtype != dtype:
            packed_weights = [None] * len(layers)
        layers = [[weight.to(dtype) for weight in weights] for weights in layers]
    else:
        input, h0 = cast_for_autocast(input, h0)
        layers, packed_weights = _cast_layers(layers, packed_weights)
    directions, steps = h0.size(0) // len(layers), input.size(1 if batch_first else 0)
    sizes = Sizes(steps, h0.size(1), h0.size(2), directions)
    extras = () if lengths is None else (LENGTHS,)
    name, _ = select(kind, backends, backend, input, extras, PLAIN_LSTM, 0, sizes)
    hiddens = []
    with autocast_off(device_type):
        for index, weights in enumerate(layers):
            if index > 0 and dropout > 0.0 and training:
                input = _dropout(input, dropout, batch_first)
            own = slice(index * directions, (index + 1) * directions)
            input, h_n = run_layer(
                name, input, h0[own], weights, packed_weights[index], lengths, extra, has_biases,
                batch_first,
            )  # fmt: skip
            hiddens.append(h_n)
    return input, hiddens[0] if len(layers) == 1 else torch.cat(hiddens)


def pack_weights(
    kind: str,
    weights: Sequence[Tensor],
    directions: int,
    has_biases: bool,
    layer_norm: bool,
    backend: str | None,
) -> Tensor | None:
    """One layer's weights as the chosen backend wants them, or None if it packs nothing.

    ``kind`` is "lstm", "gru" or "rnn".
    """
    if kind == "lstm":
        projected = weights[1].size(0) != 4 * weights[1].size(1)
        flags = (has_biases, layer_norm)
        _, implementation = select(
            kind,
            LSTM,
            backend,
            weights[0],
            (PROJECTION,) if projected else (),
            LSTMOptions(has_biases, layer_norm=layer_norm),
        )
    else:
        flags = (has_biases,)
        _, implementation = select(kind, SIMPLE[kind][0], backend, weights[0])
    if implementation.pack is None:
        return None
    with torch.no_grad():
        return implementation.pack([w.contiguous() for w in weights], directions, *flags)


def _widest(state: Tensor, *others: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes that a cell returns and computes in under autocast."""
    returned = torch.promote_types(state.dtype, torch.get_autocast_dtype(state.device.type))
    computed = returned
    for tensor in others:
        computed = torch.promote_types(computed, tensor.dtype)
    return returned, computed


def lstm_cell(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Sequence[Tensor],
    packed_weight: Tensor | None,
    has_biases: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """One step: input ``(B, I)``, h and c ``(B, H)``, weights of one direction.

    Under autocast the step is taken in the widest dtype of its operands instead of a half
    precision, and returned in the state's own dtype, as torch returns it: a state that is rounded
    at every call loses what a long recurrence accumulates in it.
    """
    device_type = input.device.type
    state_dtype = c.dtype
    if autocast_enabled(device_type):
        state_dtype, dtype = _widest(c, input, h, *weights)
        input, h, c = input.to(dtype), h.to(dtype), c.to(dtype)
        weights, packed_weight = [weight.to(dtype) for weight in weights], None
    options = LSTMOptions(has_biases)
    name, _ = select("lstm_cell", LSTM, backend, input, (), options)
    lead, drop = _time(name)
    with autocast_off(device_type):
        _, h_n, c_n, _ = lstm_layer(
            name, lead(input), lead(h), distinct(lead(c), h), weights, packed_weight, NO_MASKS,
            options, False, False,
        )  # fmt: skip
    return drop(h_n).to(state_dtype), drop(c_n).to(state_dtype)


def _time(backend: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """What adds to a cell's operand the leading dimension that a backend wants, and removes it."""
    if backend == "cpu":  # wants none
        return (lambda tensor: tensor), (lambda tensor: tensor)
    return (lambda tensor: tensor.unsqueeze(0)), (lambda tensor: tensor.squeeze(0))


def simple_cell(
    kind: str,
    input: Tensor,
    h: Tensor,
    weights: Sequence[Tensor],
    packed_weight: Tensor | None,
    extra: Extra,
    has_biases: bool,
    backend: str | None,
) -> Tensor:
    """One step of a layer with one state; ``kind`` and dtypes as in the functions above."""
    backends, run_layer = SIMPLE[kind]
    device_type = input.device.type
    state_dtype = h.dtype
    if autocast_enabled(device_type):
        state_dtype, dtype = _widest(h, input, *weights)
        input, h = input.to(dtype), h.to(dtype)
        weights, packed_weight = [weight.to(dtype) for weight in weights], None
    name, _ = select(f"{kind}_cell", backends, backend, input)
    lead, drop = _time(name)
    with autocast_off(device_type):
        _, h_n = run_layer(
            name, lead(input), lead(h), weights, packed_weight, None, extra, has_biases, False
        )
    return drop(h_n).to(state_dtype)
