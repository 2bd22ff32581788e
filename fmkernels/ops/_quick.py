"""Everyday calls: on the CPU, without autocast.

Where checking each operand in Python would take longer than the kernel, a family's quick.py hands
unchecked operands to the native ops, which check what they are given. It answers None where the
call is not an everyday one, or raised: the caller then takes the checked way, which raises again
and names the argument, so nothing is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import Backend, current_backend, record_decision

# What unchecked operands can raise.
CLOSER_LOOK = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def is_ordinary(
    op: str, backends: dict[str, Backend], backend: str | None, input: Tensor, *others: Tensor
) -> bool:
    """Whether the native CPU kernel would serve the call; logs the choice if it was one."""
    requested = current_backend() if backend is None else backend
    if (
        requested not in ("auto", "cpu")
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or not input.is_cpu
        or input.size(-1) == 0
        or not backends["cpu"].supports(input).ok
    ):
        return False
    for tensor in others:
        if not tensor.is_cpu:
            return False
    if requested == "auto":
        record_decision(op, "cpu")
    return True
