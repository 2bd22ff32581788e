"""The LSTM layer in plain PyTorch: forward and a hand-written backward, without autograd.

Same signatures as the ops in schema.py, for any device and any floating dtype. Sums and the cell
state are carried in float32 for the half precisions and in the input's own dtype otherwise.

Per step, with the gates stacked in torch's order i, f, g, o (Hochreiter and Schmidhuber 1997, with
the forget gate of Gers et al. 2000)::

    i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh)      g = tanh(same)
    c' = f * c + i * g                                    h' = o * tanh(c')

Letters in shape comments: T steps, B batch, I input features, H hidden features, D directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels.ops._activations import opmath_dtype


def split_weights(weights: list[Tensor], directions: int) -> list[tuple[Tensor | None, ...]]:
    """``(w_ih, w_hh, b_ih, b_hh)`` per direction from the flat list; biases may be None."""
    per_direction = len(weights) // directions
    groups = [
        tuple(weights[d * per_direction : (d + 1) * per_direction]) for d in range(directions)
    ]
    return [group if per_direction == 4 else (*group, None, None) for group in groups]


def _time_order(steps: int, direction: int) -> range:
    return range(steps) if direction == 0 else range(steps - 1, -1, -1)


def lstm_forward(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    packed_weight: Tensor | None,
    batch_first: bool,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, state_dtype = input.dtype, opmath_dtype(input.dtype)
    time_dim = 1 if batch_first else 0
    steps = input.transpose(0, time_dim)  # (T, B, I)
    outputs, last_hidden, last_cell, all_gates, all_cells = [], [], [], [], []
    for d, (w_ih, w_hh, b_ih, b_hh) in enumerate(split_weights(weights, h0.size(0))):
        projected = steps.to(state_dtype) @ w_ih.to(state_dtype).t()  # (T, B, 4H)
        if b_ih is not None:
            projected = projected + (b_ih.to(state_dtype) + b_hh.to(state_dtype))
        recurrent = w_hh.to(state_dtype).t()
        hidden, cell = h0[d], c0[d].to(state_dtype)
        hidden_at, gates_at, cell_at = {}, {}, {}
        for t in _time_order(steps.size(0), d):
            pre = projected[t] + hidden.to(state_dtype) @ recurrent
            i, f, g, o = pre.chunk(4, dim=-1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            cell = f * cell + i * g
            hidden = (o * cell.tanh()).to(dtype)
            hidden_at[t], cell_at[t] = hidden, cell
            if save_for_backward:
                gates_at[t] = torch.cat([i, f, g, o], dim=-1).to(dtype)
        outputs.append(torch.stack([hidden_at[t] for t in range(len(hidden_at))], dim=time_dim))
        last_hidden.append(hidden)
        last_cell.append(cell.to(dtype))
        if save_for_backward:
            all_gates.append(torch.stack([gates_at[t] for t in range(len(gates_at))]))
            all_cells.append(torch.stack([cell_at[t] for t in range(len(cell_at))]))
    if save_for_backward:
        gates, cells = torch.stack(all_gates), torch.stack(all_cells)
    else:
        gates, cells = input.new_empty(0), input.new_empty(0, dtype=state_dtype)
    return (
        torch.cat(outputs, dim=-1),
        torch.stack(last_hidden),
        torch.stack(last_cell),
        gates,
        cells,
    )


def lstm_backward(
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
    dtype, state_dtype = input.dtype, opmath_dtype(input.dtype)
    time_dim = 1 if batch_first else 0
    steps = input.transpose(0, time_dim).to(state_dtype)  # (T, B, I)
    grad_steps = torch.zeros_like(steps)
    hidden_size = h0.size(-1)
    grad_h0, grad_c0, grad_weights = [], [], []
    for d, (w_ih, w_hh, b_ih, _) in enumerate(split_weights(weights, h0.size(0))):
        own = slice(d * hidden_size, (d + 1) * hidden_size)
        hiddens = output[..., own].transpose(0, time_dim).to(state_dtype)  # (T, B, H)
        grad_hiddens = grad_output[..., own].transpose(0, time_dim).to(state_dtype)
        first_hidden, first_cell = h0[d : d + 1].to(state_dtype), c0[d : d + 1].to(state_dtype)
        cell_states = cells[d]
        # What each step started from: its predecessor in this direction's order.
        if d == 0:
            previous_hiddens = torch.cat([first_hidden, hiddens[:-1]])
            previous_cells = torch.cat([first_cell, cell_states[:-1]])
        else:
            previous_hiddens = torch.cat([hiddens[1:], first_hidden])
            previous_cells = torch.cat([cell_states[1:], first_cell])
        recurrent = w_hh.to(state_dtype)
        grad_hidden, grad_cell = grad_h_n[d].to(state_dtype), grad_c_n[d].to(state_dtype)
        grad_pre_at = {}
        for t in reversed(_time_order(steps.size(0), d)):
            i, f, g, o = gates[d, t].to(state_dtype).chunk(4, dim=-1)
            tanh_cell = cell_states[t].tanh()
            grad_hidden = grad_hidden + grad_hiddens[t]
            grad_cell = grad_cell + grad_hidden * o * (1 - tanh_cell * tanh_cell)
            grad_pre = torch.cat(
                [
                    grad_cell * g * i * (1 - i),
                    grad_cell * previous_cells[t] * f * (1 - f),
                    grad_cell * i * (1 - g * g),
                    grad_hidden * tanh_cell * o * (1 - o),
                ],
                dim=-1,
            )
            grad_pre_at[t] = grad_pre
            grad_cell = grad_cell * f
            grad_hidden = grad_pre @ recurrent
        grad_pres = torch.stack([grad_pre_at[t] for t in range(len(grad_pre_at))])  # (T, B, 4H)
        grad_h0.append(grad_hidden)
        grad_c0.append(grad_cell)
        if need_input:
            grad_steps = grad_steps + grad_pres @ w_ih.to(state_dtype)
        if need_weights:
            rows = grad_pres.flatten(0, 1).t()  # (4H, T * B)
            grad_weights.append((rows @ steps.flatten(0, 1)).to(w_ih.dtype))
            grad_weights.append((rows @ previous_hiddens.flatten(0, 1)).to(w_hh.dtype))
            if b_ih is not None:
                grad_bias = rows.sum(dim=1).to(b_ih.dtype)
                # An op's outputs may not alias, hence the copy for the second bias.
                grad_weights.extend([grad_bias, grad_bias.clone()])
    absent = input.new_empty
    return (
        grad_steps.transpose(0, time_dim).to(dtype).contiguous() if need_input else absent(0),
        torch.stack(grad_h0).to(dtype) if need_hx else absent(0),
        torch.stack(grad_c0).to(dtype) if need_hx else absent(0),
        grad_weights if need_weights else [absent(0) for _ in weights],
    )
