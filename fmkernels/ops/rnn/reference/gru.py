"""The GRU layer; the package's docstring says what it is for.

Per step, gates in torch's order r, z, n (Cho et al. 2014, with the reset gate applied after the
product as in torch and cuDNN)::

    r, z = sigmoid(W_i x + b_i + W_h h + b_h)
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))        h' = (1 - z) * n + z * h
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
    dtype, state_dtype = input.dtype, opmath_dtype(input.dtype)
    time_dim = 1 if batch_first else 0
    steps = input.transpose(0, time_dim).to(state_dtype)  # (T, B, I)
    active = active_steps(steps.size(0), lengths)
    outputs, last, all_gates = [], [], []
    for d, own in enumerate(per_direction(weights, h0.size(0))):
        w_ih, w_hh, *biases = (weight.to(state_dtype) for weight in own)
        b_ih, b_hh = biases if has_biases else (0.0, 0.0)
        projected = steps @ w_ih.t() + b_ih  # (T, B, 3H)
        hidden, output_at, gates_at = h0[d], {}, {}
        for t in time_order(steps.size(0), d):
            state = hidden.to(state_dtype)
            x_r, x_z, x_n = projected[t].chunk(3, dim=-1)
            h_r, h_z, h_n = (state @ w_hh.t() + b_hh).chunk(3, dim=-1)
            r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
            n = (x_n + r * h_n).tanh()
            now = None if active is None else active[t]
            new = (n + z * (state - n)).to(dtype)
            hidden = where_active(now, new, hidden)
            output_at[t] = where_active(now, new, 0.0)
            if save_for_backward:
                gates = torch.cat([r, z, n, h_n], dim=-1)
                gates_at[t] = where_active(now, gates, 0.0).to(dtype)
        outputs.append(torch.stack([output_at[t] for t in range(len(output_at))], dim=time_dim))
        last.append(hidden)
        if save_for_backward:
            all_gates.append(torch.stack([gates_at[t] for t in range(len(gates_at))]))
    saved = torch.stack(all_gates) if save_for_backward else input.new_empty(0)
    return torch.cat(outputs, dim=-1), torch.stack(last), saved


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
        grad_hidden = grad_h_n[d].to(state_dtype)
        grad_x_at, grad_h_at = {}, {}
        for t in reversed(time_order(steps.size(0), d)):
            r, z, n, h_n = gates[d, t].to(state_dtype).chunk(4, dim=-1)
            now = None if active is None else active[t]
            total = grad_hidden + grad_hiddens[t]
            grad_n = total * (1 - z) * (1 - n * n)
            grad_z = total * (previous[t] - n) * z * (1 - z)
            grad_r = grad_n * h_n * r * (1 - r)
            grad_x = torch.cat([grad_r, grad_z, grad_n], dim=-1)
            grad_h = torch.cat([grad_r, grad_z, grad_n * r], dim=-1)
            grad_x_at[t] = where_active(now, grad_x, 0.0)
            grad_h_at[t] = where_active(now, grad_h, 0.0)
            grad_hidden = where_active(now, total * z + grad_h @ w_hh, grad_hidden)
        grad_xs = torch.stack([grad_x_at[t] for t in range(len(grad_x_at))])  # (T, B, 3H)
        grad_hs = torch.stack([grad_h_at[t] for t in range(len(grad_h_at))])
        grad_h0.append(grad_hidden)
        if need_input:
            grad_steps = grad_steps + grad_xs @ w_ih
        if need_weights:
            gradients = [rows_product(grad_xs, steps), rows_product(grad_hs, previous)]
            if has_biases:
                gradients += [grad_xs.sum(dim=(0, 1)), grad_hs.sum(dim=(0, 1))]
            grad_weights += as_weights(gradients, own)
    absent = input.new_empty
    return (
        grad_steps.transpose(0, time_dim).to(dtype).contiguous() if need_input else absent(0),
        torch.stack(grad_h0).to(dtype) if need_hx else absent(0),
        grad_weights if need_weights else [absent(0) for _ in weights],
    )
