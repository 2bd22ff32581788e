"""Everyday calls: on the CPU, without autocast.

Where checking each operand in Python would take longer than the kernel, a family's quick.py hands
unchecked operands to the native ops, which check what they are given. It answers None where the
call is not an everyday one, or raised: the caller then takes the checked way, which raises again
and names the argument, so nothing is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from fmkernels._dispatch import Backend, current_backend, log_decision

# What unchecked operands can raise.
CLOSER_LOOK = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
# A tensor of another class may lead to a fake kernel, which checks nothing.
_PLAIN = {Tensor, Parameter}


def is_ordinary(
    op: str,
    backends: dict[str, Backend],
    backend: str | None,
    input: Tensor,
    *others: Tensor | None,
) -> bool:
    """Whether the native CPU kernel would serve the call; logs the choice if it was one.

    Every tensor is plain and on the CPU then; the native op checks dtypes, shapes and strides.
    """
    requested = current_backend() if backend is None else backend
    if (
        requested not in ("auto", "cpu")
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or type(input) not in _PLAIN
        or input.shape[-1] == 0
        or not backends["cpu"].supports(input).ok
    ):
        return False
    for tensor in others:
        if tensor is not None and (type(tensor) not in _PLAIN or not tensor.is_cpu):
            return False
    if requested == "auto":
        log_decision(op, "cpu")
    return True
