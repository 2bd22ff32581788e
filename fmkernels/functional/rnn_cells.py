"""One step of a recurrent layer as functions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fmkernels import _checks as check
from fmkernels.functional.rnn import check_pair, check_state, check_weight
from fmkernels.ops.rnn import autograd, quick


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed_weight: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM (Hochreiter and Schmidhuber 1997), with torch's gate order i, f, g, o.

    ``c' = f * c + i * g``, ``h' = o * tanh(c')`` with i, f, o = sigmoid and g = tanh of
    ``W_ih x + b_ih + W_hh h + b_hh``.

    Args:
        input: ``(B, I)`` or ``(I)``; float32, bfloat16, float16 or float64.
        hx: ``(h, c)``, each ``(B, H)`` or ``(H)``; None means zeros, whose products with ``w_hh``
            may be left out.
        w_ih: ``(4H, I)``.
        w_hh: ``(4H, H)``.
        b_ih, b_hh: ``(4H)`` or None.
        packed_weight: what ``freeze`` packed from the weights, or None.
        backend: ``"auto"``, ``"cpu"`` or ``"reference"``; None takes the surrounding
            :class:`fmkernels.use_backend`.

    Returns:
        ``(h', c')``, shaped like h and c. Under autocast they keep c's dtype, as in
        torch. Differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    if (b_ih is None) == (b_hh is None):
        weights = [w_ih, w_hh] if b_ih is None else [w_ih, w_hh, b_ih, b_hh]
        result = quick.lstm_cell(input, hx, weights, packed_weight, backend)
        if result is not None:
            return result
    leading, hidden, weights = _check_cell(input, w_ih, w_hh, b_ih, b_hh, 4, packed_weight)
    if hx is None:
        h = c = input.new_zeros((*leading, hidden))
    else:
        check_pair(hx)
        for index, state in enumerate(hx):
            check_state(f"hx[{index}]", state, (*leading, hidden), _STATE, input)
        h, c = hx
    batched = input.dim() == 2
    if not batched:
        input, h, c = input.unsqueeze(0), h.unsqueeze(0), c.unsqueeze(0)
    h, c = autograd.lstm_cell(input, h, c, weights, packed_weight, len(weights) == 4, backend)
    return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of a GRU; the equations are those of :func:`fmkernels.functional.gru`.

    Args:
        input: ``(B, I)`` or ``(I)``; float32, bfloat16, float16 or float64.
        hx: h ``(B, H)`` or ``(H)``; None means zeros, as for :func:`lstm_cell`.
        w_ih: ``(3H, I)``.
        w_hh: ``(3H, H)``.
        b_ih, b_hh: ``(3H)`` or None.
        packed_weight, backend: as for :func:`lstm_cell`.

    Returns:
        h', shaped like h. Under autocast it keeps h's dtype. Differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    return _simple_cell("gru", input, hx, w_ih, w_hh, b_ih, b_hh, 3, (), packed_weight, backend)


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of a plain recurrent layer, ``tanh(W_ih x + b_ih + W_hh h + b_hh)``.

    Arguments, result and errors as for :func:`gru_cell`, with H in place of 3H.
    """
    extra = ("tanh",)
    return _simple_cell("rnn", input, hx, w_ih, w_hh, b_ih, b_hh, 1, extra, packed_weight, backend)


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of a plain recurrent layer, ``relu(W_ih x + b_ih + W_hh h + b_hh)``.

    Arguments, result and errors as for :func:`gru_cell`, with H in place of 3H.
    """
    extra = ("relu",)
    return _simple_cell("rnn", input, hx, w_ih, w_hh, b_ih, b_hh, 1, extra, packed_weight, backend)


_STATE = "batch of input, H of w_hh"


def _check_cell(
    input: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    gates: int,
    packed_weight: Tensor | None,
) -> tuple[tuple[int, ...], int, Sequence[Tensor]]:
    """Leading sizes of the state, its width, and the weights: with both biases or none."""
    check.tensor("input", input)
    check.rank("input", input, 1, 2)
    check.tensor("w_hh", w_hh)
    check.rank("w_hh", w_hh, 2)
    check.not_empty("w_hh", w_hh)
    hidden, rows = w_hh.size(1), gates * w_hh.size(1)
    prefix = f"{gates} * " if gates > 1 else ""
    if w_hh.size(0) != rows:
        raise ValueError(f"w_hh must have shape ({prefix}H, H), got {check.describe(w_hh)}")
    check_weight("w_hh", w_hh, (rows, hidden), f"({prefix}H, H)", input)
    features = f"({prefix}H, features of input)"
    check_weight("w_ih", w_ih, (rows, input.size(-1)), features, input)
    weights = [w_ih, w_hh]
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            check_weight(name, bias, (rows,), f"({prefix}H)", input)
    if b_ih is not None or b_hh is not None:
        # The op takes both biases or none.
        weights += [w_ih.new_zeros(rows) if b is None else b for b in (b_ih, b_hh)]
    if packed_weight is not None:
        check.packed_weight("packed_weight", packed_weight, w_ih)
    leading = (input.size(0),) if input.dim() == 2 else ()
    return leading, hidden, weights


def _simple_cell(
    kind, input, hx, w_ih, w_hh, b_ih, b_hh, gates, extra, packed_weight, backend
) -> Tensor:
    if (b_ih is None) == (b_hh is None):
        weights = [w_ih, w_hh] if b_ih is None else [w_ih, w_hh, b_ih, b_hh]
        result = quick.simple_cell(kind, input, hx, weights, packed_weight, extra, backend)
        if result is not None:
            return result
    leading, hidden, weights = _check_cell(input, w_ih, w_hh, b_ih, b_hh, gates, packed_weight)
    if hx is None:
        hx = input.new_zeros((*leading, hidden))
    else:
        check_state("hx", hx, (*leading, hidden), _STATE, input)
    batched = input.dim() == 2
    if not batched:
        input, hx = input.unsqueeze(0), hx.unsqueeze(0)
    hx = autograd.simple_cell(
        kind, input, hx, weights, packed_weight, extra, len(weights) == 4, backend
    )
    return hx if batched else hx.squeeze(0)
