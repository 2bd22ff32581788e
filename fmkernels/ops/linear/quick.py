"""The everyday call of a linear layer; see fmkernels/ops/_quick.py."""

from __future__ import annotations

from torch import Tensor

from fmkernels.ops._autograd import needs_graph
from fmkernels.ops._quick import CLOSER_LOOK, is_ordinary
from fmkernels.ops.linear.autograd import as_read_by, run
from fmkernels.ops.linear.backends import INFERENCE, LINEAR


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    packed_weight: Tensor | None,
    activation: str | None,
    backend: str | None,
) -> Tensor | None:
    """As :func:`fmkernels.ops.linear.autograd.linear`."""
    try:
        if not is_ordinary(
            "linear", LINEAR, backend, input, weight, bias, residual, packed_weight
        ):
            return None
        if needs_graph(input, weight, bias, residual):
            return run("cpu", input, weight, bias, residual, packed_weight, activation)
        residual = None if residual is None else residual.contiguous()
        weight = as_read_by("cpu", weight)
        return INFERENCE(input.contiguous(), weight, bias, residual, packed_weight, activation)
    except CLOSER_LOOK:
        return None
