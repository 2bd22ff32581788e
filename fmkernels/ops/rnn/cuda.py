"""LSTM and GRU layers on the persistent CUDA recurrence: see csrc/cuda/rnn.h.

The input's share of the gates is one GEMM over all steps before the recurrence, the gradients of
weights and input are GEMMs after it; both are torch's. The recurrence itself is one launch.

Letters: T steps, B batch, I input features, H hidden features, D directions, G gates (4 or 3).

``rnn_recurrence_forward``
    projected ``(D, T, B, G*H)`` (``(D, B, T, G*H)`` with ``batch_first``): W_ih x + b_ih + b_hh,
    for a GRU's n without b_hn. w_hh: ``(G*H, H)`` per direction. b_hn: ``(H)`` per direction of a
    GRU with biases. h0 ``(D, B, H)``, c0 the same in float32 for an LSTM, None for a GRU. lengths:
    int64 ``(B)`` or None. All contiguous, H a multiple of 8.
    Returns output, h_n, c_n (float32), and for the backward the gates ``(D, T, B, 4H)`` (i, f, g,
    o, or r, z, n and W_hn h + b_hn) and the cell states ``(D, T, B, H)`` in float32.
``rnn_recurrence_backward``
    Returns the gradients of the gates before their activations, ``(D, T, B, 4H)`` laid out like
    ``projected`` (i, f, g, o, or r, z, W_hn h + b_hn and W_in x + b_in), of h0, and of c0
    (float32).
``rnn_recurrence_problem``
    Why a device cannot hold such a recurrence; empty if it can.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fmkernels._dispatch import SUPPORTED, Support, UnsupportedError
from fmkernels.ops._cuda_support import cuda_support, problem_of
from fmkernels.ops.rnn.schema import Sizes

_library = torch.library.Library("fmkernels", "FRAGMENT")
_library.define(
    "rnn_recurrence_forward(Tensor projected, Tensor[] w_hh, Tensor[] b_hn, Tensor h0, "
    "Tensor? c0, Tensor? lengths, str cell, bool batch_first, bool save_for_backward) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
)
_library.define(
    "rnn_recurrence_backward(Tensor grad_output, Tensor grad_h_n, Tensor? grad_c_n, "
    "Tensor[] w_hh, Tensor h0, Tensor? c0, Tensor? lengths, Tensor output, Tensor gates, "
    "Tensor cells, str cell, bool batch_first) "
    "-> (Tensor grad_gates, Tensor grad_h0, Tensor grad_c0)"
)
_library.define(
    "rnn_recurrence_problem(int device, str dtype, str cell, int steps, int batch, int hidden, "
    "int directions) -> str"
)
_ops = torch.ops.fmkernels
PLAIN = ("tanh", "sigmoid")  # activations


@torch.library.register_fake("fmkernels::rnn_recurrence_forward", lib=_library)
def _forward_fake(projected, w_hh, b_hn, h0, c0, lengths, cell, batch_first, save_for_backward):
    directions, first, second, _ = projected.shape
    steps, batch = (second, first) if batch_first else (first, second)
    hidden, lstm = h0.size(-1), cell == "lstm"
    absent = (0,)
    saved = (directions, steps, batch)
    return (
        projected.new_empty(first, second, directions * hidden),
        torch.empty_like(h0),
        h0.new_empty(h0.shape if lstm else absent, dtype=torch.float32),
        projected.new_empty((*saved, 4 * hidden) if save_for_backward else absent),
        projected.new_empty(
            (*saved, hidden) if save_for_backward and lstm else absent, dtype=torch.float32
        ),
    )


@torch.library.register_fake("fmkernels::rnn_recurrence_backward", lib=_library)
def _backward_fake(
    grad_output,
    grad_h_n,
    grad_c_n,
    w_hh,
    h0,
    c0,
    lengths,
    output,
    gates,
    cells,
    cell,
    batch_first,
):
    directions, _, hidden = h0.shape
    return (
        output.new_empty(directions, *output.shape[:2], 4 * hidden),
        torch.empty_like(h0),
        h0.new_empty(h0.shape if cell == "lstm" else (0,), dtype=torch.float32),
    )


def recurrence_supports(input: Tensor, cell: str, sizes: Sizes | None) -> Support:
    """Whether the device holds such a recurrence, forward and backward."""
    if sizes is None:
        return Support(False, "has no single steps: it keeps weights on chip over a sequence")
    support = cuda_support(input)
    if not support.ok:
        return support
    index = input.device.index
    problem = problem_of("rnn_recurrence_problem", index, input.dtype, cell, *sizes)
    return Support(False, problem) if problem else SUPPORTED


# Where something else should be faster. From the literature and counts of bytes, not measured: a
# step of this recurrence costs a barrier over the device (1 to 2 us) and one read of the hidden
# state by every block; it saves reading the weights, 8 H^2 bytes, at every step.
#
# * Up to 128 features one block holds all weights of a direction (128 KB in half precision), so
#   the Triton whole-sequence kernel needs no barrier.
# * From about 256 sequences on a step is a compute-bound product, which one GEMM per step does at
#   the tensor cores' rate, while here every block reads all of the hidden state.
# * cuDNN's persistent kernels take float16 alone, one direction, at most 1024 features and no
#   lengths; for all else it reads the weights at every step.
WHOLE_BLOCK_HIDDEN = 128
COMPUTE_BOUND_BATCH = 256


def recurrence_yields_to(
    input: Tensor, extras: tuple[str, ...], options: object, width: int, sizes: Sizes
) -> tuple[str, str] | None:
    """See ``Backend.yields_to``."""
    if sizes.hidden <= WHOLE_BLOCK_HIDDEN:
        return "triton", f"{sizes.hidden} features fit one block, which needs no barrier"
    if sizes.batch >= COMPUTE_BOUND_BATCH:
        return "triton", f"with {sizes.batch} sequences a step is bound by arithmetic"
    return None


def lstm_forward(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    packed_weight: Tensor | None,
    lengths: Tensor | None,
    recurrent_mask: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    has_biases: bool,
    peephole: bool,
    layer_norm: bool,
    activation: str,
    recurrent_activation: str,
    zoneout: float,
    norm_eps: float,
    batch_first: bool,
    return_cells: bool,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The op ``lstm_forward`` for a plain LSTM."""
    variants = recurrent_mask is not None or zoneout_h is not None or return_cells or zoneout
    if variants or peephole or layer_norm or (activation, recurrent_activation) != PLAIN:
        raise UnsupportedError("lstm: backend 'cuda' has no variants of the LSTM")
    groups = _directions(weights, h0.size(0), has_biases)
    projected = _project(input, groups, 4, h0.size(-1))
    w_hh = [w_hh for _, w_hh, _, _ in groups]
    output, h_n, c_n, gates, cells = _ops.rnn_recurrence_forward(
        projected, w_hh, [], h0, c0.float().contiguous(), lengths, "lstm", batch_first,
        save_for_backward,
    )  # fmt: skip
    saved = [gates, cells] if save_for_backward else []
    return output, h_n, c_n.to(c0.dtype), input.new_empty(0), saved


def lstm_backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor,
    grad_cells: Tensor | None,
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    output: Tensor,
    saved: list[Tensor],
    lengths: Tensor | None,
    recurrent_mask: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    has_biases: bool,
    peephole: bool,
    layer_norm: bool,
    activation: str,
    recurrent_activation: str,
    zoneout: float,
    norm_eps: float,
    batch_first: bool,
    need_input: bool,
    need_hx: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The op ``lstm_backward`` for a plain LSTM."""
    groups = _directions(weights, h0.size(0), has_biases)
    gates, cells = saved
    w_hh = [w_hh for _, w_hh, _, _ in groups]
    grad_gates, grad_h0, grad_c0 = _ops.rnn_recurrence_backward(
        grad_output.contiguous(), grad_h_n.contiguous(), grad_c_n.float().contiguous(), w_hh, h0,
        c0.float().contiguous(), lengths, output, gates, cells, "lstm", batch_first,
    )  # fmt: skip
    grad_input, grad_weights = _products(
        grad_gates, grad_gates, input, h0, output, lengths, groups, batch_first, need_input,
        need_weights,
    )  # fmt: skip
    absent = input.new_empty(0)
    if not need_hx:
        return grad_input, absent, absent, grad_weights
    return grad_input, grad_h0, grad_c0.to(c0.dtype), grad_weights


def gru_forward(
    input: Tensor,
    h0: Tensor,
    weights: list[Tensor],
    packed_weight: Tensor | None,
    lengths: Tensor | None,
    has_biases: bool,
    batch_first: bool,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``gru_forward``."""
    groups = _directions(weights, h0.size(0), has_biases)
    hidden = h0.size(-1)
    projected = _project(input, groups, 3, hidden)
    w_hh = [w_hh for _, w_hh, _, _ in groups]
    b_hn = [b_hh[2 * hidden :].contiguous() for *_, b_hh in groups] if has_biases else []
    output, h_n, _, gates, _ = _ops.rnn_recurrence_forward(
        projected, w_hh, b_hn, h0, None, lengths, "gru", batch_first, save_for_backward
    )
    return output, h_n, gates


def gru_backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    input: Tensor,
    h0: Tensor,
    weights: list[Tensor],
    output: Tensor,
    gates: Tensor,
    lengths: Tensor | None,
    has_biases: bool,
    batch_first: bool,
    need_input: bool,
    need_hx: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The op ``gru_backward``."""
    groups = _directions(weights, h0.size(0), has_biases)
    w_hh = [w_hh for _, w_hh, _, _ in groups]
    no_cells = h0.new_empty(0, dtype=torch.float32)
    grad_gates, grad_h0, _ = _ops.rnn_recurrence_backward(
        grad_output.contiguous(), grad_h_n.contiguous(), None, w_hh, h0, None, lengths, output,
        gates, no_cells, "gru", batch_first,
    )  # fmt: skip
    # n sees the input without r, and the hidden state through r.
    r, z, recurrent_n, input_n = grad_gates.chunk(4, dim=-1)
    of_input = torch.cat([r, z, input_n], dim=-1)
    of_hidden = torch.cat([r, z, recurrent_n], dim=-1)
    grad_input, grad_weights = _products(
        of_input, of_hidden, input, h0, output, lengths, groups, batch_first, need_input,
        need_weights,
    )  # fmt: skip
    return grad_input, grad_h0 if need_hx else input.new_empty(0), grad_weights


def _directions(
    weights: list[Tensor], directions: int, has_biases: bool
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """``(w_ih, w_hh, b_ih, b_hh)`` of each direction, biases None without them."""
    per_direction = len(weights) // directions
    groups = [
        tuple(weights[d * per_direction : (d + 1) * per_direction]) for d in range(directions)
    ]
    return [group if has_biases else (*group, None, None) for group in groups]


def _project(input: Tensor, groups: list, gates: int, hidden: int) -> Tensor:
    """W_ih x + b_ih + b_hh of every direction, ``(D, T, B, G*H)`` or ``(D, B, T, G*H)``; b_hh of a
    GRU's n is left to the recurrence, which has to multiply it with r."""
    rows = input.reshape(-1, input.size(-1))
    weights, biases = [], []
    for w_ih, _, b_ih, b_hh in groups:
        weights.append(w_ih)
        if b_ih is None:
            continue
        bias = b_ih + b_hh
        if gates == 3:
            bias = torch.cat([bias[: 2 * hidden], b_ih[2 * hidden :]])
        biases.append(bias)
    if len(groups) == 1:
        projected = F.linear(rows, weights[0], biases[0] if biases else None)
    else:
        both = torch.stack(weights).transpose(1, 2)
        rows = rows.expand(len(groups), -1, -1)
        if biases:
            projected = torch.baddbmm(torch.stack(biases).unsqueeze(1), rows, both)
        else:
            projected = torch.bmm(rows, both)
    return projected.view(len(groups), *input.shape[:2], gates * hidden)


def _products(
    of_input: Tensor,
    of_hidden: Tensor,
    input: Tensor,
    h0: Tensor,
    output: Tensor,
    lengths: Tensor | None,
    groups: list,
    batch_first: bool,
    need_input: bool,
    need_weights: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of the input and of all weights, from those of the gates.

    Args:
        of_input: gradients of W_ih x + b_ih, ``(D, T, B, G*H)`` in the input's layout.
        of_hidden: the same of W_hh h + b_hh.
    """
    absent = input.new_empty(0)
    grad_input, grad_weights = absent, []
    rows = input.reshape(-1, input.size(-1))
    if lengths is not None and need_weights:
        # Past its length an input may hold anything, and 0 times infinity is not 0.
        rows = rows.masked_fill(_past(lengths, input, batch_first).reshape(-1, 1), 0.0)
    for d, (w_ih, _, b_ih, _) in enumerate(groups):
        gates_input = of_input[d].flatten(0, 1)
        gates_hidden = of_hidden[d].flatten(0, 1)
        if need_input:
            share = gates_input @ w_ih
            grad_input = share if d == 0 else grad_input.add_(share)
        if not need_weights:
            continue
        before = _hidden_before(h0, output, lengths, d, batch_first).flatten(0, 1)
        grad_weights += [gates_input.t() @ rows, gates_hidden.t() @ before]
        if b_ih is not None:
            grad_weights += [gates_input.sum(dim=0), gates_hidden.sum(dim=0)]
    if need_input:
        grad_input = grad_input.view(input.shape)
    if not need_weights:
        grad_weights = [absent for group in groups for weight in group if weight is not None]
    return grad_input, grad_weights


def _past(lengths: Tensor, sequence: Tensor, batch_first: bool) -> Tensor:
    """True where a step lies past its sequence's length, in the sequence's layout."""
    steps = torch.arange(sequence.size(1 if batch_first else 0), device=sequence.device)
    return steps >= lengths[:, None] if batch_first else steps[:, None] >= lengths


def _hidden_before(
    h0: Tensor, output: Tensor, lengths: Tensor | None, direction: int, batch_first: bool
) -> Tensor:
    """The hidden state that each step of one direction started from, in the output's layout."""
    hidden, time = h0.size(-1), 1 if batch_first else 0
    own = output[..., direction * hidden : (direction + 1) * hidden]
    first = h0[direction].unsqueeze(time)
    steps = own.size(time)
    if direction == 0:
        return torch.cat([first, own.narrow(time, 0, steps - 1)], dim=time)
    before = torch.cat([own.narrow(time, 1, steps - 1), first], dim=time)
    if lengths is None:
        return before
    # The second direction starts at each sequence's own last step.
    index = torch.arange(steps, device=h0.device)
    starts = index == lengths[:, None] - 1 if batch_first else index[:, None] == lengths - 1
    return torch.where(starts.unsqueeze(-1), first, before)
