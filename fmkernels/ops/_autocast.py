"""Keeps autocast out of a kernel whose operands have already been cast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from fmkernels._dispatch import autocast_enabled


def autocast_off(device_type: str) -> AbstractContextManager:
    """Context in which autocast does not touch the reference's own matmuls.

    They sum in float32 on purpose, and autocast would round their operands again. Entering
    torch.autocast costs microseconds, so nothing is entered where it is off already.
    """
    if autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
