"""The rnn family's ops: schemas and fake kernels.

One op runs one layer of one kind (LSTM, GRU, RNN) over a whole sequence, in one or two directions;
a cell is the same op over one step. T steps, B batch, I input features, H hidden features, P
features of the hidden state (H, unless an LSTM projects it), D directions (one or two; the second
runs backwards in time).

Operands of every op:
    input ``(T, B, I)``, or ``(B, T, I)`` with ``batch_first``, last dimension contiguous, other
    strides free. Everything else is contiguous and in the input's dtype unless said otherwise.
    h0 ``(D, B, P)``. weights: for each direction the tensors named below, in that order.
    packed_weight: what ``<kind>_pack_weight`` made of the same weights, or None.
    lengths: int64 ``(B)`` on the input's device, or None for all T. Row b takes part in the steps
    ``t < lengths[b]`` alone: its outputs are zero from there on, its final states are those after
    its last step, and the second direction starts at its last step. Input past the end is not
    read.
    A cell leaves out time and direction: input ``(B, I)``, states ``(B, P)`` and ``(B, H)``, and
    so for its results. The native ops take it that way; nothing else does.
Results of every op:
    output ``(T, B, D*P)`` (``(B, T, D*P)``), h_n ``(D, B, P)``, contiguous and in the input's
    dtype. An output that was not asked for is an empty tensor of shape ``(0,)``.
    Backward ops return the gradients of input, of the initial states and of every weight, shaped
    and typed like them and contiguous.

``lstm_forward``
    c0 ``(D, B, H)``, in the input's dtype or in float32; c_n has the same dtype. weights: w_ih
    ``(4H, I)``, w_hh ``(4H, P)``; with ``has_biases`` b_ih ``(4H)``, b_hh ``(4H)``; where P is
    not H w_hr ``(P, H)``; with ``peephole`` w_peephole ``(3, H)`` for i, f, o; with ``layer_norm``
    norm_ih ``(4H)``, norm_hh ``(4H)``, norm_c ``(H)`` and, with ``has_biases``, bias_c ``(H)``.
    Gates in the order i, f, g, o. reference.py has the equations.
    recurrent_mask ``(D, B, P)``: factors of the hidden state where it meets w_hh, or None.
    zoneout_h ``(D, T, B, P)``, zoneout_c ``(D, T, B, H)``: bool, True where the old value stays;
    or both None: ``zoneout`` is then the share of the old value that stays.
    cell_states ``(T, B, D*H)`` (``(B, T, D*H)``) in the input's dtype if ``return_cells``.
    saved, if ``save_for_backward`` (else no tensors): the activated gates ``(D, T, B, 4H)`` in the
    input's dtype, the cell states ``(D, T, B, H)`` in float32 (float64 for float64); with
    ``layer_norm`` also the normalised W_ih x and W_hh h ``(D, T, B, 4H)`` each in the input's
    dtype and, in the cell states' dtype, ``(D, T, B, 2)`` the reciprocal standard deviations of
    the two.
``gru_forward``
    weights: w_ih ``(3H, I)``, w_hh ``(3H, H)`` and with ``has_biases`` b_ih, b_hh ``(3H)``; gates
    in the order r, z, n. gates, if ``save_for_backward``: ``(D, T, B, 4H)`` in the input's dtype:
    r, z, n and W_hn h + b_hn.
``rnn_forward``
    weights: w_ih ``(H, I)``, w_hh ``(H, H)`` and with ``has_biases`` b_ih, b_hh ``(H)``.
    nonlinearity: "tanh" or "relu". Its output is all that the backward needs.
``rnn_inference``, ``rnn_step``
    a layer and a cell of the kind "lstm", "gru", "tanh" or "relu" as everyday calls without a
    graph have them: h0 and, for an LSTM, c0 may be None, which stands for zeros (and saves a cell
    the products with them). packed_weight is that of the kind's own op. Native alone. What is
    returned of c is empty but for an LSTM.
``<kind>_pack_weight``
    an opaque one-dimensional uint8 tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels.ops._activations import opmath_dtype

LSTM_ACTIVATIONS = ("tanh", "sigmoid", "relu", "hard_sigmoid", "identity")


class LSTMOptions(NamedTuple):
    """Which LSTM it is: the arguments of the ops, in their order.

    Attributes:
        has_biases, peephole, layer_norm: which weights there are.
        activation: of the cell's input and output.
        recurrent_activation: of the gates.
        zoneout: share of the old state that stays where there are no zoneout masks.
        norm_eps: added to the variances of the layer norms.
    """

    has_biases: bool = True
    peephole: bool = False
    layer_norm: bool = False
    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    zoneout: float = 0.0
    norm_eps: float = 1e-5


PLAIN_LSTM = LSTMOptions()


class Sizes(NamedTuple):
    """A layer's recurrence, for backends whose choice depends on it."""

    steps: int
    batch: int
    hidden: int
    directions: int


# What else a call may use; a backend's ``supports`` is told which of them it does.
LENGTHS, PROJECTION, MASKS, CELL_STATES = "lengths", "proj_size", "dropout masks", "cell states"


_library = torch.library.Library("fmkernels", "FRAGMENT")

_LSTM_OPTIONS = (
    "Tensor? lengths, Tensor? recurrent_mask, Tensor? zoneout_h, Tensor? zoneout_c, "
    "bool has_biases, bool peephole, bool layer_norm, str activation, str recurrent_activation, "
    "float zoneout, float norm_eps, bool batch_first"
)
_NEEDS = "bool need_input, bool need_hx, bool need_weights"

_library.define(
    f"lstm_forward(Tensor input, Tensor h0, Tensor c0, Tensor[] weights, Tensor? packed_weight, "
    f"{_LSTM_OPTIONS}, bool return_cells, bool save_for_backward) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor cell_states, Tensor[] saved)"
)
_library.define(
    "lstm_backward(Tensor grad_output, Tensor grad_h_n, Tensor grad_c_n, Tensor? grad_cells, "
    "Tensor input, Tensor h0, Tensor c0, Tensor[] weights, Tensor output, Tensor[] saved, "
    f"{_LSTM_OPTIONS}, {_NEEDS}) "
    "-> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_weights)"
)
_library.define(
    "lstm_pack_weight(Tensor[] weights, int directions, bool has_biases, bool layer_norm) "
    "-> Tensor"
)
_library.define(
    "gru_forward(Tensor input, Tensor h0, Tensor[] weights, Tensor? packed_weight, "
    "Tensor? lengths, bool has_biases, bool batch_first, bool save_for_backward) "
    "-> (Tensor output, Tensor h_n, Tensor gates)"
)
_library.define(
    "gru_backward(Tensor grad_output, Tensor grad_h_n, Tensor input, Tensor h0, Tensor[] weights, "
    "Tensor output, Tensor gates, Tensor? lengths, bool has_biases, bool batch_first, "
    f"{_NEEDS}) -> (Tensor grad_input, Tensor grad_h0, Tensor[] grad_weights)"
)
_library.define("gru_pack_weight(Tensor[] weights, int directions, bool has_biases) -> Tensor")
_library.define(
    "rnn_forward(Tensor input, Tensor h0, Tensor[] weights, Tensor? packed_weight, "
    "Tensor? lengths, str nonlinearity, bool has_biases, bool batch_first) "
    "-> (Tensor output, Tensor h_n)"
)
_library.define(
    "rnn_backward(Tensor grad_output, Tensor grad_h_n, Tensor input, Tensor h0, Tensor[] weights, "
    "Tensor output, Tensor? lengths, str nonlinearity, bool has_biases, bool batch_first, "
    f"{_NEEDS}) -> (Tensor grad_input, Tensor grad_h0, Tensor[] grad_weights)"
)
_library.define("rnn_pack_weight(Tensor[] weights, int directions, bool has_biases) -> Tensor")
_library.define(
    "rnn_inference(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? packed_weight, "
    "str kind, int directions, bool batch_first) -> (Tensor output, Tensor h_n, Tensor c_n)"
)
_library.define(
    "rnn_step(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? packed_weight, "
    "str kind) -> (Tensor h, Tensor c)"
)


def _sizes(
    input: Tensor, h0: Tensor, batch_first: bool
) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Leading sizes of what is shaped like the output, and D, T, B."""
    if input.dim() == 2:  # a cell
        return (input.size(0),), (1, 1, input.size(0))
    first, second = input.shape[:2]
    steps, batch = (second, first) if batch_first else (first, second)
    return (first, second), (h0.size(0), steps, batch)


@torch.library.register_fake("fmkernels::lstm_forward", lib=_library)
def _lstm_forward_fake(
    input,
    h0,
    c0,
    weights,
    packed_weight,
    lengths,
    recurrent_mask,
    zoneout_h,
    zoneout_c,
    has_biases,
    peephole,
    layer_norm,
    activation,
    recurrent_activation,
    zoneout,
    norm_eps,
    batch_first,
    return_cells,
    save_for_backward,
):
    projected, hidden = h0.size(-1), c0.size(-1)
    leading, rows = _sizes(input, h0, batch_first)
    directions = rows[0]
    saved = []
    if save_for_backward:
        state = opmath_dtype(input.dtype)
        saved = [input.new_empty(*rows, 4 * hidden), input.new_empty(*rows, hidden, dtype=state)]
        if layer_norm:
            saved += [input.new_empty(*rows, 4 * hidden) for _ in range(2)]
            saved.append(input.new_empty(*rows, 2, dtype=state))
    return (
        input.new_empty(*leading, directions * projected),
        input.new_empty(h0.shape),
        c0.new_empty(c0.shape),
        input.new_empty((*leading, directions * hidden) if return_cells else (0,)),
        saved,
    )


@torch.library.register_fake("fmkernels::lstm_backward", lib=_library)
def _lstm_backward_fake(
    grad_output,
    grad_h_n,
    grad_c_n,
    grad_cells,
    input,
    h0,
    c0,
    weights,
    output,
    saved,
    lengths,
    recurrent_mask,
    zoneout_h,
    zoneout_c,
    has_biases,
    peephole,
    layer_norm,
    activation,
    recurrent_activation,
    zoneout,
    norm_eps,
    batch_first,
    need_input,
    need_hx,
    need_weights,
):
    return (
        _like(input, need_input),
        _like(h0, need_hx),
        _like(c0, need_hx),
        [_like(weight, need_weights) for weight in weights],
    )


def _like(tensor: Tensor, needed: bool) -> Tensor:
    return tensor.new_empty(tensor.shape if needed else (0,))


@torch.library.register_fake("fmkernels::gru_forward", lib=_library)
def _gru_forward_fake(
    input, h0, weights, packed_weight, lengths, has_biases, batch_first, save_for_backward
):
    hidden = h0.size(-1)
    leading, rows = _sizes(input, h0, batch_first)
    saved = (*rows, 4 * hidden) if save_for_backward else (0,)
    return (
        input.new_empty(*leading, rows[0] * hidden),
        input.new_empty(h0.shape),
        input.new_empty(saved),
    )


@torch.library.register_fake("fmkernels::gru_backward", lib=_library)
def _gru_backward_fake(
    grad_output,
    grad_h_n,
    input,
    h0,
    weights,
    output,
    gates,
    lengths,
    has_biases,
    batch_first,
    need_input,
    need_hx,
    need_weights,
):
    return (
        _like(input, need_input),
        _like(h0, need_hx),
        [_like(weight, need_weights) for weight in weights],
    )


@torch.library.register_fake("fmkernels::rnn_forward", lib=_library)
def _rnn_forward_fake(
    input, h0, weights, packed_weight, lengths, nonlinearity, has_biases, batch_first
):
    leading, rows = _sizes(input, h0, batch_first)
    return input.new_empty(*leading, rows[0] * h0.size(-1)), input.new_empty(h0.shape)


@torch.library.register_fake("fmkernels::rnn_backward", lib=_library)
def _rnn_backward_fake(
    grad_output,
    grad_h_n,
    input,
    h0,
    weights,
    output,
    lengths,
    nonlinearity,
    has_biases,
    batch_first,
    need_input,
    need_hx,
    need_weights,
):
    return (
        _like(input, need_input),
        _like(h0, need_hx),
        [_like(weight, need_weights) for weight in weights],
    )


@torch.library.register_fake("fmkernels::rnn_inference", lib=_library)
def _rnn_inference_fake(input, h0, c0, weights, packed_weight, kind, directions, batch_first):
    hidden = weights[1].size(1)
    state = (directions, input.size(0 if batch_first else 1), hidden)
    c_n = (input if c0 is None else c0).new_empty(state if kind == "lstm" else (0,))
    output = input.new_empty(*input.shape[:2], directions * hidden)
    return output, input.new_empty(state), c_n


@torch.library.register_fake("fmkernels::rnn_step", lib=_library)
def _rnn_step_fake(input, h0, c0, weights, packed_weight, kind):
    state = (input.size(0), weights[1].size(1))
    c = (input if c0 is None else c0).new_empty(state if kind == "lstm" else (0,))
    return input.new_empty(state), c


def _packed(weights: list[Tensor]) -> Tensor:
    # The packed size depends on the ISA of the machine, which only the kernel knows.
    size = torch.library.get_ctx().new_dynamic_size(min=64)
    return weights[0].new_empty((size,), dtype=torch.uint8)


@torch.library.register_fake("fmkernels::lstm_pack_weight", lib=_library)
def _lstm_pack_weight_fake(weights, directions, has_biases, layer_norm):
    return _packed(weights)


@torch.library.register_fake("fmkernels::gru_pack_weight", lib=_library)
def _gru_pack_weight_fake(weights, directions, has_biases):
    return _packed(weights)


@torch.library.register_fake("fmkernels::rnn_pack_weight", lib=_library)
def _rnn_pack_weight_fake(weights, directions, has_biases):
    return _packed(weights)
