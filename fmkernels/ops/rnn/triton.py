"""The recurrent ops on Triton kernels: the launchers, with the signatures of reference/.

Before the loop, W_ih x of all steps is one product; the loop is one launch (``*_sequence_*``)
where the recurrent weights fit a multiprocessor, else one launch per step; after it, the gradients
of the input and of the weights are products over all steps at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fmkernels.ops._triton.launch import Config, architecture, dot_precision, launch
from fmkernels.ops._triton.support import unsupported
from fmkernels.ops.rnn import triton_configs as configs
from fmkernels.ops.rnn.schema import LSTMOptions
from fmkernels.ops.rnn.triton_lstm import lstm_sequence_bwd_kernel, lstm_sequence_fwd_kernel
from fmkernels.ops.rnn.triton_simple import (
    gru_sequence_bwd_kernel,
    gru_sequence_fwd_kernel,
    rnn_sequence_bwd_kernel,
    rnn_sequence_fwd_kernel,
)
from fmkernels.ops.rnn.triton_steps import (
    gru_step_bwd_kernel,
    gru_step_fwd_kernel,
    lstm_step_bwd_kernel,
    lstm_step_fwd_kernel,
    rnn_step_bwd_kernel,
    rnn_step_fwd_kernel,
)


class _Layer:
    """One layer's sizes, strides, weights stacked over the directions, and launch shapes."""

    def __init__(
        self,
        kind: str,
        input: Tensor,
        h0: Tensor,
        hidden: int,
        weights: list[Tensor],
        names: tuple[str, ...],
        batch_first: bool,
    ) -> None:
        self.kind, self.input, self.hidden, self.batch_first = kind, input, hidden, batch_first
        self.time_dim = 1 if batch_first else 0
        self.steps, self.batch = input.size(self.time_dim), input.size(1 - self.time_dim)
        self.directions, self.projected = h0.size(0), h0.size(2)
        self.names = names
        self.weights = weights
        per_direction = len(weights) // self.directions
        self.stacked = {
            name: _stack(weights[index::per_direction]) for index, name in enumerate(names)
        }
        self.block_h = max(16, triton.next_power_of_2(hidden))
        self.block_p = max(16, triton.next_power_of_2(self.projected))
        self.precision = dot_precision(input, "matmul")

    def __getitem__(self, name: str) -> Tensor | None:
        """A weight, stacked over the directions; None if the layer has none of the name."""
        return self.stacked.get(name)

    def fits_sequence_kernel(self) -> bool:
        return self._sequence_case() in configs.SEQUENCE[self.kind][architecture()]

    def _sequence_case(self) -> str:
        return configs.sequence_case(self.input.element_size(), max(self.block_h, self.block_p))

    def sequence_launch(self) -> tuple[tuple[int], Config]:
        config = configs.SEQUENCE[self.kind][architecture()][self._sequence_case()]
        return (self.directions * triton.cdiv(self.batch, config["BLOCK_B"]),), config

    def step_launch(self, table: Any) -> tuple[tuple[int], Config]:
        config = table[architecture()][configs.step_case(self.batch, self.input.element_size())]
        tiles = triton.cdiv(self.batch, config["BLOCK_B"])
        return (self.directions * tiles * triton.cdiv(self.hidden, config["BLOCK_U"]),), config

    def time_order(self, tensor: Tensor) -> tuple[int, int]:
        """Strides of step and sequence of a tensor in the input's layout."""
        return tensor.stride(self.time_dim), tensor.stride(1 - self.time_dim)

    def leading(self) -> tuple[int, int]:
        """The first two sizes of a tensor in the input's layout."""
        return (self.batch, self.steps) if self.batch_first else (self.steps, self.batch)

    def project_input(self) -> tuple[Tensor, tuple[int, int, int]]:
        """W_ih x, rows in the input's order; its strides of direction, step, sequence."""
        rows = self.input.reshape(-1, self.input.size(2))
        w_ih = self["w_ih"]
        products = torch.matmul(rows, w_ih.transpose(1, 2))  # (D, rows, gates * H)
        step, sequence = (1, self.steps) if self.batch_first else (self.batch, 1)
        width = products.size(2)
        return products, (products.stride(0), step * width, sequence * width)

    def rows(self, tensor: Tensor, width: int) -> Tensor:
        """(T, B, D * width) or (B, T, D * width) as (D, T, B, width)."""
        return tensor.transpose(0, self.time_dim).unflatten(2, (-1, width)).permute(2, 0, 1, 3)

    def active(self, lengths: Tensor | None) -> Tensor | None:
        """(T, B, 1): whether a sequence takes part in a step; None if all always do."""
        if lengths is None:
            return None
        steps = torch.arange(self.steps, device=lengths.device)
        return (steps.unsqueeze(1) < lengths).unsqueeze(-1)

    def states_before(self, states: Tensor, first: Tensor, active: Tensor | None) -> Tensor:
        """(D, T, B, width): what each step started from, given the states after each, and zeros
        where a sequence takes no part."""
        before = torch.empty_like(states, memory_format=torch.contiguous_format)
        before[0, 0] = first[0]
        before[0, 1:] = states[0, :-1]
        if self.directions == 2:
            before[1, -1] = first[1]
            before[1, :-1] = states[1, 1:]
        if active is None:
            return before
        if self.directions == 2:
            # A sequence enters the second direction at its own last step.
            goes_on = torch.cat([active[1:], torch.zeros_like(active[:1])])
            before[1] = torch.where(goes_on, before[1], first[1])
        return torch.where(active, before, torch.zeros_like(before))

    def input_gradient(self, dprojected: Tensor) -> Tensor:
        """From the gradients of W_ih x, (D, T, B, gates * H), to the input's."""
        products = torch.matmul(dprojected.flatten(1, 2), self["w_ih"])  # (D, T * B, I)
        total = products[0] if self.directions == 1 else products[0] + products[1]
        total = total.view(self.steps, self.batch, -1)
        return total.transpose(0, self.time_dim).contiguous()

    def weight_gradient(self, rows: Tensor, columns: Tensor) -> Tensor:
        """rows columns^T, summed over steps and sequences; each (D, T, B, ..) or (T, B, ..)."""
        return torch.matmul(rows.flatten(-3, -2).transpose(-2, -1), columns.flatten(-3, -2))

    def input_rows(self, active: Tensor | None) -> Tensor:
        """The input as (T, B, I), zeros where a sequence takes no part."""
        steps = self.input.transpose(0, self.time_dim)
        return steps if active is None else torch.where(active, steps, steps.new_zeros(()))

    def as_weights(self, gradients: dict[str, Tensor]) -> list[Tensor]:
        """The flat list of gradients in the order of the weights, no two sharing memory."""
        per_direction = len(self.names)
        out = []
        for index, weight in enumerate(self.weights):
            gradient = gradients[self.names[index % per_direction]][index // per_direction]
            out.append(gradient.to(weight.dtype, copy=True).contiguous())
        return out


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def _summed(tensor: Tensor) -> Tensor:
    """Over steps and sequences, in float32."""
    return tensor.sum(dim=(1, 2), dtype=torch.float32)


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _final_state_gradient(
    layer: _Layer, dh: Tensor, drecurrent: Tensor, factors: Tensor | None
) -> Tensor:
    """dh of the initial states: what stays of it, and what the first step sends through W_hh."""
    firsts = torch.stack(
        [drecurrent[d, 0 if d == 0 else layer.steps - 1] for d in range(layer.directions)]
    )
    carried = torch.matmul(firsts, layer["w_hh"]).to(dh.dtype)
    return dh + (carried if factors is None else carried * factors)


# --- LSTM ---


def _lstm_layer(
    input: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor], options: LSTMOptions, first: bool
) -> _Layer:
    names = ["w_ih", "w_hh"]
    if options.has_biases:
        names += ["b_ih", "b_hh"]
    if h0.size(2) != c0.size(2):
        names.append("w_hr")
    if options.peephole:
        names.append("peephole")
    if options.layer_norm:
        names += ["norm_ih", "norm_hh", "norm_c"]
        if options.has_biases:
            names.append("bias_c")
    return _Layer("lstm", input, h0, c0.size(2), weights, tuple(names), first)


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
    options = LSTMOptions(
        has_biases, peephole, layer_norm, activation, recurrent_activation, zoneout, norm_eps
    )
    layer = _lstm_layer(input, h0, c0, weights, options, batch_first)
    hidden, rows = layer.hidden, (layer.directions, layer.steps, layer.batch)
    output = input.new_empty(*layer.leading(), layer.directions * layer.projected)
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    states = input.new_empty(*layer.leading(), layer.directions * hidden) if return_cells else None
    gates = cells = normed_hh = scales = None
    if save_for_backward:
        gates = input.new_empty(*rows, 4 * hidden)
        cells = input.new_empty(*rows, hidden, dtype=torch.float32)
        if layer_norm:
            normed_hh = input.new_empty(*rows, 4 * hidden)
            scales = input.new_empty(*rows, 2, dtype=torch.float32)
    masks = (lengths, recurrent_mask, _as_bytes(zoneout_h), _as_bytes(zoneout_c))
    results = (output, h_n, c_n, states, gates, cells)
    share = float(zoneout) if zoneout > 0.0 and zoneout_h is None else None
    whole_rows = layer_norm or layer.projected != hidden
    if whole_rows and not layer.fits_sequence_kernel():
        raise unsupported("lstm", _too_wide(layer))
    if layer.fits_sequence_kernel() and (layer.steps > 1 or whole_rows):
        normed_ih = _lstm_sequence(
            layer, h0, c0, masks, results, (normed_hh, scales), options, share
        )
    else:
        normed_ih = None
        _lstm_steps(layer, h0, c0, masks, results, options, share)
    saved = [gates, cells] if save_for_backward else []
    if save_for_backward and layer_norm:
        saved += [normed_ih, normed_hh, scales]
    return output, h_n, c_n, input.new_empty(0) if states is None else states, saved


def _too_wide(layer: _Layer) -> str:
    return (
        "layer norm and projections need the recurrent weights on one multiprocessor, where "
        f"{max(layer.hidden, layer.projected)} features of {layer.input.dtype} do not fit"
    )


def _strides_or_zeros(layer: _Layer, tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else layer.time_order(tensor)


def _lstm_sequence(
    layer: _Layer,
    h0: Tensor,
    c0: Tensor,
    masks: tuple[Tensor | None, ...],
    results: tuple[Tensor | None, ...],
    norms: tuple[Tensor | None, Tensor | None],
    options: LSTMOptions,
    zoneout: float | None,
) -> Tensor | None:
    """One launch over all steps. Returns N(W_ih x), (D, T, B, 4H), if it is to be saved."""
    products, strides = layer.project_input()
    saved = None
    if options.layer_norm:
        products, scale = _normalize(products, options.norm_eps)
        if norms[1] is not None:
            norms[1][..., 0] = _in_time_order(layer, scale)[..., 0]
            saved = _in_time_order(layer, products).contiguous()
    output, _, _, states, _, _ = results
    grid, config = layer.sequence_launch()
    launch(
        lstm_sequence_fwd_kernel,
        grid,
        config,
        products,
        layer["w_hh"],
        layer["b_ih"],
        layer["b_hh"],
        layer["w_hr"],
        layer["peephole"],
        layer["norm_ih"],
        layer["norm_hh"],
        layer["norm_c"],
        layer["bias_c"],
        h0,
        c0,
        *masks,
        *results,
        *norms,
        strides,
        layer.time_order(output),
        _strides_or_zeros(layer, states),
        layer.steps,
        layer.batch,
        zoneout,
        float(options.norm_eps),
        HIDDEN=layer.hidden,
        PROJECTED=layer.projected,
        ACTIVATION=options.activation,
        RECURRENT_ACTIVATION=options.recurrent_activation,
        BLOCK_H=layer.block_h,
        BLOCK_P=layer.block_p,
        PRECISION=layer.precision,
    )
    return saved


def _normalize(products: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """N(x) over the last dimension in the products' dtype, and its scale in float32."""
    wide = products.float()
    normed, _, scale = torch.native_layer_norm(wide, wide.shape[-1:], None, None, eps)
    return normed.to(products.dtype), scale


def _in_time_order(layer: _Layer, rows: Tensor) -> Tensor:
    """(D, rows in the input's order, width) as (D, T, B, width)."""
    return rows.unflatten(1, layer.leading()).transpose(1, 1 + layer.time_dim)


def _lstm_steps(
    layer: _Layer,
    h0: Tensor,
    c0: Tensor,
    masks: tuple[Tensor | None, ...],
    results: tuple[Tensor | None, ...],
    options: LSTMOptions,
    zoneout: float | None,
) -> None:
    """One launch per step. A single step projects its input itself."""
    output, h_n, c_n, states, gates, cells = results
    inputs = _StepInputs(layer)
    hiddens = _Alternating(layer, h0, h_n)
    c, c_between = c0, None
    if layer.steps > 1:
        c_between = c0.new_empty(c0.shape, dtype=torch.float32)
    grid, config = layer.step_launch(configs.STEP_FORWARD)
    for step in range(layer.steps):
        h, new_h = hiddens.next(step)
        new_c = c_n if step == layer.steps - 1 else c_between
        launch(
            lstm_step_fwd_kernel,
            grid,
            config,
            *inputs.operands,
            layer["w_hh"],
            layer["b_ih"],
            layer["b_hh"],
            layer["peephole"],
            h,
            c,
            *masks,
            output,
            new_h,
            new_c,
            states,
            gates,
            cells,
            *inputs.strides,
            layer.time_order(output),
            _strides_or_zeros(layer, states),
            step,
            layer.steps,
            layer.batch,
            zoneout,
            FEATURES=layer.input.size(2),
            HIDDEN=layer.hidden,
            ACTIVATION=options.activation,
            RECURRENT_ACTIVATION=options.recurrent_activation,
            PRECISION=layer.precision,
        )
        c = new_c


class _StepInputs:
    """What the step kernels take as x, pre and w_ih, and the strides of the first two."""

    def __init__(self, layer: _Layer) -> None:
        if layer.steps == 1:
            rows = layer.input.select(layer.time_dim, 0)
            self.operands = (rows, None, layer["w_ih"])
            self.strides = (rows.stride(0), (0, 0, 0))
        else:
            products, strides = layer.project_input()
            self.operands = (None, products, None)
            self.strides = (0, strides)


class _Alternating:
    """The hidden state before and after each step: two buffers in turn between h0 and h_n."""

    def __init__(self, layer: _Layer, h0: Tensor, h_n: Tensor) -> None:
        self._steps, self._before, self._last = layer.steps, h0, h_n
        self._buffers = [torch.empty_like(h0) for _ in range(min(2, layer.steps - 1))]

    def next(self, step: int) -> tuple[Tensor, Tensor]:
        before = self._before
        last = step == self._steps - 1
        self._before = self._last if last else self._buffers[step % len(self._buffers)]
        return before, self._before


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
    options = LSTMOptions(
        has_biases, peephole, layer_norm, activation, recurrent_activation, zoneout, norm_eps
    )
    layer = _lstm_layer(input, h0, c0, weights, options, batch_first)
    masks = (lengths, recurrent_mask, _as_bytes(zoneout_h), _as_bytes(zoneout_c))
    share = float(zoneout) if zoneout > 0.0 and zoneout_h is None else None
    incoming = (grad_output, grad_h_n, grad_c_n, grad_cells)
    whole_rows = layer_norm or layer.projected != layer.hidden
    if layer.fits_sequence_kernel() and (layer.steps > 1 or whole_rows):
        run = _lstm_sequence_backward
    else:
        run = _lstm_steps_backward
    rows, dh0, dc0 = run(layer, incoming, c0, saved, masks, options, share, h0, need_hx)
    absent = input.new_empty
    dprojected = rows["gates"]
    if layer_norm and (need_input or need_weights):
        dprojected = _normalize_backward(
            rows["gates"].float() * layer["norm_ih"].float()[:, None, None],
            saved[2].float(),
            saved[4][..., :1],
        ).to(input.dtype)
    return (
        layer.input_gradient(dprojected) if need_input else absent(0),
        dh0 if need_hx else absent(0),
        dc0 if need_hx else c0.new_empty(0),
        _lstm_weight_gradients(
            layer, options, rows, dprojected, h0, c0, output, saved, masks, share
        )
        if need_weights
        else [absent(0) for _ in weights],
    )


def _normalize_backward(grad: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    mean = grad.mean(dim=-1, keepdim=True)
    along = (grad * normed).mean(dim=-1, keepdim=True)
    return (grad - mean - normed * along) * scale


def _lstm_sequence_backward(
    layer: _Layer,
    incoming: tuple[Tensor, Tensor, Tensor, Tensor | None],
    c0: Tensor,
    saved: list[Tensor],
    masks: tuple[Tensor | None, ...],
    options: LSTMOptions,
    zoneout: float | None,
    h0: Tensor,
    need_hx: bool,
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    grad_output, grad_h_n, grad_c_n, grad_cells = incoming
    gates, cells, _, normed_hh, scales = (
        saved if options.layer_norm else (*saved, None, None, None)
    )
    rows = {"gates": torch.empty_like(gates)}
    if options.layer_norm:
        rows["recurrent"] = torch.empty_like(gates)
        rows["normed"] = gates.new_empty(cells.shape)
    if layer["w_hr"] is not None:
        rows["projected"] = gates.new_empty(*gates.shape[:3], layer.projected)
    dh0, dc0 = (torch.empty_like(h0), torch.empty_like(c0)) if need_hx else (None, None)
    grid, config = layer.sequence_launch()
    launch(
        lstm_sequence_bwd_kernel,
        grid,
        config,
        grad_output,
        grad_h_n,
        grad_c_n,
        grad_cells,
        layer["w_hh"],
        layer["w_hr"],
        layer["peephole"],
        layer["norm_hh"],
        layer["norm_c"],
        layer["bias_c"],
        c0,
        *masks,
        gates,
        cells,
        normed_hh,
        scales,
        rows["gates"],
        rows.get("recurrent"),
        rows.get("projected"),
        rows.get("normed"),
        dh0,
        dc0,
        layer.time_order(grad_output),
        _strides_or_zeros(layer, grad_cells),
        layer.steps,
        layer.batch,
        zoneout,
        float(options.norm_eps),
        HIDDEN=layer.hidden,
        PROJECTED=layer.projected,
        ACTIVATION=options.activation,
        RECURRENT_ACTIVATION=options.recurrent_activation,
        BLOCK_H=layer.block_h,
        BLOCK_P=layer.block_p,
        PRECISION=layer.precision,
    )
    return rows, dh0, dc0


def _lstm_steps_backward(
    layer: _Layer,
    incoming: tuple[Tensor, Tensor, Tensor, Tensor | None],
    c0: Tensor,
    saved: list[Tensor],
    masks: tuple[Tensor | None, ...],
    options: LSTMOptions,
    zoneout: float | None,
    h0: Tensor,
    need_hx: bool,
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    grad_output, grad_h_n, grad_c_n, grad_cells = incoming
    gates, cells = saved
    dgates = torch.empty_like(gates)
    dh, dc = (grad.to(torch.float32, copy=True) for grad in (grad_h_n, grad_c_n))
    grid, config = layer.step_launch(configs.STEP_BACKWARD)
    for step in reversed(range(layer.steps)):
        launch(
            lstm_step_bwd_kernel,
            grid,
            config,
            grad_output,
            grad_cells,
            dh,
            dc,
            layer["w_hh"],
            layer["peephole"],
            c0,
            *masks,
            gates,
            cells,
            dgates,
            layer.time_order(grad_output),
            _strides_or_zeros(layer, grad_cells),
            step,
            layer.steps,
            layer.batch,
            zoneout,
            HIDDEN=layer.hidden,
            ACTIVATION=options.activation,
            RECURRENT_ACTIVATION=options.recurrent_activation,
            PRECISION=layer.precision,
        )
    if not need_hx:
        return {"gates": dgates}, None, None
    dh = _final_state_gradient(layer, dh, dgates, masks[1])
    return {"gates": dgates}, dh.to(h0.dtype), dc.to(c0.dtype)


def _lstm_weight_gradients(
    layer: _Layer,
    options: LSTMOptions,
    rows: dict[str, Tensor],
    dprojected: Tensor,
    h0: Tensor,
    c0: Tensor,
    output: Tensor,
    saved: list[Tensor],
    masks: tuple[Tensor | None, ...],
    zoneout: float | None,
) -> list[Tensor]:
    lengths, recurrent_mask, _, zoneout_c = masks
    active, gates = layer.active(lengths), rows["gates"]
    before_h = layer.states_before(layer.rows(output, layer.projected), h0, active)
    if recurrent_mask is not None:
        before_h = before_h * recurrent_mask.unsqueeze(1)
    drecurrent = rows.get("recurrent", gates)
    gradients = {
        "w_ih": layer.weight_gradient(dprojected, layer.input_rows(active)),
        "w_hh": layer.weight_gradient(drecurrent, before_h),
    }
    if options.has_biases:
        gradients["b_ih"] = gradients["b_hh"] = _summed(gates)
    if not (options.peephole or options.layer_norm or layer["w_hr"] is not None):
        return layer.as_weights(gradients)

    # The variants' weights need the cells before and after each step, unmixed by zoneout.
    i, f, g, o = saved[0].float().chunk(4, dim=-1)
    before_c = layer.states_before(saved[1], c0.float(), active)
    cells = saved[1] if zoneout is None and zoneout_c is None else f * before_c + i * g
    if options.peephole:
        di, df, _, do = gates.float().chunk(4, dim=-1)
        parts = [_summed(di * before_c), _summed(df * before_c), _summed(do * cells)]
        gradients["peephole"] = torch.stack(parts, dim=1)
    squashed = cells
    if options.layer_norm:
        normed_c, _ = _normalize(cells, options.norm_eps)
        squashed = normed_c * layer["norm_c"].float()[:, None, None]
        gradients["norm_ih"] = _summed(gates.float() * saved[2].float())
        gradients["norm_hh"] = _summed(gates.float() * saved[3].float())
        gradients["norm_c"] = _summed(rows["normed"].float() * normed_c)
        if options.has_biases:
            squashed = squashed + layer["bias_c"].float()[:, None, None]
            gradients["bias_c"] = _summed(rows["normed"])
    if layer["w_hr"] is not None:
        gated = (o * _ACTIVATIONS[options.activation](squashed)).to(gates.dtype)
        gradients["w_hr"] = layer.weight_gradient(rows["projected"], gated)
    return layer.as_weights(gradients)


_ACTIVATIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "hard_sigmoid": torch.nn.functional.hardsigmoid,
    "identity": torch.Tensor.contiguous,
}


# --- GRU and RNN ---

_BIASED = ("w_ih", "w_hh", "b_ih", "b_hh")


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
    layer = _simple_layer("gru", input, h0, weights, has_biases, batch_first)
    gates = None
    if save_for_backward:
        gates = input.new_empty(layer.directions, layer.steps, layer.batch, 4 * layer.hidden)
    output, h_n = _simple_forward(
        layer, h0, lengths, (gru_sequence_fwd_kernel, gru_step_fwd_kernel), (gates,), {}
    )
    return output, h_n, input.new_empty(0) if gates is None else gates


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
    layer = _simple_layer("rnn", input, h0, weights, has_biases, batch_first)
    kernels = (rnn_sequence_fwd_kernel, rnn_step_fwd_kernel)
    return _simple_forward(layer, h0, lengths, kernels, (), {"ACTIVATION": nonlinearity})


def _simple_layer(
    kind: str,
    input: Tensor,
    h0: Tensor,
    weights: list[Tensor],
    has_biases: bool,
    batch_first: bool,
) -> _Layer:
    names = _BIASED if has_biases else _BIASED[:2]
    return _Layer(kind, input, h0, h0.size(2), weights, names, batch_first)


def _simple_forward(
    layer: _Layer,
    h0: Tensor,
    lengths: Tensor | None,
    kernels: tuple[Any, Any],
    saved: tuple[Tensor | None, ...],
    constants: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    output = layer.input.new_empty(*layer.leading(), layer.directions * layer.hidden)
    h_n = torch.empty_like(h0)
    constants = {**constants, "HIDDEN": layer.hidden, "PRECISION": layer.precision}
    weights = (layer["w_hh"], layer["b_ih"], layer["b_hh"])
    if layer.steps > 1 and layer.fits_sequence_kernel():
        products, strides = layer.project_input()
        grid, config = layer.sequence_launch()
        launch(
            kernels[0],
            grid,
            config,
            products,
            *weights,
            h0,
            lengths,
            output,
            h_n,
            *saved,
            strides,
            layer.time_order(output),
            layer.steps,
            layer.batch,
            BLOCK_H=layer.block_h,
            **constants,
        )
        return output, h_n
    inputs = _StepInputs(layer)
    hiddens = _Alternating(layer, h0, h_n)
    grid, config = layer.step_launch(configs.STEP_FORWARD)
    for step in range(layer.steps):
        h, new_h = hiddens.next(step)
        launch(
            kernels[1],
            grid,
            config,
            *inputs.operands,
            *weights,
            h,
            lengths,
            output,
            new_h,
            *saved,
            *inputs.strides,
            layer.time_order(output),
            step,
            layer.steps,
            layer.batch,
            FEATURES=layer.input.size(2),
            **constants,
        )
    return output, h_n


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
    layer = _simple_layer("gru", input, h0, weights, has_biases, batch_first)
    shape = (*gates.shape[:3], 3 * layer.hidden)
    dprojected, drecurrent = gates.new_empty(shape), gates.new_empty(shape)
    dh0 = _simple_backward(
        layer,
        (gru_sequence_bwd_kernel, gru_step_bwd_kernel),
        (grad_output, grad_h_n),
        (layer["w_hh"], h0, lengths, output, gates, dprojected, drecurrent),
        output,
        drecurrent,
        need_hx,
        {},
    )
    return _simple_gradients(
        layer, dprojected, drecurrent, dh0, h0, output, lengths, need_input, need_hx, need_weights
    )


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
    layer = _simple_layer("rnn", input, h0, weights, has_biases, batch_first)
    dsums = input.new_empty(layer.directions, layer.steps, layer.batch, layer.hidden)
    dh0 = _simple_backward(
        layer,
        (rnn_sequence_bwd_kernel, rnn_step_bwd_kernel),
        (grad_output, grad_h_n),
        (layer["w_hh"], lengths, output, dsums),
        output,
        dsums,
        need_hx,
        {"ACTIVATION": nonlinearity},
    )
    return _simple_gradients(
        layer, dsums, dsums, dh0, h0, output, lengths, need_input, need_hx, need_weights
    )


def _simple_backward(
    layer: _Layer,
    kernels: tuple[Any, Any],
    incoming: tuple[Tensor, Tensor],
    operands: tuple[Tensor | None, ...],
    output: Tensor,
    drecurrent: Tensor,
    need_hx: bool,
    constants: dict[str, Any],
) -> Tensor | None:
    """Fills the gradients among the operands; returns that of h0 if needed."""
    grad_output, grad_h_n = incoming
    constants = {**constants, "HIDDEN": layer.hidden, "PRECISION": layer.precision}
    strides = (layer.time_order(grad_output), layer.time_order(output))
    if layer.steps > 1 and layer.fits_sequence_kernel():
        dh0 = torch.empty_like(grad_h_n) if need_hx else None
        grid, config = layer.sequence_launch()
        launch(
            kernels[0],
            grid,
            config,
            grad_output,
            grad_h_n,
            *operands,
            dh0,
            *strides,
            layer.steps,
            layer.batch,
            BLOCK_H=layer.block_h,
            **constants,
        )
        return dh0
    dh = grad_h_n.to(torch.float32, copy=True)
    grid, config = layer.step_launch(configs.STEP_BACKWARD)
    for step in reversed(range(layer.steps)):
        launch(
            kernels[1],
            grid,
            config,
            grad_output,
            dh,
            *operands,
            *strides,
            step,
            layer.steps,
            layer.batch,
            **constants,
        )
    if not need_hx:
        return None
    return _final_state_gradient(layer, dh, drecurrent, None).to(grad_h_n.dtype)


def _simple_gradients(
    layer: _Layer,
    dprojected: Tensor,
    drecurrent: Tensor,
    dh0: Tensor | None,
    h0: Tensor,
    output: Tensor,
    lengths: Tensor | None,
    need_input: bool,
    need_hx: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    absent = layer.input.new_empty
    gradients = [absent(0) for _ in layer.weights]
    if need_weights:
        active = layer.active(lengths)
        before = layer.states_before(layer.rows(output, layer.hidden), h0, active)
        named = {
            "w_ih": layer.weight_gradient(dprojected, layer.input_rows(active)),
            "w_hh": layer.weight_gradient(drecurrent, before),
        }
        if layer["b_ih"] is not None:
            named |= {"b_ih": _summed(dprojected), "b_hh": _summed(drecurrent)}
        gradients = layer.as_weights(named)
    return (
        layer.input_gradient(dprojected) if need_input else absent(0),
        dh0 if need_hx else absent(0),
        gradients,
    )
