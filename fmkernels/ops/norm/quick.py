"""The everyday call of a normalisation; see fmkernels/ops/_quick.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fmkernels.ops._autograd import needs_graph
from fmkernels.ops._quick import CLOSER_LOOK, is_ordinary
from fmkernels.ops.norm.autograd import default_eps, op_name, run
from fmkernels.ops.norm.backends import INFERENCE, NORM


def norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float | None,
    return_sum: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None] | None:
    """As :func:`fmkernels.ops.norm.autograd.norm`, over one dimension, without dropout."""
    try:
        if type(normalized_shape) is tuple and len(normalized_shape) == 1:
            normalized_shape = normalized_shape[0]
        dtype = input.dtype
        if (
            type(normalized_shape) is not int
            or normalized_shape != input.shape[-1]
            or (weight is not None and weight.dtype is not dtype)
            or (residual is not None and residual.dtype is not dtype)
            or not is_ordinary(op_name(rms), NORM, backend, input, residual, weight, bias)
        ):
            return None
        if eps is None:
            eps = default_eps(dtype)
        elif type(eps) is not float:
            return None
        if return_sum or needs_graph(input, residual, weight, bias):
            return run("cpu", input, residual, weight, bias, rms, eps, 0.0, return_sum)
        residual = None if residual is None else residual.contiguous()
        return INFERENCE(input.contiguous(), residual, weight, bias, rms, eps), None
    except CLOSER_LOOK:
        return None
