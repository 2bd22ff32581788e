"""Fused kernels and drop-in layers for convolutional, recurrent and Transformer networks.

>>> import fmkernels
>>> report = fmkernels.replace(model)       # swap the layers of an existing model
>>> layer = fmkernels.nn.Conv2d(3, 16, 3)   # or build with layers that are torch.nn's subclasses
"""

from __future__ import annotations

import importlib
from types import ModuleType

from fmkernels import functional, nn
from fmkernels._dispatch import (
    BACKEND_NAMES,
    Decision,
    UnsupportedError,
    current_backend,
    current_precision,
    last_decisions,
    precision,
    use_backend,
)
from fmkernels._native import HAS_NATIVE, NATIVE_ERROR
from fmkernels._replace import Report, patched, replace
from fmkernels._version import __version__
from fmkernels.freeze import freeze, unfreeze
from fmkernels.info import info

__all__ = [
    "BACKEND_NAMES",
    "HAS_NATIVE",
    "NATIVE_ERROR",
    "Decision",
    "Report",
    "UnsupportedError",
    "__version__",
    "bench",
    "current_backend",
    "current_precision",
    "freeze",
    "functional",
    "info",
    "last_decisions",
    "models",
    "nn",
    "patched",
    "precision",
    "replace",
    "testing",
    "unfreeze",
    "use_backend",
]

# Not needed by code that only swaps layers, so imported on first use.
_ON_FIRST_USE = ("bench", "models", "testing")


def __getattr__(name: str) -> ModuleType:
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"fmkernels.{name}")
    raise AttributeError(f"module 'fmkernels' has no attribute {name!r}")
