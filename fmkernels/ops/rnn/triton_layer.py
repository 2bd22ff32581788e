"""What the launchers of the recurrent kernels share: one layer's sizes, operands and gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fmkernels.ops._triton.launch import Config, architecture, dot_precision
from fmkernels.ops.rnn import triton_configs as configs


class Layer:
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
        element_size = input.element_size()
        self.block_h = configs.padded_size(element_size, hidden)
        self.block_p = configs.padded_size(element_size, self.projected)
        self.precision = dot_precision(input, "matmul")

    def __getitem__(self, name: str) -> Tensor | None:
        """A weight, stacked over the directions; None if the layer has none of the name."""
        return self.stacked.get(name)

    def fits_sequence_kernel(self) -> bool:
        return self._sequence_case() in configs.SEQUENCE[self.kind][architecture()]

    def _sequence_case(self) -> str:
        return configs.sequence_case(
            self.input.element_size(), max(self.block_h, self.block_p), "norm_c" in self.names
        )

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

    def states_before(self, states: Tensor, first: Tensor, active: Tensor | None) -> Tensor:
        """(D, T, B, width): what each step started from, given the states after each, and zeros
        where a sequence takes no part."""
        if self.steps == 1 and active is None:
            return first.unsqueeze(1)
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
        total = total.view(self.steps, self.batch, self.input.size(2))
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
            name = self.names[index % per_direction]
            gradient = gradients[name][index // per_direction]
            # Both biases of an LSTM have the same gradient, both directions one tensor of them.
            copy = self.directions > 1 or name == "b_hh"
            out.append(gradient.to(weight.dtype, copy=copy).contiguous())
        return out


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def summed(tensor: Tensor) -> Tensor:
    """Over steps and sequences, in float32."""
    return tensor.sum(dim=(1, 2), dtype=torch.float32)


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def final_state_gradient(
    layer: Layer, dh: Tensor, drecurrent: Tensor, factors: Tensor | None
) -> Tensor:
    """dh of the initial states: what stays of it, and what the first step sends through W_hh."""
    if layer.directions == 1:
        firsts = drecurrent[:, 0]
    else:
        firsts = torch.stack([drecurrent[0, 0], drecurrent[1, layer.steps - 1]])
    carried = torch.matmul(firsts, layer["w_hh"]).to(dh.dtype)
    return dh + (carried if factors is None else carried * factors)


class StepInputs:
    """What the step kernels take as x, pre and w_ih, and the strides of the first two."""

    def __init__(self, layer: Layer) -> None:
        if layer.steps == 1:
            rows = layer.input.select(layer.time_dim, 0)
            self.operands = (rows, None, layer["w_ih"])
            self.strides = (rows.stride(0), (0, 0, 0))
        else:
            products, strides = layer.project_input()
            self.operands = (None, products, None)
            self.strides = (0, strides)


class Alternating:
    """The hidden state before and after each step: two buffers in turn between h0 and h_n."""

    def __init__(self, layer: Layer, h0: Tensor, h_n: Tensor) -> None:
        self._steps, self._before, self._last = layer.steps, h0, h_n
        self._buffers = [torch.empty_like(h0) for _ in range(min(2, layer.steps - 1))]

    def next(self, step: int) -> tuple[Tensor, Tensor]:
        before = self._before
        last = step == self._steps - 1
        self._before = self._last if last else self._buffers[step % len(self._buffers)]
        return before, self._before
