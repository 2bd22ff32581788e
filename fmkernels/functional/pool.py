"""Max- and average-pooling."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from fmkernels import _checks
from fmkernels._dispatch import UnsupportedError, current_backend, record_decision
from fmkernels.functional._conv_arguments import (
    IntOrTuple,
    Window,
    check_image,
    check_window,
    pool_window,
)
from fmkernels.ops.conv import autograd_pool
from fmkernels.ops.conv.schema_pool import MAX_POOL_AREA

_TORCH_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def max_pool2d(
    input: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    dilation: IntOrTuple = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """2-D max-pooling, as :func:`torch.nn.functional.max_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), float32, bfloat16, float16 or float64.
        kernel_size, stride, dilation: int or pair, at least 1; stride None means kernel_size.
        padding: int or pair, at most half of kernel_size (padding counts as minus infinity).
        ceil_mode: let a last window overhang the end of the input.
        return_indices: also return the int64 position ``row * W + column`` of each maximum.
        backend: an explicit backend never falls back; windows of more than 256 elements are left
            to PyTorch (recorded in ``last_decisions``; refused under an explicit backend).

    Returns:
        (N, C, OH, OW), or without N for a 3-D input, in the input's memory format; NaN wins over
        every number. With ``return_indices`` a pair.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    check_image("input", input, 2)
    window = pool_window(kernel_size, stride, padding, dilation, 2)
    _checks.boolean("ceil_mode", ceil_mode)
    _checks.boolean("return_indices", return_indices)
    check_window("input", input.shape[-2:], window, ceil_mode)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    output, indices = max_pool(batched, window, ceil_mode, return_indices, backend)
    if input.dim() == 3:
        output = output.squeeze(0)
        indices = None if indices is None else indices.squeeze(0)
    return (output, indices) if return_indices else output


def avg_pool2d(
    input: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """2-D average-pooling, as :func:`torch.nn.functional.avg_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), float32, bfloat16, float16 or float64.
        kernel_size, stride: int or pair, at least 1; stride None means kernel_size.
        padding: int or pair, at most half of kernel_size (zeros).
        ceil_mode: let a last window overhang the end of the input.
        count_include_pad: the padding counts among the elements that a sum is divided by.
        divisor_override: divides every sum instead, if given.
        backend: an explicit backend never falls back.

    Returns:
        (N, C, OH, OW), or without N for a 3-D input, in the input's memory format.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    check_image("input", input, 2)
    window = pool_window(kernel_size, stride, padding, 1, 2)
    _checks.boolean("ceil_mode", ceil_mode)
    _checks.boolean("count_include_pad", count_include_pad)
    if divisor_override is not None:
        _checks.integer("divisor_override", divisor_override, 1)
    check_window("input", input.shape[-2:], window, ceil_mode)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    output = autograd_pool.avg_pool(
        batched, *window[:3], ceil_mode, count_include_pad, divisor_override, backend
    )
    return output if input.dim() == 4 else output.squeeze(0)


def max_pool(
    input: Tensor, window: Window, ceil_mode: bool, return_indices: bool, backend: str | None
) -> tuple[Tensor, Tensor | None]:
    """Max-pooling of (N, C, *spatial) on checked arguments, and its indices if wanted."""
    if math.prod(window[0]) > MAX_POOL_AREA:
        op = f"max_pool{len(window[0])}d"
        _leave_to_torch(op, f"a window holds at most {MAX_POOL_AREA} elements", backend)
        torch_pool = _TORCH_MAX_POOL[len(window[0])]
        return torch_pool(input, *window, ceil_mode, return_indices=True)
    output, argmax = autograd_pool.max_pool(input, *window, ceil_mode, backend)
    if not return_indices:
        return output, None
    return output, autograd_pool.flat_indices(argmax, input.shape[2:], *window)


def pool_image(input: Tensor, kind: str, window: Window, backend: str | None) -> Tensor:
    """The pooling step of a convolution on its own, on checked arguments."""
    if kind == "avg":
        return autograd_pool.avg_pool(input, *window[:3], False, True, None, backend)
    return max_pool(input, window, False, False, backend)[0]


def _leave_to_torch(op: str, reason: str, backend: str | None) -> None:
    """Record that PyTorch serves ``op``, or refuse where an explicit backend rules that out."""
    requested = current_backend() if backend is None else backend
    if requested not in ("auto", "reference"):
        raise UnsupportedError(
            f"{op}: backend {requested!r} cannot serve this call: {reason}\n  reference: supported"
        )
    record_decision(op, "reference", (("cpu", reason),))
