"""Argument checks for the functional interface.

Every helper raises before any kernel runs, with a message that names the argument, what was given
and what is allowed: TypeError for a wrong type or dtype, ValueError for a wrong value or shape,
and RuntimeError for tensors on different devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels._dispatch import autocast_enabled

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The largest stride, padding or dilation. Sizes are below 2**62 (torch's own limit on bytes), so
# sums and products of one size and one such integer stay inside int64 in the kernels.
MAX_INT = 2**31 - 1


def describe(value: object) -> str:
    """``float32 tensor of shape (2, 3) on cpu`` for a tensor, type and repr for anything else."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def tensor(name: str, value: object) -> Tensor:
    """``value`` is a strided floating-point tensor of a dtype that the package computes in."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {describe(value)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {describe(value)}"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    return value


def operand(name: str, value: object, reference_name: str, reference: Tensor) -> Tensor:
    """``value`` is a tensor as :func:`tensor` wants it, of the kind of ``reference``."""
    if (
        isinstance(value, Tensor)
        and value.dtype is reference.dtype
        and value.layout is torch.strided
        and value.device == reference.device
    ):
        return value
    tensor(name, value)
    same_kind(name, value, reference_name, reference)
    return value


def rank(name: str, value: Tensor, *allowed: int) -> None:
    """``value`` has one of the allowed numbers of dimensions."""
    if value.dim() not in allowed:
        ranks = " or ".join(str(n) for n in allowed)
        raise ValueError(f"{name} must have {ranks} dimensions, got {describe(value)}")


def shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    """``value`` has exactly the expected shape; ``meaning`` says where that shape comes from."""
    if value.shape != expected and tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{name} must have shape {tuple(expected)} ({meaning}), got {describe(value)}"
        )


def not_empty(name: str, value: Tensor) -> None:
    """``value`` has at least one element."""
    if value.numel() == 0:
        raise ValueError(f"{name} must not be empty, got {describe(value)}")


def same_kind(name: str, value: Tensor, reference_name: str, reference: Tensor) -> None:
    """``value`` shares device and dtype with ``reference`` (dtypes may differ under autocast)."""
    if value.device != reference.device:
        raise RuntimeError(
            f"{name} must be on the device of {reference_name} ({reference.device}), "
            f"got {describe(value)}"
        )
    if value.dtype != reference.dtype and not autocast_enabled(value.device.type):
        raise TypeError(
            f"{name} must have the dtype of {reference_name} ({reference.dtype}), "
            f"got {describe(value)}"
        )


def integer(name: str, value: object, minimum: int, maximum: int = MAX_INT) -> int:
    """``value`` is an int (not a bool) within ``[minimum, maximum]``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if not minimum <= value <= maximum:
        raise ValueError(f"{name} must be in [{minimum}, {maximum}], got {value}")
    return value


def integers(
    name: str, value: object, count: int, minimum: int, maximum: int = MAX_INT
) -> tuple[int, ...]:
    """``value`` is an int (repeated) or a sequence of one or ``count`` ints in the range."""
    if type(value) is tuple and len(value) == count:  # as layers have it: nothing to convert
        for v in value:
            if type(v) is not int or not minimum <= v <= maximum:
                break
        else:
            return value
    if isinstance(value, (int, torch.SymInt)):
        return (integer(name, value, minimum, maximum),) * count
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be an int or a tuple of {count} ints, got {describe(value)}")
    if len(value) not in (1, count):
        raise ValueError(f"{name} must have {count} elements, got {describe(value)}")
    checked = tuple(integer(f"{name}[{i}]", v, minimum, maximum) for i, v in enumerate(value))
    return checked * count if len(checked) == 1 and count > 1 else checked


def boolean(name: str, value: object) -> bool:
    """``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {describe(value)}")
    return value


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """``value`` is one of the allowed values."""
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name} must be one of {options}, got {describe(value)}")


def packed_weight(name: str, value: Tensor, weight: Tensor) -> None:
    """``value`` may be a pack op's result for ``weight``; the kernel checks its header."""
    if not isinstance(value, Tensor) or value.dtype is not torch.uint8 or value.dim() != 1:
        raise TypeError(
            f"{name} must be a 1-D uint8 tensor made by a pack op, got {describe(value)}"
        )
    if value.device != weight.device:
        raise RuntimeError(
            f"{name} must be on the device of weight ({weight.device}), got {describe(value)}"
        )
