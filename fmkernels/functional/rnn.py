"""Recurrent layers as functions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fmkernels import _checks as check
from fmkernels.functional._options import probability
from fmkernels.ops.rnn import autograd


def _hidden_size(name: str, w_hh: Tensor) -> int:
    """H of a recurrent weight ``(4H, H)``."""
    check.tensor(name, w_hh)
    check.rank(name, w_hh, 2)
    check.not_empty(name, w_hh)
    if w_hh.size(0) != 4 * w_hh.size(1):
        raise ValueError(f"{name} must have shape (4 * H, H), got {check.describe(w_hh)}")
    return w_hh.size(1)


def _check_weight(
    name: str, weight: Tensor, expected: tuple[int, ...], meaning: str, input: Tensor
) -> None:
    check.tensor(name, weight)
    check.shape(name, weight, expected, meaning)
    check.not_empty(name, weight)
    check.same_kind(name, weight, "input", input)


def _check_states(
    hx: tuple[Tensor, Tensor] | None, expected: tuple[int, ...], meaning: str, input: Tensor
) -> tuple[Tensor, Tensor]:
    if hx is None:
        zeros = input.new_zeros(expected)
        return zeros, zeros
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise TypeError(f"hx must be None or a tuple (h, c) of tensors, got {type(hx).__name__}")
    for index, state in enumerate(hx):
        name = f"hx[{index}]"
        check.tensor(name, state)
        check.shape(name, state, expected, meaning)
        check.same_kind(name, state, "input", input)
    return hx[0], hx[1]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM (Hochreiter and Schmidhuber 1997), with torch's gate order i, f, g, o.

    ``c' = f * c + i * g``, ``h' = o * tanh(c')`` with i, f, o = sigmoid and g = tanh of
    ``W_ih x + b_ih + W_hh h + b_hh``.

    Args:
        input: ``(B, I)`` or ``(I)``; float32, bfloat16, float16 or float64.
        hx: ``(h, c)``, each ``(B, H)`` or ``(H)``; None means zeros.
        w_ih: ``(4H, I)``.
        w_hh: ``(4H, H)``.
        b_ih, b_hh: ``(4H)`` or None.
        backend: ``"auto"``, ``"cpu"`` or ``"reference"``; None takes the surrounding
            :class:`fmkernels.use_backend`.

    Returns:
        ``(h', c')``, shaped like h and c. Under autocast they keep c's dtype, as in
        torch. Differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    check.tensor("input", input)
    check.rank("input", input, 1, 2)
    hidden = _hidden_size("w_hh", w_hh)
    batched = input.dim() == 2
    leading = (input.size(0),) if batched else ()
    h, c = _check_states(hx, (*leading, hidden), "batch of input, H of w_hh", input)
    _check_weight("w_hh", w_hh, (4 * hidden, hidden), "(4 * H, H)", input)
    _check_weight("w_ih", w_ih, (4 * hidden, input.size(-1)), "(4 * H, features of input)", input)
    weights = [w_ih, w_hh]
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            _check_weight(name, bias, (4 * hidden,), "(4 * H)", input)
    if b_ih is not None or b_hh is not None:
        # The op takes both biases or none.
        weights += [w_ih.new_zeros(4 * hidden) if b is None else b for b in (b_ih, b_hh)]
    if not batched:
        input, h, c = input.unsqueeze(0), h.unsqueeze(0), c.unsqueeze(0)
    h, c = autograd.lstm_cell(input, h, c, weights, backend)
    return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


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
    packed_weights: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of LSTM layers over whole sequences; the equations are those of :func:`lstm_cell`.

    T steps, B batch, I features, H hidden features, L layers, D = 2 if ``bidirectional`` else 1.

    Args:
        input: ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, or ``(T, I)``; float32, bfloat16,
            float16 or float64; at least one step.
        hx: ``(h_0, c_0)``, each ``(L * D, B, H)``, or ``(L * D, H)`` for input ``(T, I)``; None
            means zeros.
        weights: for every layer and in it for every direction w_ih ``(4H, I)`` (``(4H, D * H)``
            after the first layer), w_hh ``(4H, H)`` and, with ``has_biases``, b_ih and b_hh
            ``(4H)``: the order of ``torch.nn.LSTM._flat_weights``.
        dropout: probability of zeroing a feature between two layers while ``training``.
        packed_weights: for every layer what ``freeze`` packed from its weights, or None.
        backend: ``"auto"``, ``"cpu"`` or ``"reference"``; None takes the surrounding
            :class:`fmkernels.use_backend`.

    Returns:
        output ``(T, B, D * H)`` (in the input's layout), h_n and c_n like h_0 and c_0.
        Differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    check.tensor("input", input)
    check.rank("input", input, 2, 3)
    num_layers = check.integer("num_layers", num_layers, 1)
    for name, flag in (
        ("has_biases", has_biases),
        ("training", training),
        ("bidirectional", bidirectional),
        ("batch_first", batch_first),
    ):
        check.boolean(name, flag)
    dropout = probability("dropout", dropout)
    directions, per_direction = (2 if bidirectional else 1), (4 if has_biases else 2)
    per_layer = directions * per_direction
    if not isinstance(weights, (tuple, list)) or len(weights) != num_layers * per_layer:
        raise ValueError(
            f"weights must hold {num_layers * per_layer} tensors ({num_layers} layers x "
            f"{directions} directions x {per_direction}), got "
            f"{len(weights) if isinstance(weights, (tuple, list)) else check.describe(weights)}"
        )
    layers = [weights[i * per_layer : (i + 1) * per_layer] for i in range(num_layers)]
    hidden = _hidden_size("weights[1]", weights[1])
    features = input.size(-1)
    for index, weight in enumerate(weights):
        kind = index % per_direction
        width = features if index < per_layer else directions * hidden
        expected = ((4 * hidden, width), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))[kind]
        meaning = ("w_ih: (4 * H, features)", "w_hh: (4 * H, H)", "b_ih: (4 * H)", "b_hh: (4 * H)")
        _check_weight(f"weights[{index}]", weight, expected, meaning[kind], input)
    if packed_weights is None:
        packed_weights = [None] * num_layers
    elif not isinstance(packed_weights, (tuple, list)) or len(packed_weights) != num_layers:
        raise ValueError(f"packed_weights must hold a tensor or None per layer ({num_layers})")
    for index, packed in enumerate(packed_weights):
        if packed is not None:
            check.packed_weight(f"packed_weights[{index}]", packed, weights[0])

    batched = input.dim() == 3
    if not batched:
        input, batch_first = input.unsqueeze(1), False
    batch, steps = input.size(0 if batch_first else 1), input.size(1 if batch_first else 0)
    if steps == 0:
        raise ValueError("input must have at least one step, got a sequence of length 0")
    stacked = num_layers * directions
    state_shape = (stacked, batch, hidden) if batched else (stacked, hidden)
    h0, c0 = _check_states(hx, state_shape, "layers * directions, batch, H", input)
    if not batched:
        h0, c0 = h0.unsqueeze(1), c0.unsqueeze(1)
    output, h_n, c_n = autograd.lstm(
        input, h0, c0, layers, packed_weights, batch_first, dropout, training, backend
    )
    if not batched:
        return output.squeeze(1), h_n.squeeze(1), c_n.squeeze(1)
    return output, h_n, c_n
