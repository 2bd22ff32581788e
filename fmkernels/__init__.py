"""Fused kernels and drop-in layers for convolutional, recurrent and Transformer networks."""

from __future__ import annotations

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

__all__ = [
    "BACKEND_NAMES",
    "Decision",
    "UnsupportedError",
    "current_backend",
    "current_precision",
    "last_decisions",
    "precision",
    "use_backend",
]
