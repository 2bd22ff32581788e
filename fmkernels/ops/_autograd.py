"""What every family's autograd.py needs: when to record a graph, and autocast."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad, function

from fmkernels._dispatch import autocast_enabled


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether the call must go through an autograd.Function.

    True also inside forward-mode AD, where no tensor requires a gradient: the Function then raises
    for lack of a jvp, instead of a tangent being dropped silently.
    """
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def once_differentiable(backward: Callable) -> Callable:
    """torch's decorator, which costs microseconds, where a second derivative might be wanted."""
    guarded = function.once_differentiable(backward)

    @wraps(backward)
    def once(ctx, *grads: Tensor | None):
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return once


def distinct(tensor: Tensor | None, other: Tensor) -> Tensor | None:
    """``tensor``, as a view if it is ``other``: torch.compile traces no Function that is given one
    tensor twice."""
    return tensor.view_as(tensor) if tensor is other else tensor


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Floating-point tensors in autocast's dtype where autocast is on, as torch casts for matmuls.

    The device is that of the first tensor. float64 tensors stay as they are, as in torch.
    """
    device_type = tensors[0].device.type
    if not autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(_cast(t, dtype) for t in tensors)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or tensor.dtype is torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)
