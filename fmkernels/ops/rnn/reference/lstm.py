"""The LSTM layer with its variants; the package's docstring says what it is for.

Per step, gates in torch's order i, f, g, o (Hochreiter and Schmidhuber 1997, with the forget gate
of Gers et al. 2000), R being the recurrent activation and A the activation, sigmoid and tanh
unless said otherwise::

    a = W_ih x + b_ih + W_hh (m * h) + b_hh                             m: recurrent dropout or 1
    i = R(a_i + p_i * c)    f = R(a_f + p_f * c)    g = A(a_g)          p: peepholes or 0
    c~ = f * c + i * g      o = R(a_o + p_o * c~)   h~ = W_hr (o * A(c~))   W_hr: projection or 1
    c' = k_c * c + (1 - k_c) * c~                   h' = k_h * h + (1 - k_h) * h~   k: zoneout or 0

Peepholes: Gers and Schmidhuber 2000. Recurrent dropout: Gal and Ghahramani 2016, one mask for all
steps. Zoneout: Krueger et al. 2017, k is a mask in training and its expectation afterwards.
Layer norm: Ba et al. 2016, equations 20 to 22, with N(v) = (v - mean) / sqrt(variance + eps)::

    a = norm_ih * N(W_ih x) + b_ih + norm_hh * N(W_hh (m * h)) + b_hh
    h~ = W_hr (o * A(norm_c * N(c~) + bias_c))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

ACTIVATIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "hard_sigmoid": lambda x: (x + 3).clamp(0, 6) / 6,
    "identity": lambda x: x,
}
# Derivatives by the activation's own result.
_DERIVATIVES = {
    "tanh": lambda y: 1 - y * y,
    "sigmoid": lambda y: y * (1 - y),
    "relu": lambda y: (y > 0).to(y.dtype),
    "hard_sigmoid": lambda y: ((y > 0) & (y < 1)).to(y.dtype) / 6,
    "identity": torch.ones_like,
}


@dataclass
class _Weights:
    """One direction's weights in the state dtype; None where the layer has no such weight."""

    w_ih: Tensor
    w_hh: Tensor
    bias: Tensor | None = None
    w_hr: Tensor | None = None
    peephole: Tensor | None = None
    norm_ih: Tensor | None = None
    norm_hh: Tensor | None = None
    norm_c: Tensor | None = None
    bias_c: Tensor | None = None

    @classmethod
    def of(
        cls, weights: Sequence[Tensor], hidden: int, biases: bool, peephole: bool, norm: bool
    ) -> _Weights:
        rest = [weight.to(opmath_dtype(weight.dtype)) for weight in weights]
        own = cls(rest.pop(0), rest.pop(0))
        if biases:
            own.bias = rest.pop(0) + rest.pop(0)
        if own.w_hh.size(1) != hidden:
            own.w_hr = rest.pop(0)
        if peephole:
            own.peephole = rest.pop(0)
        if norm:
            own.norm_ih, own.norm_hh, own.norm_c = rest[:3]
            own.bias_c = rest[3] if biases else None
        return own

    def squash(self, cell: Tensor, activation: str, eps: float) -> tuple[Tensor, ...]:
        """A of the (normalised) cell; with layer norm also N(c~) and its scale."""
        if self.norm_c is None:
            return (ACTIVATIONS[activation](cell),)
        normed, scale = _normalize(cell, eps)
        scaled = normed * self.norm_c
        if self.bias_c is not None:
            scaled = scaled + self.bias_c
        return ACTIVATIONS[activation](scaled), normed, scale


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """N(x) and the reciprocal standard deviations."""
    centered = x - x.mean(dim=-1, keepdim=True)
    scale = (centered.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return centered * scale, scale


def _normalize_backward(grad: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    mean = grad.mean(dim=-1, keepdim=True)
    along = (grad * normed).mean(dim=-1, keepdim=True)
    return (grad - mean - normed * along) * scale


def _mix(keep: Tensor | float, old: Tensor, new: Tensor) -> Tensor:
    """``keep`` says where, or how much of, the old value stays."""
    if isinstance(keep, Tensor):
        return torch.where(keep, old, new)
    return new if keep == 0.0 else keep * old + (1 - keep) * new


def _part(keep: Tensor | float, value: Tensor, kept: bool) -> Tensor:
    """What of a gradient goes to the old value (``kept``) or to the new one."""
    if isinstance(keep, Tensor):
        zeros = torch.zeros_like(value)
        return torch.where(keep, value, zeros) if kept else torch.where(keep, zeros, value)
    if keep == 0.0:
        return torch.zeros_like(value) if kept else value
    return value * (keep if kept else 1 - keep)


def _rounded_gate(gate: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    """A gate as it is saved. A hard sigmoid below 1 must not round to 1, where its slope is 0."""
    if activation == "hard_sigmoid" and dtype != gate.dtype:
        gate = torch.where(gate < 1, gate.clamp(max=1 - torch.finfo(dtype).eps / 2), gate)
    return gate.to(dtype)


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
    dtype, state_dtype = input.dtype, opmath_dtype(input.dtype)
    time_dim, size = (1 if batch_first else 0), c0.size(-1)
    act, recurrent_act = ACTIVATIONS[activation], ACTIVATIONS[recurrent_activation]
    steps = input.transpose(0, time_dim).to(state_dtype)  # (T, B, I)
    active = active_steps(steps.size(0), lengths)
    outputs, last_hidden, last_cell, cell_states, saved = [], [], [], [], []
    for d, own in enumerate(per_direction(weights, h0.size(0))):
        w = _Weights.of(own, size, has_biases, peephole, layer_norm)
        projected = steps @ w.w_ih.t()  # (T, B, 4H)
        if w.norm_ih is not None:
            normed_ih, scale_ih = _normalize(projected, norm_eps)
            projected = normed_ih * w.norm_ih
        if w.bias is not None:
            projected = projected + w.bias
        hidden, cell = h0[d], c0[d].to(state_dtype)
        at: dict[int, tuple[Tensor, ...]] = {}
        normed_at: dict[int, tuple[Tensor, Tensor]] = {}
        for t in time_order(steps.size(0), d):
            now = None if active is None else active[t]
            state = hidden.to(state_dtype)
            if recurrent_mask is not None:
                state = state * recurrent_mask[d].to(state_dtype)
            from_hidden = state @ w.w_hh.t()
            if w.norm_hh is not None:
                normed_at[t] = _normalize(from_hidden, norm_eps)
                from_hidden = normed_at[t][0] * w.norm_hh
            i, f, g, o = (projected[t] + from_hidden).chunk(4, dim=-1)
            if w.peephole is not None:
                i, f = i + w.peephole[0] * cell, f + w.peephole[1] * cell
            i, f, g = recurrent_act(i), recurrent_act(f), act(g)
            new_cell = f * cell + i * g
            if w.peephole is not None:
                o = o + w.peephole[2] * new_cell
            o = recurrent_act(o)
            new_hidden = o * w.squash(new_cell, activation, norm_eps)[0]
            if w.w_hr is not None:
                new_hidden = new_hidden @ w.w_hr.t()
            keep_h = zoneout if zoneout_h is None else zoneout_h[d, t]
            keep_c = zoneout if zoneout_c is None else zoneout_c[d, t]
            new_hidden = _mix(keep_h, hidden.to(state_dtype), new_hidden).to(dtype)
            new_cell = _mix(keep_c, cell, new_cell)
            hidden, cell = (
                where_active(now, new_hidden, hidden),
                where_active(now, new_cell, cell),
            )
            gates = [_rounded_gate(gate, recurrent_activation, dtype) for gate in (i, f, o)]
            gates.insert(2, _rounded_gate(g, activation, dtype))
            at[t] = (
                where_active(now, new_hidden, 0.0),
                where_active(now, new_cell, 0.0),
                where_active(now, torch.cat(gates, dim=-1), 0.0),
            )
        hiddens, cells, gates = (
            torch.stack([at[t][kind] for t in range(len(at))]) for kind in range(3)
        )
        outputs.append(hiddens)
        cell_states.append(cells)
        last_hidden.append(hidden)
        last_cell.append(cell.to(c0.dtype))
        own_saved = [gates, cells]
        if layer_norm:
            normed_hh, scale_hh = (
                torch.stack([normed_at[t][kind] for t in range(len(at))]) for kind in range(2)
            )
            scales = torch.cat([scale_ih, scale_hh], dim=-1)
            own_saved += [normed_ih.to(dtype), normed_hh.to(dtype), scales]
        saved.append(own_saved)

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=-1).transpose(0, time_dim).to(dtype).contiguous()

    return (
        joined(outputs),
        torch.stack(last_hidden),
        torch.stack(last_cell),
        joined(cell_states) if return_cells else input.new_empty(0),
        [torch.stack(parts) for parts in zip(*saved, strict=True)] if save_for_backward else [],
    )


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
    dtype, state_dtype = input.dtype, opmath_dtype(input.dtype)
    time_dim, size, projected_size = (1 if batch_first else 0), c0.size(-1), h0.size(-1)
    slope, recurrent_slope = _DERIVATIVES[activation], _DERIVATIVES[recurrent_activation]
    steps = input.transpose(0, time_dim).to(state_dtype)  # (T, B, I)
    active = active_steps(steps.size(0), lengths)
    steps = where_active(active, steps, 0.0)
    grad_steps = torch.zeros_like(steps)
    grad_h0, grad_c0, grad_weights = [], [], []
    for d, own in enumerate(per_direction(weights, h0.size(0))):
        w = _Weights.of(own, size, has_biases, peephole, layer_norm)

        def columns(tensor: Tensor, width: int, d: int = d) -> Tensor:
            part = tensor[..., d * width : (d + 1) * width]
            return part.transpose(0, time_dim).to(state_dtype)  # (T, B, width)

        grad_hiddens = columns(grad_output, projected_size)
        hiddens = columns(output, projected_size)
        before_h = previous_states(hiddens, h0[d].to(state_dtype), d, active)
        before_c = previous_states(saved[1][d], c0[d].to(state_dtype), d, active)
        grad_states = None if grad_cells is None else columns(grad_cells, size)
        grad_hidden, grad_cell = grad_h_n[d].to(state_dtype), grad_c_n[d].to(state_dtype)
        # Per step: dG, the gradients of W_ih x and W_hh h, of h~, o * A, and what norm_c gets.
        at: dict[int, list[Tensor]] = {}
        for t in reversed(time_order(steps.size(0), d)):
            now = None if active is None else active[t]
            i, f, g, o = saved[0][d, t].to(state_dtype).chunk(4, dim=-1)
            keep_h = zoneout if zoneout_h is None else zoneout_h[d, t]
            keep_c = zoneout if zoneout_c is None else zoneout_c[d, t]
            # c~ itself is saved unless zoneout has mixed it.
            unmixed = not isinstance(keep_c, Tensor) and keep_c == 0.0
            cell = saved[1][d, t] if unmixed else f * before_c[t] + i * g
            total_h = grad_hidden + grad_hiddens[t]
            total_c = grad_cell if grad_states is None else grad_cell + grad_states[t]
            grad_new_h = _part(keep_h, total_h, False)
            grad_gated = grad_new_h if w.w_hr is None else grad_new_h @ w.w_hr
            squashed, *norm = w.squash(cell, activation, norm_eps)
            grad_o = grad_gated * squashed * recurrent_slope(o)
            through = grad_normed = grad_gated * o * slope(squashed)
            if norm:
                through = _normalize_backward(grad_normed * w.norm_c, *norm)
            grad_new_c = _part(keep_c, total_c, False) + through
            if w.peephole is not None:
                grad_new_c = grad_new_c + grad_o * w.peephole[2]
            grad_i = grad_new_c * g * recurrent_slope(i)
            grad_f = grad_new_c * before_c[t] * recurrent_slope(f)
            grad_g = grad_new_c * i * slope(g)
            grad_pre = torch.cat([grad_i, grad_f, grad_g, grad_o], dim=-1)
            carried_c = _part(keep_c, total_c, True) + grad_new_c * f
            if w.peephole is not None:
                carried_c = carried_c + grad_i * w.peephole[0] + grad_f * w.peephole[1]
            grad_x = grad_state = grad_pre
            if w.norm_ih is not None:
                scale_ih, scale_hh = saved[4][d, t].split(1, dim=-1)
                normed_ih, normed_hh = (saved[k][d, t].to(state_dtype) for k in (2, 3))
                grad_x = _normalize_backward(grad_pre * w.norm_ih, normed_ih, scale_ih)
                grad_state = _normalize_backward(grad_pre * w.norm_hh, normed_hh, scale_hh)
            carried_h = grad_state @ w.w_hh
            if recurrent_mask is not None:
                carried_h = carried_h * recurrent_mask[d].to(state_dtype)
            carried_h = _part(keep_h, total_h, True) + carried_h
            grad_hidden = where_active(now, carried_h, grad_hidden)
            grad_cell = where_active(now, carried_c, grad_cell)
            rows = [grad_pre, grad_x, grad_state, grad_new_h, o * squashed, cell, grad_normed]
            rows += norm[:1]
            at[t] = [where_active(now, row, 0.0) for row in rows]
        pre, grad_xs, grad_states_hh, grad_new_hs, gated, cells, grad_normeds, *normed_c = (
            torch.stack([at[t][kind] for t in range(len(at))]) for kind in range(len(rows))
        )
        grad_h0.append(grad_hidden)
        grad_c0.append(grad_cell)
        if need_input:
            grad_steps = grad_steps + grad_xs @ w.w_ih
        if not need_weights:
            continue
        if recurrent_mask is not None:
            before_h = before_h * recurrent_mask[d].to(state_dtype)
        before_h = where_active(active, before_h, 0.0)
        gradients = [rows_product(grad_xs, steps), rows_product(grad_states_hh, before_h)]

        def total(tensor: Tensor) -> Tensor:
            return tensor.sum(dim=(0, 1))

        if has_biases:
            gradients += [total(pre)] * 2
        if w.w_hr is not None:
            gradients.append(rows_product(grad_new_hs, gated))
        if peephole:
            grad_i, grad_f, _, grad_o = pre.chunk(4, dim=-1)
            seen = where_active(active, before_c, 0.0)
            rows = [total(grad_i * seen), total(grad_f * seen), total(grad_o * cells)]
            gradients.append(torch.stack(rows))
        if layer_norm:
            normed_ih, normed_hh = (saved[k][d].to(state_dtype) for k in (2, 3))
            normed_ih, normed_hh = (where_active(active, n, 0.0) for n in (normed_ih, normed_hh))
            gradients += [total(pre * normed_ih), total(pre * normed_hh)]
            gradients.append(total(grad_normeds * normed_c[0]))
            if has_biases:
                gradients.append(total(grad_normeds))
        grad_weights += as_weights(gradients, own)
    absent = input.new_empty
    return (
        grad_steps.transpose(0, time_dim).to(dtype).contiguous() if need_input else absent(0),
        torch.stack(grad_h0).to(dtype) if need_hx else absent(0),
        torch.stack(grad_c0).to(c0.dtype) if need_hx else c0.new_empty(0),
        grad_weights if need_weights else [absent(0) for _ in weights],
    )
