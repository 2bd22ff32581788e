"""The everyday call of a convolution, or of several in a row: on the CPU, without autocast and
graph."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmkernels._dispatch import current_precision, record_decision
from fmkernels.ops._autograd import needs_graph
from fmkernels.ops._quick import CLOSER_LOOK, is_ordinary
from fmkernels.ops.conv.autograd import op_name, readable_weight
from fmkernels.ops.conv.backends import (
    CHAIN,
    CONV,
    DROP_CHAIN,
    INFERENCE,
    KEEP_CHAIN,
    KEPT_CHAIN,
)
from fmkernels.ops.conv.geometry import ConvOptions, is_channels_last
from fmkernels.ops.conv.schema import chain_text, options_text


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
        operands = (weight, bias, scale, shift, residual)
        if needs_graph(input, *operands) or not _is_ordinary(
            options, backend, input, *operands, packed_weight
        ):
            return None
        exact = current_precision() == "exact"
        weight = readable_weight(weight, packed_weight, options, exact)
        return INFERENCE(
            input,
            weight,
            bias,
            scale,
            shift,
            residual,
            packed_weight,
            options_text(options),
            exact,
        )
    except CLOSER_LOOK:
        return None


class Chain:
    """Layers over two axes as one op, of which each reads two values (conv_chain in schema.py).

    Args:
        layers: all of one backend. Their tensors must not be given other memory, but for the
            biases.
        reads: the values that each reads.
    """

    def __init__(self, layers: Sequence[Layer], reads: tuple[tuple[int, int], ...]) -> None:
        self._layers = layers
        self._first = layers[0]
        self._one_backend = all([layer.backend == self._first.backend for layer in layers])
        self._options = chain_text([layer.options for layer in layers], reads)
        self._vectors = [v for layer in layers for v in layer[1:5]]
        self._kept: int | None = None

    def __call__(self, input: Tensor, residual: Tensor | None) -> Tensor | None:
        """None where the call is not an everyday one; ``residual`` is the last layer's."""
        first = self._first
        try:
            # Whatever might want a graph is left to the single layers.
            if (
                not self._one_backend
                or torch.is_grad_enabled()
                or needs_graph()
                or not _is_ordinary(first.options, first.backend, input, first.weight, residual)
            ):
                return None
            exact = current_precision() == "exact"
            if self._kept is None or exact:
                output = self._run(input, residual, exact)
            else:
                output = KEPT_CHAIN(input, self._kept, residual)
        except CLOSER_LOOK:
            return None
        if first.backend != "cpu":
            for _ in self._layers[1:]:  # the first is in the log
                record_decision("conv2d", "cpu")
        return output

    def _run(self, input: Tensor, residual: Tensor | None, exact: bool) -> Tensor:
        weights = [
            readable_weight(layer.weight, layer.packed_weight, layer.options, exact)
            for layer in self._layers
        ]
        output = CHAIN(input, weights, self._vectors, residual, self._options, exact)
        # As the kernels want them; a copy would grow old, so then they are made by every call.
        copied = [w is not layer.weight for w, layer in zip(weights, self._layers, strict=True)]
        if not exact and not any(copied):
            self._kept = KEEP_CHAIN(weights, self._vectors, self._options, exact)
            weakref.finalize(self, DROP_CHAIN, self._kept).atexit = False
        return output


def _is_ordinary(
    options: ConvOptions, backend: str | None, input: Tensor, *others: Tensor | None
) -> bool:
    return (
        input.dim() == len(options.stride) + 2
        and (input.is_contiguous() or is_channels_last(input))
        and is_ordinary(op_name(options), CONV, backend, input, *others)
    )
