"""The plain recurrent layer (Elman 1990); the package's docstring says what it is for.

Per step: ``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``, or relu of the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels.ops._activations import opmath_dtype
from fmkernels.ops.rnn.sequences import (
    active_steps,
    as_weights,
    per_direction,
    previous_states,
    rows_product,
    time_order,
    where_active,
)


def rnn_forward(
    input: Tensor,
    h0: Tensor,
    weights: list[Tensor],
    packed_weight: Tensor | None,
    lengths: Tensor | None,
    nonlinearity: str,
    has_biases: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    dtype, state_dtype = input.dtype, opmath_dtype(input.dtype)
    time_dim = 1 if batch_first else 0
    steps = input.transpose(0, time_dim).to(state_dtype)  # (T, B, I)
    active = active_steps(steps.size(0), lengths)
    function = torch.tanh if nonlinearity == "tanh" else torch.relu
    outputs, last = [], []
    for d, own in enumerate(per_direction(weights, h0.size(0))):
        w_ih, w_hh, *biases = (weight.to(state_dtype) for weight in own)
        projected = steps @ w_ih.t() + (biases[0] + biases[1] if has_biases else 0.0)
        hidden, output_at = h0[d], {}
        for t in time_order(steps.size(0), d):
            now = None if active is None else active[t]
            new = function(projected[t] + hidden.to(state_dtype) @ w_hh.t()).to(dtype)
            hidden = where_active(now, new, hidden)
            output_at[t] = where_active(now, new, 0.0)
        outputs.append(torch.stack([output_at[t] for t in range(len(output_at))], dim=time_dim))
        last.append(hidden)
    return torch.cat(outputs, dim=-1), torch.stack(last)


def rnn_backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    input: Tensor,
    h0: Tensor,
    weights: list[Tensor],
    output: Tensor,
    lengths: Tensor | None,
    nonlinearity: str,
    has_biases: bool,
    batch_first: bool,
    need_input: bool,
    need_hx: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype, state_dtype = input.dtype, opmath_dtype(input.dtype)
    time_dim = 1 if batch_first else 0
    steps = input.transpose(0, time_dim).to(state_dtype)
    active = active_steps(steps.size(0), lengths)
    steps = where_active(active, steps, 0.0)
    grad_steps = torch.zeros_like(steps)
    size = h0.size(-1)
    grad_h0, grad_weights = [], []
    for d, own in enumerate(per_direction(weights, h0.size(0))):
        w_ih, w_hh = own[0].to(state_dtype), own[1].to(state_dtype)
        columns = slice(d * size, (d + 1) * size)
        hiddens = output[..., columns].transpose(0, time_dim).to(state_dtype)  # (T, B, H)
        grad_hiddens = grad_output[..., columns].transpose(0, time_dim).to(state_dtype)
        previous = previous_states(hiddens, h0[d].to(state_dtype), d, active)
        grad_hidden, grad_pre_at = grad_h_n[d].to(state_dtype), {}
        for t in reversed(time_order(steps.size(0), d)):
            now = None if active is None else active[t]
            total = grad_hidden + grad_hiddens[t]
            if nonlinearity == "tanh":
                grad_pre = total * (1 - hiddens[t] * hiddens[t])
            else:
                grad_pre = torch.ops.aten.threshold_backward(total, hiddens[t], 0)
            grad_pre_at[t] = where_active(now, grad_pre, 0.0)
            grad_hidden = where_active(now, grad_pre @ w_hh, grad_hidden)
        grad_pres = torch.stack([grad_pre_at[t] for t in range(len(grad_pre_at))])
        grad_h0.append(grad_hidden)
        if need_input:
            grad_steps = grad_steps + grad_pres @ w_ih
        if need_weights:
            gradients = [rows_product(grad_pres, steps), rows_product(grad_pres, previous)]
            if has_biases:
                gradients += [grad_pres.sum(dim=(0, 1))] * 2
            grad_weights += as_weights(gradients, own)
    absent = input.new_empty
    return (
        grad_steps.transpose(0, time_dim).to(dtype).contiguous() if need_input else absent(0),
        torch.stack(grad_h0).to(dtype) if need_hx else absent(0),
        grad_weights if need_weights else [absent(0) for _ in weights],
    )
