"""The rnn family's ops: schemas and fake kernels.

One op runs one LSTM layer over a whole sequence, in one or two directions; the LSTM cell is the
same op over one step. T steps, B batch, I input features, H hidden features, D directions (one
or two).

``lstm_forward``
    input ``(T, B, I)``, or ``(B, T, I)`` with ``batch_first``, last dimension contiguous, other
    strides free. h0, c0 ``(D, B, H)`` contiguous. weights: for each direction w_ih ``(4H, I)``,
    w_hh ``(4H, H)`` and, if there are biases, b_ih ``(4H)``, b_hh ``(4H)``; gates in the order
    i, f, g, o. packed_weight: what ``lstm_pack_weight`` made of the same weights, or None.
    Returns output ``(T, B, D*H)`` (``(B, T, D*H)``), h_n and c_n ``(D, B, H)``, all contiguous and
    in the input's dtype, and for the backward the activated gates ``(D, T, B, 4H)`` in the input's
    dtype and the cell states ``(D, T, B, H)`` in float32 (float64 for float64).
``lstm_backward``
    the gradients of input, h0, c0 and of every weight, shaped and typed like them and contiguous.
``lstm_pack_weight``
    an opaque one-dimensional uint8 tensor.

An output that was not asked for is an empty tensor of shape ``(0,)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels.ops._activations import opmath_dtype

_library = torch.library.Library("fmkernels", "FRAGMENT")

_library.define(
    "lstm_forward(Tensor input, Tensor h0, Tensor c0, Tensor[] weights, Tensor? packed_weight, "
    "bool batch_first, bool save_for_backward) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
)
_library.define(
    "lstm_backward(Tensor grad_output, Tensor grad_h_n, Tensor grad_c_n, Tensor input, Tensor h0, "
    "Tensor c0, Tensor[] weights, Tensor output, Tensor gates, Tensor cells, bool batch_first, "
    "bool need_input, bool need_hx, bool need_weights) "
    "-> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_weights)"
)
_library.define("lstm_pack_weight(Tensor[] weights, bool has_biases) -> Tensor")


@torch.library.register_fake("fmkernels::lstm_forward", lib=_library)
def _lstm_forward_fake(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    packed_weight: Tensor | None,
    batch_first: bool,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    directions, batch, hidden = h0.shape
    steps = input.size(1 if batch_first else 0)
    leading = (batch, steps) if batch_first else (steps, batch)
    state_dtype = opmath_dtype(input.dtype)
    saved = (directions, steps, batch) if save_for_backward else None
    return (
        input.new_empty(*leading, directions * hidden),
        input.new_empty(directions, batch, hidden),
        input.new_empty(directions, batch, hidden),
        input.new_empty((*saved, 4 * hidden) if saved else (0,)),
        input.new_empty((*saved, hidden) if saved else (0,), dtype=state_dtype),
    )


@torch.library.register_fake("fmkernels::lstm_backward", lib=_library)
def _lstm_backward_fake(
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor,
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    batch_first: bool,
    need_input: bool,
    need_hx: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    def like(tensor: Tensor, needed: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if needed else (0,))

    return (
        like(input, need_input),
        like(h0, need_hx),
        like(c0, need_hx),
        [like(weight, need_weights) for weight in weights],
    )


@torch.library.register_fake("fmkernels::lstm_pack_weight", lib=_library)
def _lstm_pack_weight_fake(weights: list[Tensor], has_biases: bool) -> Tensor:
    # The packed size depends on the ISA of the machine, which only the kernel knows.
    size = torch.library.get_ctx().new_dynamic_size(min=64)
    return weights[0].new_empty((size,), dtype=torch.uint8)
