"""The everyday call of a convolution, or of several in a row: on the CPU, without autocast and
graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels._dispatch import current_precision, record_decision
from fmkernels._remember import remember
from fmkernels.ops._autograd import needs_graph
from fmkernels.ops._quick import CLOSER_LOOK, is_ordinary
from fmkernels.ops.conv.autograd import op_name, readable_weight
from fmkernels.ops.conv.backends import CHAIN, CONV
from fmkernels.ops.conv.geometry import ConvOptions, is_channels_last
from fmkernels.ops.conv.schema import chain_settings


class Layer(NamedTuple):
    """A convolution without its input and residual, as :func:`conv` takes them."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    packed_weight: Tensor | None
    options: ConvOptions
    backend: str | None


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    packed_weight: Tensor | None,
    options: ConvOptions,
    backend: str | None,
) -> Tensor | None:
    """As :func:`fmkernels.ops.conv.autograd.conv`, of batched images in one of the two layouts."""
    try:
        if needs_graph(input, weight, bias, scale, shift, residual) or not _is_ordinary(
            input, weight, options, backend
        ):
            return None
        exact = current_precision() == "exact"
        weight = readable_weight(weight, packed_weight, options, exact)
        return CONV["cpu"].forward(
            input, weight, bias, scale, shift, residual, packed_weight, *options, False, exact
        )[0]
    except CLOSER_LOOK:
        return None


def chain(
    input: Tensor,
    layers: Sequence[Layer],
    reads: tuple[tuple[int, int], ...],
    residual: Tensor | None,
) -> Tensor | None:
    """``layers`` over two axes, of which each reads two values (conv_chain in schema.py);
    ``residual`` is the last one's."""
    try:
        first = layers[0]
        # Whatever might want a graph is left to the single layers.
        if (
            torch.is_grad_enabled()
            or needs_graph()
            or not _is_ordinary(input, first.weight, first.options, first.backend)
        ):
            return None
        exact = current_precision() == "exact"
        weights, vectors, options = [], [], []
        for layer in layers:
            if layer.backend != first.backend:
                return None
            weight, packed_weight = layer.weight, layer.packed_weight
            weights.append(readable_weight(weight, packed_weight, layer.options, exact))
            vectors += (layer.bias, layer.scale, layer.shift, packed_weight)
            options.append(layer.options)
        numbers, names = _chain_settings(tuple(options), reads)
        output = CHAIN(input, weights, vectors, residual, numbers, names, exact)
    except CLOSER_LOOK:
        return None
    if first.backend != "cpu":
        for _ in layers[1:]:  # the first is in the log
            record_decision("conv2d", "cpu")
    return output


_chain_settings = remember(chain_settings)


def _is_ordinary(input: Tensor, weight: Tensor, options: ConvOptions, backend: str | None) -> bool:
    return (
        input.dim() == len(options.stride) + 2
        and (input.is_contiguous() or is_channels_last(input))
        and is_ordinary(op_name(options), CONV, backend, input, weight)
    )
