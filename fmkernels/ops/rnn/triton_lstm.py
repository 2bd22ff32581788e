"""Launchers of the LSTM's Triton kernels, with the signatures of reference/lstm.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmkernels.ops._triton.launch import launch
from fmkernels.ops._triton.support import unsupported
from fmkernels.ops.rnn import triton_configs as configs
from fmkernels.ops.rnn.schema import LSTMOptions
from fmkernels.ops.rnn.sequences import active_steps
from fmkernels.ops.rnn.triton_layer import (
    Alternating,
    Layer,
    StepInputs,
    as_bytes,
    final_state_gradient,
    summed,
)
from fmkernels.ops.rnn.triton_sequence_lstm import (
    lstm_sequence_bwd_kernel,
    lstm_sequence_fwd_kernel,
)
from fmkernels.ops.rnn.triton_step_lstm import lstm_step_bwd_kernel, lstm_step_fwd_kernel


def _lstm_layer(
    input: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor], options: LSTMOptions, first: bool
) -> Layer:
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
    return Layer("lstm", input, h0, c0.size(2), weights, tuple(names), first)


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
    masks = (lengths, recurrent_mask, as_bytes(zoneout_h), as_bytes(zoneout_c))
    results = (output, h_n, c_n, states, gates, cells)
    share = _zoneout_share(zoneout, zoneout_h)
    if _needs_whole_rows(layer) and not layer.fits_sequence_kernel():
        raise unsupported("lstm", _too_wide(layer))
    if _takes_one_launch(layer):
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


def _zoneout_share(zoneout: float, zoneout_h: Tensor | None) -> float | None:
    """How much of the old state stays; None if nothing does, or if masks say where."""
    return float(zoneout) if zoneout > 0.0 and zoneout_h is None else None


def _needs_whole_rows(layer: Layer) -> bool:
    """Whether a program must own all features of a sequence."""
    return "norm_c" in layer.names or layer.projected != layer.hidden


def _takes_one_launch(layer: Layer) -> bool:
    """Whether all steps run in one launch; else each is a launch."""
    return layer.fits_sequence_kernel() and (layer.steps > 1 or _needs_whole_rows(layer))


def _step_constants(layer: Layer, options: LSTMOptions) -> dict[str, Any]:
    return {
        "HIDDEN": layer.hidden,
        "ACTIVATION": options.activation,
        "RECURRENT_ACTIVATION": options.recurrent_activation,
        "PRECISION": layer.precision,
    }


def _sequence_constants(layer: Layer, options: LSTMOptions) -> dict[str, Any]:
    return {
        **_step_constants(layer, options),
        "PROJECTED": layer.projected,
        "BLOCK_H": layer.block_h,
        "BLOCK_P": layer.block_p,
    }


def _too_wide(layer: Layer) -> str:
    return (
        "layer norm and projections need the recurrent weights on one multiprocessor, where "
        f"{max(layer.hidden, layer.projected)} features of {layer.input.dtype} do not fit"
    )


def _strides_or_zeros(layer: Layer, tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else layer.time_order(tensor)


def _lstm_sequence(
    layer: Layer,
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
        **_sequence_constants(layer, options),
    )
    return saved


def _normalize(products: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """N(x) over the last dimension in the products' dtype, and its scale in float32."""
    wide = products.float()
    normed, _, scale = torch.native_layer_norm(wide, wide.shape[-1:], None, None, eps)
    return normed.to(products.dtype), scale


def _in_time_order(layer: Layer, rows: Tensor) -> Tensor:
    """(D, rows in the input's order, width) as (D, T, B, width)."""
    return rows.unflatten(1, layer.leading()).transpose(1, 1 + layer.time_dim)


def _lstm_steps(
    layer: Layer,
    h0: Tensor,
    c0: Tensor,
    masks: tuple[Tensor | None, ...],
    results: tuple[Tensor | None, ...],
    options: LSTMOptions,
    zoneout: float | None,
) -> None:
    """One launch per step. A single step projects its input itself."""
    output, h_n, c_n, states, gates, cells = results
    inputs = StepInputs(layer)
    hiddens = Alternating(layer, h0, h_n)
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
            **_step_constants(layer, options),
        )
        c = new_c


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
    masks = (lengths, recurrent_mask, as_bytes(zoneout_h), as_bytes(zoneout_c))
    share = _zoneout_share(zoneout, zoneout_h)
    incoming = (grad_output, grad_h_n, grad_c_n, grad_cells)
    run = _lstm_sequence_backward if _takes_one_launch(layer) else _lstm_steps_backward
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
    layer: Layer,
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
        **_sequence_constants(layer, options),
    )
    return rows, dh0, dc0


def _lstm_steps_backward(
    layer: Layer,
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
            **_step_constants(layer, options),
        )
    if not need_hx:
        return {"gates": dgates}, None, None
    dh = final_state_gradient(layer, dh, dgates, masks[1])
    return {"gates": dgates}, dh.to(h0.dtype), dc.to(c0.dtype)


def _lstm_weight_gradients(
    layer: Layer,
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
    active, gates = active_steps(layer.steps, lengths), rows["gates"]
    before_h = layer.states_before(layer.rows(output, layer.projected), h0, active)
    if recurrent_mask is not None:
        before_h = before_h * recurrent_mask.unsqueeze(1)
    drecurrent = rows.get("recurrent", gates)
    gradients = {
        "w_ih": layer.weight_gradient(dprojected, layer.input_rows(active)),
        "w_hh": layer.weight_gradient(drecurrent, before_h),
    }
    if options.has_biases:
        gradients["b_ih"] = gradients["b_hh"] = summed(gates)
    if not (options.peephole or options.layer_norm or layer["w_hr"] is not None):
        return layer.as_weights(gradients)

    # The variants' weights need the cells before and after each step, unmixed by zoneout.
    i, f, g, o = saved[0].float().chunk(4, dim=-1)
    before_c = layer.states_before(saved[1], c0.float(), active)
    cells = saved[1] if zoneout is None and zoneout_c is None else f * before_c + i * g
    if options.peephole:
        di, df, _, do = gates.float().chunk(4, dim=-1)
        parts = [summed(di * before_c), summed(df * before_c), summed(do * cells)]
        gradients["peephole"] = torch.stack(parts, dim=1)
    squashed = cells
    if options.layer_norm:
        normed_c, _ = _normalize(cells, options.norm_eps)
        squashed = normed_c * layer["norm_c"].float()[:, None, None]
        gradients["norm_ih"] = summed(gates.float() * saved[2].float())
        gradients["norm_hh"] = summed(gates.float() * saved[3].float())
        gradients["norm_c"] = summed(rows["normed"].float() * normed_c)
        if options.has_biases:
            squashed = squashed + layer["bias_c"].float()[:, None, None]
            gradients["bias_c"] = summed(rows["normed"])
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
