"""LSTM and GRU layers on the persistent CUDA recurrence: see csrc/cuda/rnn.h.

The input's share of the gates is one GEMM over all steps before the recurrence, the gradients of
weights and input are GEMMs after it; both are torch's. The recurrence itself is one launch, an
operator of cuda_ops.py.

Letters: T steps, B batch, I input features, H hidden features, D directions, G gates (4 or 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fmkernels._dispatch import SUPPORTED, Support, UnsupportedError
from fmkernels.ops._cuda_support import cuda_support, problem_of
from fmkernels.ops.rnn import cuda_ops  # noqa: F401 - defines the operators
from fmkernels.ops.rnn.schema import Sizes
from fmkernels.ops.rnn.sequences import (
    active_steps,
    per_direction,
    previous_states,
    rows_product,
    where_active,
)

_ops = torch.ops.fmkernels
PLAIN = ("tanh", "sigmoid")  # activations


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


class _Direction(NamedTuple):
    """One direction's weights; biases are None in a layer without them."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None


class _Layer:
    """One call's layer: its weights by direction, and where the steps lie in a sequence tensor."""

    def __init__(self, weights: Sequence[Tensor], h0: Tensor, batch_first: bool) -> None:
        self.h0, self.hidden = h0, h0.size(-1)
        self.directions = [_Direction(*own) for own in per_direction(weights, h0.size(0))]
        self.w_hh = [own.w_hh for own in self.directions]
        self.has_biases = self.directions[0].b_ih is not None
        self.time_dim = 1 if batch_first else 0

    def project(self, input: Tensor, biases: Sequence[Tensor]) -> Tensor:
        """W_ih x + bias of every direction: ``(D, T, B, G*H)``, or ``(D, B, T, G*H)``."""
        rows = input.reshape(-1, input.size(-1))
        weights = [own.w_ih for own in self.directions]
        if len(weights) == 1:
            projected = F.linear(rows, weights[0], *biases)
        else:
            both, rows = torch.stack(weights).transpose(1, 2), rows.expand(len(weights), -1, -1)
            if biases:
                projected = torch.baddbmm(torch.stack(list(biases)).unsqueeze(1), rows, both)
            else:
                projected = torch.bmm(rows, both)
        # Sizes in full: none can be inferred of an empty batch.
        return projected.view(len(weights), *input.shape[:2], weights[0].size(0))

    def input_gradient(self, grad_projected: Tensor, input: Tensor) -> Tensor:
        grad_input = input.new_empty(0)
        for d, own in enumerate(self.directions):
            share = grad_projected[d].flatten(0, 1) @ own.w_ih
            grad_input = share if d == 0 else grad_input.add_(share)
        return grad_input.view(input.shape)

    def weight_gradients(
        self,
        grad_projected: Tensor,
        grad_recurrent: Tensor,
        input: Tensor,
        output: Tensor,
        lengths: Tensor | None,
    ) -> list[Tensor]:
        """In the order of the weights, no two sharing memory.

        Args:
            grad_projected: gradient of W_ih x + b_ih, ``(D, T, B, G*H)`` in the input's layout.
            grad_recurrent: the same of W_hh h + b_hh.
        """
        active = active_steps(input.size(self.time_dim), lengths)
        if active is not None:
            # Past its length an input may hold anything, and 0 times infinity is not 0.
            input = where_active(self._in_layout(active), input, 0.0)
        gradients = []
        for d in range(len(self.directions)):
            own = output[..., d * self.hidden : (d + 1) * self.hidden]
            before = previous_states(self._in_layout(own), self.h0[d], d, active)
            gradients.append(rows_product(grad_projected[d], input))
            gradients.append(rows_product(grad_recurrent[d], self._in_layout(before)))
            if self.has_biases:
                gradients += [grad_projected[d].sum(dim=(0, 1)), grad_recurrent[d].sum(dim=(0, 1))]
        return gradients

    def _in_layout(self, sequence: Tensor) -> Tensor:
        """Steps first as the layer has it, and the other way round."""
        return sequence.transpose(0, self.time_dim)


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
    layer = _Layer(weights, h0, batch_first)
    biases = [own.b_ih + own.b_hh for own in layer.directions] if has_biases else []
    output, h_n, c_n, gates, cells = _ops.rnn_recurrence_forward(
        layer.project(input, biases), layer.w_hh, [], h0, c0.float().contiguous(), lengths, "lstm",
        batch_first, save_for_backward,
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
    layer = _Layer(weights, h0, batch_first)
    gates, cells = saved
    grad_gates, grad_h0, grad_c0 = _ops.rnn_recurrence_backward(
        grad_output.contiguous(), grad_h_n.contiguous(), grad_c_n.float().contiguous(), layer.w_hh,
        h0, c0.float().contiguous(), lengths, output, gates, cells, "lstm", batch_first,
    )  # fmt: skip
    absent = input.new_empty
    return (
        layer.input_gradient(grad_gates, input) if need_input else absent(0),
        grad_h0 if need_hx else absent(0),
        grad_c0.to(c0.dtype) if need_hx else c0.new_empty(0),
        layer.weight_gradients(grad_gates, grad_gates, input, output, lengths)
        if need_weights
        else [absent(0) for _ in weights],
    )


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
    layer, recurrent = _Layer(weights, h0, batch_first), 2 * h0.size(-1)
    biases, b_hn = [], []
    if has_biases:
        # The recurrence adds b_hh of n, which r multiplies.
        for own in layer.directions:
            biases.append(torch.cat([(own.b_ih + own.b_hh)[:recurrent], own.b_ih[recurrent:]]))
            b_hn.append(own.b_hh[recurrent:].contiguous())
    output, h_n, _, gates, _ = _ops.rnn_recurrence_forward(
        layer.project(input, biases), layer.w_hh, b_hn, h0, None, lengths, "gru", batch_first,
        save_for_backward,
    )  # fmt: skip
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
    layer = _Layer(weights, h0, batch_first)
    no_cells = h0.new_empty(0, dtype=torch.float32)
    grad_gates, grad_h0, _ = _ops.rnn_recurrence_backward(
        grad_output.contiguous(), grad_h_n.contiguous(), None, layer.w_hh, h0, None, lengths,
        output, gates, no_cells, "gru", batch_first,
    )  # fmt: skip
    # n sees the input without r, and the hidden state through r.
    r, z, recurrent_n, input_n = grad_gates.chunk(4, dim=-1)
    grad_projected = torch.cat([r, z, input_n], dim=-1)
    absent = input.new_empty
    grad_weights = [absent(0) for _ in weights]
    if need_weights:
        grad_recurrent = torch.cat([r, z, recurrent_n], dim=-1)
        grad_weights = layer.weight_gradients(
            grad_projected, grad_recurrent, input, output, lengths
        )
    return (
        layer.input_gradient(grad_projected, input) if need_input else absent(0),
        grad_h0 if need_hx else absent(0),
        grad_weights,
    )
