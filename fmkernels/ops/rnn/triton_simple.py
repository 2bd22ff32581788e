"""Launchers of the kernels of the GRU and of the plain layer, with the reference's signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmkernels.ops._triton.launch import launch
from fmkernels.ops.rnn import triton_configs as configs
from fmkernels.ops.rnn.sequences import active_steps
from fmkernels.ops.rnn.triton_layer import (
    Alternating,
    Layer,
    StepInputs,
    final_state_gradient,
    summed,
)
from fmkernels.ops.rnn.triton_sequence_simple import (
    gru_sequence_bwd_kernel,
    gru_sequence_fwd_kernel,
    rnn_sequence_bwd_kernel,
    rnn_sequence_fwd_kernel,
)
from fmkernels.ops.rnn.triton_step_simple import (
    gru_step_bwd_kernel,
    gru_step_fwd_kernel,
    rnn_step_bwd_kernel,
    rnn_step_fwd_kernel,
)

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
) -> Layer:
    names = _BIASED if has_biases else _BIASED[:2]
    return Layer(kind, input, h0, h0.size(2), weights, names, batch_first)


def _simple_forward(
    layer: Layer,
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
    inputs = StepInputs(layer)
    hiddens = Alternating(layer, h0, h_n)
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
    layer: Layer,
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
    return final_state_gradient(layer, dh, drecurrent, None).to(grad_h_n.dtype)


def _simple_gradients(
    layer: Layer,
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
        active = active_steps(layer.steps, lengths)
        before = layer.states_before(layer.rows(output, layer.hidden), h0, active)
        named = {
            "w_ih": layer.weight_gradient(dprojected, layer.input_rows(active)),
            "w_hh": layer.weight_gradient(drecurrent, before),
        }
        if layer["b_ih"] is not None:
            named |= {"b_ih": summed(dprojected), "b_hh": summed(drecurrent)}
        gradients = layer.as_weights(named)
    return (
        layer.input_gradient(dprojected) if need_input else absent(0),
        dh0 if need_hx else absent(0),
        gradients,
    )
