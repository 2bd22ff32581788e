"""Recurrent layers over whole sequences as functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels import _checks as check
from fmkernels._remember import remember
from fmkernels.functional._options import probability
from fmkernels.ops.rnn import autograd, quick
from fmkernels.ops.rnn.schema import LSTM_ACTIVATIONS, LSTMOptions


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | None = None,
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    layer_norm: bool = False,
    peephole: bool = False,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    return_cell_states: bool = False,
    packed_weights: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """A stack of LSTM layers over whole sequences.

    T steps, B batch, I features, H hidden features, P features of the output (H unless projected),
    L layers, D = 2 if ``bidirectional`` else 1. With R the ``recurrent_activation``, A the
    ``activation`` and gates in torch's order i, f, g, o, a step computes::

        a = W_ih x + b_ih + W_hh (m * h) + b_hh
        i = R(a_i + p_i * c)   f = R(a_f + p_f * c)   g = A(a_g)
        c~ = f * c + i * g     o = R(a_o + p_o * c~)  h~ = W_hr (o * A(c~))
        c' = k * c + (1 - k) * c~                     h' = k * h + (1 - k) * h~

    where p are peepholes (Gers and Schmidhuber 2000), m is the recurrent dropout of Gal and
    Ghahramani 2016 (one mask for all steps of a sequence), k is zoneout (Krueger et al. 2017:
    random masks in training, their expectation otherwise), W_hr a projection (Sak et al. 2014).
    Layer norm (Ba et al. 2016, equations 20 to 22) normalises W_ih x, W_hh h and c~ on its way to
    A, each over all its features, and scales them by norm_ih, norm_hh and norm_c; the biases of
    the first two are b_ih and b_hh.

    Args:
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, or ``(T, I)``; float32, bfloat16,
            float16 or float64; at least one step.
        hx: ``(h_0, c_0)``, ``(L * D, B, P)`` and ``(L * D, B, H)``, without B for ``(T, I)``;
            None means zeros. c_0 may be float32 where the input is bfloat16 or float16; c_n is
            then float32 too, so that a sequence in pieces carries what one in whole does.
        weights: for every layer and in it for every direction, in the order of
            ``torch.nn.LSTM._flat_weights``: w_ih ``(4H, I)`` (``(4H, D * P)`` after the first
            layer), w_hh ``(4H, P)``; with ``has_biases`` b_ih and b_hh ``(4H)``; where P is not H
            w_hr ``(P, H)``; with ``peephole`` w_peephole ``(3, H)`` (i, f, o); with ``layer_norm``
            norm_ih ``(4H)``, norm_hh ``(4H)``, norm_c ``(H)`` and, with ``has_biases``, bias_c
            ``(H)``.
        dropout: probability of zeroing a feature between two layers while ``training``.
        lengths: int64 ``(B)`` on any device, each in ``[0, T]``: the steps of each sequence.
            Outputs past the end are zero, h_n and c_n are those after the last step, and the
            second direction starts there. Input past the end has no effect.
        activation, recurrent_activation: "tanh", "sigmoid", "relu", "hard_sigmoid"
            (``relu6(x + 3) / 6``) or "identity".
        layer_norm, peephole: whether ``weights`` holds what they need.
        zoneout: probability with which a feature of h and c keeps its old value.
        recurrent_dropout: probability of zeroing a feature of h where it meets w_hh, while
            ``training``.
        return_cell_states: whether to return the last layer's c at all steps.
        packed_weights: for every layer what ``freeze`` packed from its weights, or None.
        backend: ``"auto"``, ``"cpu"`` or ``"reference"``; None takes the surrounding
            :class:`fmkernels.use_backend`.

    Returns:
        output ``(T, B, D * P)`` (in the input's layout), h_n and c_n like h_0 and c_0, and with
        ``return_cell_states`` c ``(T, B, D * H)``. Differentiable once: a second derivative
        raises RuntimeError.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    options = lstm_options(
        has_biases, peephole, layer_norm, activation, recurrent_activation, zoneout
    )
    recurrent_dropout = probability("recurrent_dropout", recurrent_dropout)
    check.boolean("return_cell_states", return_cell_states)
    plan = _plan(num_layers, dropout, training, bidirectional, batch_first)
    draws = plan.draws or (training and (recurrent_dropout > 0.0 or options.zoneout > 0.0))
    if lengths is None and not draws:
        results = quick.lstm(
            input, hx, weights, packed_weights, num_layers, plan.directions, options, batch_first,
            return_cell_states, backend,
        )  # fmt: skip
        if results is not None:
            return results
    stack = _Stack.of(input, plan)
    hidden = _gate_size("weights[1]", _second(weights), 4)
    projected = weights[1].size(1)
    kinds = [("w_ih", 4 * hidden, -1), ("w_hh", 4 * hidden, projected)]
    if has_biases:
        kinds += [("b_ih", 4 * hidden), ("b_hh", 4 * hidden)]
    if projected != hidden:
        if projected > hidden:
            raise ValueError(
                "weights[1] must have shape (4 * H, P) with P <= H, got "
                f"{check.describe(weights[1])}"
            )
        kinds.append(("w_hr", projected, hidden))
    if peephole:
        kinds.append(("w_peephole", 3, hidden))
    if layer_norm:
        kinds += [("norm_ih", 4 * hidden), ("norm_hh", 4 * hidden), ("norm_c", hidden)]
        kinds += [("bias_c", hidden)] if has_biases else []
    layers = stack.layers_of(weights, kinds, projected)
    packed_weights = stack.checked_packed(packed_weights, weights[0])
    h0, c0 = stack.states(hx, (projected, hidden))
    lengths = stack.checked_lengths(lengths)
    output, h_n, c_n, cell_states = autograd.lstm(
        stack.input, h0, c0, layers, packed_weights, lengths, options, stack.batch_first,
        stack.dropout, recurrent_dropout, training, return_cell_states, backend,
    )  # fmt: skip
    results = (output, h_n, c_n, cell_states) if return_cell_states else (output, h_n, c_n)
    return stack.unbatch(results)


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | None = None,
    packed_weights: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of GRU layers over whole sequences (Cho et al. 2014), as torch and cuDNN define it.

    ``r, z = sigmoid(W_i x + b_i + W_h h + b_h)``, ``n = tanh(W_in x + b_in + r * q)`` with
    ``q = W_hn h + b_hn``, ``h' = (1 - z) * n + z * h``; gates in torch's order r, z, n.

    Args:
        input, num_layers, dropout, training, bidirectional, batch_first, lengths, packed_weights,
            backend: as for :func:`lstm`.
        hx: h_0 ``(L * D, B, H)``, ``(L * D, H)`` for input ``(T, I)``; None means zeros.
        weights: for every layer and in it for every direction w_ih ``(3H, I)`` (``(3H, D * H)``
            after the first layer), w_hh ``(3H, H)`` and, with ``has_biases``, b_ih, b_hh ``(3H)``.

    Returns:
        output ``(T, B, D * H)`` (in the input's layout) and h_n like h_0. Differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    plan = _plan(num_layers, dropout, training, bidirectional, batch_first)
    return _simple(
        "gru", input, plan, hx, weights, 3, has_biases, lengths, (), packed_weights, backend
    )


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    packed_weights: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A stack of plain recurrent layers (Elman 1990) over whole sequences.

    ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``, or relu of it.

    Args:
        input, num_layers, dropout, training, bidirectional, batch_first, lengths, packed_weights,
            backend: as for :func:`lstm`.
        hx: h_0 ``(L * D, B, H)``, ``(L * D, H)`` for input ``(T, I)``; None means zeros.
        weights: for every layer and in it for every direction w_ih ``(H, I)`` (``(H, D * H)``
            after the first layer), w_hh ``(H, H)`` and, with ``has_biases``, b_ih, b_hh ``(H)``.
        nonlinearity: "tanh" or "relu".

    Returns:
        output ``(T, B, D * H)`` (in the input's layout) and h_n like h_0. Differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    check.choice("nonlinearity", nonlinearity, ("tanh", "relu"))
    plan = _plan(num_layers, dropout, training, bidirectional, batch_first)
    extra = (nonlinearity,)
    return _simple(
        "rnn", input, plan, hx, weights, 1, has_biases, lengths, extra, packed_weights, backend
    )


@remember
def lstm_options(
    has_biases: bool,
    peephole: bool,
    layer_norm: bool,
    activation: str,
    recurrent_activation: str,
    zoneout: float,
) -> LSTMOptions:
    """The op's options from checked arguments of the same names."""
    flags = (("has_biases", has_biases), ("peephole", peephole), ("layer_norm", layer_norm))
    for name, flag in flags:
        check.boolean(name, flag)
    check.choice("activation", activation, LSTM_ACTIVATIONS)
    check.choice("recurrent_activation", recurrent_activation, LSTM_ACTIVATIONS)
    zoneout = probability("zoneout", zoneout)
    return LSTMOptions(has_biases, peephole, layer_norm, activation, recurrent_activation, zoneout)


def check_weight(
    name: str, weight: Tensor, expected: tuple[int, ...], meaning: str, input: Tensor
) -> None:
    """``weight`` is a tensor like ``input`` with the expected shape, and not empty."""
    check.tensor(name, weight)
    check.shape(name, weight, expected, meaning)
    check.not_empty(name, weight)
    check.same_kind(name, weight, "input", input)


def check_state(
    name: str, state: Tensor, expected: tuple[int, ...], meaning: str, input: Tensor
) -> None:
    """``state`` is a tensor like ``input`` with the expected shape."""
    check.tensor(name, state)
    check.shape(name, state, expected, meaning)
    check.same_kind(name, state, "input", input)


def check_pair(hx: object) -> None:
    """``hx`` is a pair, as the state of an LSTM must be."""
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise TypeError(f"hx must be None or a tuple (h, c) of tensors, got {type(hx).__name__}")


def _gate_size(name: str, w_hh: Tensor, gates: int) -> int:
    """H of a recurrent weight ``(gates * H, ...)``."""
    check.tensor(name, w_hh)
    check.rank(name, w_hh, 2)
    check.not_empty(name, w_hh)
    if w_hh.size(0) % gates != 0:
        raise ValueError(f"{name} must have shape ({gates} * H, H), got {check.describe(w_hh)}")
    return w_hh.size(0) // gates


def _second(weights: object) -> object:
    if not isinstance(weights, (tuple, list)) or len(weights) < 2:
        raise ValueError(
            "weights must be a list of tensors, w_ih and w_hh first, got "
            f"{len(weights) if isinstance(weights, (tuple, list)) else check.describe(weights)}"
        )
    return weights[1]


class _Plan(NamedTuple):
    """A stack's options, checked."""

    num_layers: int
    directions: int
    dropout: float
    training: bool
    batch_first: bool

    @property
    def draws(self) -> bool:
        """Whether there is dropout between layers."""
        return self.training and self.dropout > 0.0 and self.num_layers > 1


@remember
def _plan(
    num_layers: int, dropout: float, training: bool, bidirectional: bool, batch_first: bool
) -> _Plan:
    num_layers = check.integer("num_layers", num_layers, 1)
    for name, flag in (
        ("training", training),
        ("bidirectional", bidirectional),
        ("batch_first", batch_first),
    ):
        check.boolean(name, flag)
    dropout = probability("dropout", dropout)
    return _Plan(num_layers, 2 if bidirectional else 1, dropout, training, batch_first)


@dataclass(frozen=True)
class _Stack:
    """The arguments that every kind of layer has, checked; the input with a batch dimension."""

    input: Tensor
    batched: bool
    batch_first: bool
    num_layers: int
    directions: int
    dropout: float
    training: bool
    batch: int
    steps: int

    @classmethod
    def of(cls, input: Tensor, plan: _Plan) -> _Stack:
        check.tensor("input", input)
        check.rank("input", input, 2, 3)
        batched, batch_first = input.dim() == 3, plan.batch_first
        if not batched:
            input, batch_first = input.unsqueeze(1), False
        batch, steps = input.size(0 if batch_first else 1), input.size(1 if batch_first else 0)
        if steps == 0:
            raise ValueError("input must have at least one step, got a sequence of length 0")
        return cls(
            input, batched, batch_first, plan.num_layers, plan.directions, plan.dropout,
            plan.training, batch, steps,
        )  # fmt: skip

    def layers_of(
        self, weights: Sequence[Tensor], kinds: Sequence[tuple], projected: int
    ) -> list[Sequence[Tensor]]:
        """The weights of each layer; ``kinds`` are names and shapes, -1 the layer's features."""
        count = self.directions * len(kinds)
        if len(weights) != self.num_layers * count:
            raise ValueError(
                f"weights must hold {self.num_layers * count} tensors ({self.num_layers} layers x "
                f"{self.directions} directions x {len(kinds)}: "
                f"{', '.join(name for name, *_ in kinds)}), got {len(weights)}"
            )
        for index, weight in enumerate(weights):
            name, *shape = kinds[index % len(kinds)]
            width = self.input.size(-1) if index < count else self.directions * projected
            expected = tuple(width if size == -1 else size for size in shape)
            check_weight(f"weights[{index}]", weight, expected, name, self.input)
        return [weights[i * count : (i + 1) * count] for i in range(self.num_layers)]

    def checked_packed(self, packed_weights: object, weight: Tensor) -> Sequence[Tensor | None]:
        if packed_weights is None:
            return [None] * self.num_layers
        if not isinstance(packed_weights, (tuple, list)) or len(packed_weights) != self.num_layers:
            raise ValueError(
                f"packed_weights must hold a tensor or None per layer ({self.num_layers})"
            )
        for index, packed in enumerate(packed_weights):
            if packed is not None:
                check.packed_weight(f"packed_weights[{index}]", packed, weight)
        return packed_weights

    def checked_lengths(self, lengths: object) -> Tensor | None:
        """int64 on the input's device."""
        if lengths is None:
            return None
        if not isinstance(lengths, Tensor):
            raise TypeError(f"lengths must be a Tensor, got {check.describe(lengths)}")
        if lengths.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"lengths must be int64 or int32, got {check.describe(lengths)}")
        if not self.batched:
            raise ValueError("lengths must be None for an input without a batch dimension")
        check.shape("lengths", lengths, (self.batch,), "batch of input")
        # A look at the values would make the host wait for a GPU, and break a graph.
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and self.batch > 0:
            low, high = lengths.aminmax()
            if low < 0 or high > self.steps:
                raise ValueError(
                    f"lengths must be in [0, {self.steps}], got {low.item()} to {high.item()}"
                )
        return lengths.to(self.input.device, torch.int64).contiguous()

    def state_shape(self, width: int) -> tuple[int, ...]:
        stacked = self.num_layers * self.directions
        return (stacked, self.batch, width) if self.batched else (stacked, width)

    def states(self, hx: object, widths: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """h_0 and c_0 with a batch dimension."""
        if hx is None:
            h0, c0 = (self.input.new_zeros(self.state_shape(width)) for width in widths)
        else:
            check_pair(hx)
            h0, c0 = hx
            for index, (state, width) in enumerate(zip(hx, widths, strict=True)):
                name = f"hx[{index}]"
                wide = index == 1 and isinstance(state, Tensor) and state.dtype is torch.float32
                like = self.input
                if wide and like.dtype in (torch.bfloat16, torch.float16):
                    like = state.new_empty(0) if state.device == like.device else like
                check_state(
                    name, state, self.state_shape(width), "layers * directions, batch, H", like
                )
        if not self.batched:
            h0, c0 = h0.unsqueeze(1), c0.unsqueeze(1)
        return h0, c0

    def state(self, hx: object, width: int) -> Tensor:
        """h_0 with a batch dimension, of a layer that has no other state."""
        shape = self.state_shape(width)
        if hx is None:
            hx = self.input.new_zeros(shape)
        else:
            check_state("hx", hx, shape, "layers * directions, batch, H", self.input)
        return hx if self.batched else hx.unsqueeze(1)

    def unbatch(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return results if self.batched else tuple(result.squeeze(1) for result in results)


def _simple(
    kind, input, plan: _Plan, hx, weights, gates, has_biases, lengths, extra, packed_weights,
    backend,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """GRU and RNN, which differ in the number of gates and in what their op takes besides."""
    check.boolean("has_biases", has_biases)
    if lengths is None and not plan.draws:
        results = quick.simple(
            kind, input, hx, weights, packed_weights, plan.num_layers, plan.directions, extra,
            has_biases, plan.batch_first, backend,
        )  # fmt: skip
        if results is not None:
            return results
    stack = _Stack.of(input, plan)
    hidden = _gate_size("weights[1]", _second(weights), gates)
    kinds = [("w_ih", gates * hidden, -1), ("w_hh", gates * hidden, hidden)]
    if has_biases:
        kinds += [("b_ih", gates * hidden), ("b_hh", gates * hidden)]
    layers = stack.layers_of(weights, kinds, hidden)
    packed_weights = stack.checked_packed(packed_weights, weights[0])
    output, h_n = autograd.simple(
        kind, stack.input, stack.state(hx, hidden), layers, packed_weights,
        stack.checked_lengths(lengths), extra, has_biases, stack.batch_first, stack.dropout,
        stack.training, backend,
    )  # fmt: skip
    return stack.unbatch((output, h_n))
