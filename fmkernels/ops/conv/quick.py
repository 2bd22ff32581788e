"""The everyday call of a convolution: on the CPU, without autocast and graph."""

from __future__ import annotations

from torch import Tensor

from fmkernels._dispatch import current_precision
from fmkernels.ops._autograd import needs_graph
from fmkernels.ops._quick import CLOSER_LOOK, is_ordinary
from fmkernels.ops.conv.autograd import op_name, readable_weight
from fmkernels.ops.conv.backends import CONV
from fmkernels.ops.conv.geometry import ConvOptions, is_channels_last


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
        if (
            input.dim() != len(options.stride) + 2
            or needs_graph(input, weight, bias, scale, shift, residual)
            or not (input.is_contiguous() or is_channels_last(input))
            or not is_ordinary(op_name(options), CONV, backend, input, weight)
        ):
            return None
        exact = current_precision() == "exact"
        weight = readable_weight(weight, packed_weight, options, exact)
        return CONV["cpu"].forward(
            input, weight, bias, scale, shift, residual, packed_weight, *options, False, exact
        )[0]
    except CLOSER_LOOK:
        return None
