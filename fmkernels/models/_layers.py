"""Which package a model takes its layers from."""

from __future__ import annotations

from types import ModuleType

import torch.nn

import fmkernels.nn

LAYERS = {"torch": torch.nn, "fmkernels": fmkernels.nn}


def layers_of(name: str) -> ModuleType:
    """``torch.nn`` or ``fmkernels.nn``.

    Raises:
        ValueError: ``name`` is neither ``"torch"`` nor ``"fmkernels"``.
    """
    if name not in LAYERS:
        raise ValueError(f"layers must be one of {', '.join(LAYERS)}, got {name!r}")
    return LAYERS[name]
