"""Layer and RMS normalisation, alone and of a sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels import _checks as check
from fmkernels._remember import remember
from fmkernels.functional import _options
from fmkernels.ops.norm import autograd, quick


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` (Ba et al. 2016), as torch's.

    Args:
        input: (..., *normalized_shape), float32, bfloat16, float16 or float64; any strides.
        normalized_shape: the last dimensions, over which mean and (biased) variance are taken.
        weight, bias: of shape ``normalized_shape``, or None.
        eps: added to the variance.
        backend: an explicit backend never falls back; None takes that of ``use_backend``.

    Returns:
        shaped like input, in its dtype; statistics are float32 (float64 for float64).
        Differentiable once with respect to input, weight and bias.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    return _norm(input, None, normalized_shape, weight, bias, False, eps, 0.0, False, backend)[0]


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight`` (Zhang and Sennrich 2019), as torch's.

    Args:
        input, normalized_shape, weight, backend: as in :func:`layer_norm`.
        eps: None takes the machine epsilon of float32 (float64 for float64), as torch does.

    Returns:
        As :func:`layer_norm`.

    Raises:
        As :func:`layer_norm`.
    """
    return _norm(input, None, normalized_shape, weight, None, True, eps, 0.0, False, backend)[0]


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    return_sum: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``layer_norm(dropout(input) + residual)`` in one pass over memory.

    Args:
        input, normalized_shape, weight, bias, eps, backend: as in :func:`layer_norm`.
        residual: shaped like input.
        dropout_p: probability of zeroing an element of input. The mask comes from a seed that
            torch's generator gives, and is not stored. Applies whenever it is not 0: the caller
            knows whether this is training.
        return_sum: also return ``dropout(input) + residual``, which the next block adds to.

    Returns:
        the normalised sum, or ``(normalised, sum)``. Differentiable once with respect to input,
        residual, weight and bias, through both.

    Raises:
        As :func:`layer_norm`.
    """
    output, total = _norm(
        input, residual, normalized_shape, weight, bias, False, eps, dropout_p, return_sum, backend
    )
    return (output, total) if return_sum else output


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    return_sum: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``rms_norm(dropout(input) + residual)`` in one pass over memory.

    Args:
        input, residual, normalized_shape, weight, dropout_p, return_sum, backend: as in
            :func:`add_layer_norm`.
        eps: as in :func:`rms_norm`.

    Returns:
        As :func:`add_layer_norm`.

    Raises:
        As :func:`layer_norm`.
    """
    output, total = _norm(
        input, residual, normalized_shape, weight, None, True, eps, dropout_p, return_sum, backend
    )
    return (output, total) if return_sum else output


def _norm(
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float | None,
    dropout_p: float,
    return_sum: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    if type(dropout_p) is float and dropout_p == 0.0:
        result = quick.norm(
            input, residual, normalized_shape, weight, bias, rms, eps, return_sum, backend
        )
        if result is not None:
            return result
    check.tensor("input", input)
    if isinstance(normalized_shape, list):  # a tuple can be remembered
        normalized_shape = tuple(normalized_shape)
    rows, shape = _rows(input.shape, normalized_shape)
    operands = {"residual": residual, "weight": weight, "bias": bias}
    for name, operand in operands.items():
        if operand is None:
            continue
        check.tensor(name, operand)
        if name == "residual":
            check.shape(name, operand, input.shape, "the shape of input")
        else:
            check.shape(name, operand, shape, "normalized_shape")
        if operand.device != input.device:
            raise RuntimeError(
                f"{name} must be on the device of input ({input.device}), "
                f"got {check.describe(operand)}"
            )
    dropout_p = _options.probability("dropout_p", dropout_p)
    if eps is None:
        eps = autograd.default_eps(input.dtype)
    eps = _options.number("eps", eps)

    result_dtype = _common(input, residual)
    dtype = _common(input, *operands.values())
    output, total = autograd.norm(
        _shaped(input, dtype, rows),
        _shaped(residual, dtype, rows),
        _shaped(weight, dtype, rows[-1:]),
        _shaped(bias, dtype, rows[-1:]),
        rms,
        eps,
        dropout_p,
        return_sum,
        backend,
    )
    if residual is not None and return_sum:
        total = _shaped(total, result_dtype, input.shape)
    return _shaped(output, result_dtype, input.shape), total


def _shaped(operand: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
    """``operand`` in that dtype and shape. The kernels normalise over the last dimension only."""
    if operand is None:
        return None
    operand = operand if operand.dtype is dtype else operand.to(dtype)
    return operand if operand.shape == shape else operand.reshape(shape)


def _common(first: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype that torch would promote the tensors to."""
    dtype = first.dtype
    for tensor in others:
        if tensor is not None and tensor.dtype is not dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@remember
def _rows(
    input_shape: tuple[int, ...], normalized_shape: int | tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of input with what is normalised in one dimension, and those dimensions."""
    if isinstance(normalized_shape, int):
        normalized_shape = (normalized_shape,)
    if not isinstance(normalized_shape, Sequence) or len(normalized_shape) == 0:
        raise TypeError(
            "normalized_shape must be an int or a non-empty sequence of ints, "
            f"got {check.describe(normalized_shape)}"
        )
    shape = tuple(
        check.integer(f"normalized_shape[{i}]", size, 1) for i, size in enumerate(normalized_shape)
    )
    if tuple(input_shape[-len(shape) :]) != shape:
        raise ValueError(
            f"input must end in normalized_shape {shape}, got shape {tuple(input_shape)}"
        )
    return (*input_shape[: -len(shape)], math.prod(shape)), shape
