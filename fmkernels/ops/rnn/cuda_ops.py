"""The operators of the persistent CUDA recurrence: see csrc/cuda/rnn.h.

Letters: T steps, B batch, H hidden features, D directions, G gates (4 or 3).

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
