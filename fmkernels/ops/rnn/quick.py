"""The everyday call of a recurrent layer or cell: on the CPU, without autocast and random masks.

As fmkernels.ops._quick has it: checking each operand in Python takes longer than a short sequence
does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fmkernels.ops._autograd import needs_graph
from fmkernels.ops._quick import CLOSER_LOOK, is_ordinary
from fmkernels.ops.rnn.autograd import NO_MASKS, SIMPLE, Extra, lstm_layer
from fmkernels.ops.rnn.backends import LAYER, LSTM, STEP
from fmkernels.ops.rnn.schema import PLAIN_LSTM, LSTMOptions

_UNBIASED_LSTM = PLAIN_LSTM._replace(has_biases=False)
_CELLS = {kind: f"{kind}_cell" for kind in SIMPLE}


def _layers_of(
    weights: Sequence[Tensor], packed_weights: Sequence[Tensor | None] | None, num_layers: int
) -> list[tuple[list[Tensor], Tensor | None]] | None:
    """Each layer's weights and what was packed from them; None if they cannot be divided."""
    if packed_weights is None:
        packed_weights = (None,) * num_layers
    count, rest = divmod(len(weights), num_layers)
    if rest or not isinstance(packed_weights, (tuple, list)) or len(packed_weights) != num_layers:
        return None
    if num_layers == 1:
        return [(list(weights), packed_weights[0])]
    return [
        (list(weights[i * count : (i + 1) * count]), packed)
        for i, packed in enumerate(packed_weights)
    ]


def _run_stack(
    input: Tensor,
    states: Sequence[Tensor | None],
    layers: list[tuple[list[Tensor], Tensor | None]],
    directions: int,
    run_layer: Callable[..., tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """``run_layer(is_last, input, states, weights, packed_weight)`` of one layer after the other:
    what the last one returns, with the final states of all."""
    if len(layers) == 1:
        return run_layer(True, input, states, *layers[0])
    finals: list[list[Tensor]] = [[] for _ in states]
    for index, (weights, packed) in enumerate(layers):
        at = slice(index * directions, (index + 1) * directions)
        is_last = index + 1 == len(layers)
        own = [None if state is None else state[at] for state in states]
        input, *rest = run_layer(is_last, input, own, weights, packed)
        for parts, final in zip(finals, rest, strict=False):
            parts.append(final)
    return (input, *(torch.cat(parts) for parts in finals), *rest[len(states) :])


def _infer(
    kind: str,
    input: Tensor,
    states: Sequence[Tensor | None],
    layers: list[tuple[list[Tensor], Tensor | None]],
    directions: int,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """The stack without a graph: output and the final states; states that are None are zeros."""

    def run_layer(_, input, states, own, packed):
        h0, c0 = states if kind == "lstm" else (*states, None)
        output, h_n, c_n = LAYER(input, h0, c0, own, packed, kind, directions, batch_first)
        return (output, h_n, c_n) if kind == "lstm" else (output, h_n)

    return _run_stack(input, states, layers, directions, run_layer)


def _zeros(input: Tensor, stacked: int, hidden: int, batch_first: bool) -> Tensor:
    return input.new_zeros(stacked, input.size(0 if batch_first else 1), hidden)


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    packed_weights: Sequence[Tensor | None] | None,
    num_layers: int,
    directions: int,
    options: LSTMOptions,
    batch_first: bool,
    return_cells: bool,
    backend: str | None,
) -> tuple[Tensor, ...] | None:
    """A stack of layers without projection: output, h_n, c_n and, if asked for, cell states."""
    try:
        hidden, stacked = weights[1].size(1), num_layers * directions
        if input.dim() != 3 or weights[1].size(0) != 4 * hidden:
            return None
        if hx is None:
            h0 = c0 = None
        elif isinstance(hx, (tuple, list)):
            h0, c0 = hx
            if h0.size(0) != stacked or c0.size(-1) != hidden:
                return None
        else:
            return None
        layers = _layers_of(weights, packed_weights, num_layers)
        if layers is None or not is_ordinary("lstm", LSTM, backend, input, h0, c0, *weights):
            return None
        plain = options[1:] == PLAIN_LSTM[1:] and not return_cells
        if plain and not needs_graph(input, h0, c0, *weights):
            return _infer("lstm", input, (h0, c0), layers, directions, batch_first)
        if hx is None:
            h0 = c0 = _zeros(input, stacked, hidden, batch_first)

        def run_layer(is_last, input, states, own, packed):
            return lstm_layer(
                "cpu", input, *states, own, packed, NO_MASKS, options, batch_first,
                return_cells and is_last,
            )  # fmt: skip

        results = _run_stack(input, (h0, c0), layers, directions, run_layer)
    except CLOSER_LOOK:
        return None
    return results if return_cells else results[:3]


def simple(
    kind: str,
    input: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    packed_weights: Sequence[Tensor | None] | None,
    num_layers: int,
    directions: int,
    extra: Extra,
    has_biases: bool,
    batch_first: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor] | None:
    """A stack of layers of kind "gru" or "rnn": output and h_n."""
    try:
        hidden, stacked = weights[1].size(1), num_layers * directions
        if input.dim() != 3:
            return None
        if h0 is not None and h0.size(0) != stacked:
            return None
        layers = _layers_of(weights, packed_weights, num_layers)
        backends, run_kind = SIMPLE[kind]
        if layers is None or not is_ordinary(kind, backends, backend, input, h0, *weights):
            return None
        if not needs_graph(input, h0, *weights):
            name = extra[0] if extra else kind
            return _infer(name, input, (h0,), layers, directions, batch_first)
        if h0 is None:
            h0 = _zeros(input, stacked, hidden, batch_first)

        def run_layer(_, input, states, own, packed):
            return run_kind(
                "cpu", input, *states, own, packed, None, extra, has_biases, batch_first
            )

        return _run_stack(input, (h0,), layers, directions, run_layer)
    except CLOSER_LOOK:
        return None


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: list[Tensor],
    packed_weight: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor] | None:
    """One step, as :func:`fmkernels.ops.rnn.autograd.lstm_cell`."""
    try:
        if input.dim() != 2:
            return None
        h, c = (None, None) if hx is None else hx
        others = weights if hx is None else (h, c, *weights)
        if not is_ordinary("lstm_cell", LSTM, backend, input, *others):
            return None
        if c is not None and c.dtype != input.dtype:
            return None
        if not needs_graph(input, h, c, *weights):
            return STEP(input, h, c, weights, packed_weight, "lstm")
        if h is None:
            h = c = input.new_zeros(input.size(0), weights[1].size(1))
        options = PLAIN_LSTM if len(weights) == 4 else _UNBIASED_LSTM
        return lstm_layer(
            "cpu", input, h, c, weights, packed_weight, NO_MASKS, options, False, False
        )[1:3]
    except CLOSER_LOOK:
        return None


def simple_cell(
    kind: str,
    input: Tensor,
    h: Tensor | None,
    weights: list[Tensor],
    packed_weight: Tensor | None,
    extra: Extra,
    backend: str | None,
) -> Tensor | None:
    """One step, as :func:`fmkernels.ops.rnn.autograd.simple_cell`."""
    try:
        if input.dim() != 2:
            return None
        backends, run_layer = SIMPLE[kind]
        others = weights if h is None else (h, *weights)
        if not is_ordinary(_CELLS[kind], backends, backend, input, *others):
            return None
        if not needs_graph(input, h, *weights):
            return STEP(input, h, None, weights, packed_weight, extra[0] if extra else kind)[0]
        if h is None:
            h = input.new_zeros(input.size(0), weights[1].size(1))
        has_biases = len(weights) == 4
        return run_layer("cpu", input, h, weights, packed_weight, None, extra, has_biases, False)[
            1
        ]
    except CLOSER_LOOK:
        return None
