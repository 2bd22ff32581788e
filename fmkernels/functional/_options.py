"""Checks of scalar options that several functions share."""

from __future__ import annotations

from fmkernels import _checks as check


def probability(name: str, value: object) -> float:
    """``value`` is a number in [0, 1]."""
    if not 0.0 <= number(name, value) <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)


def number(name: str, value: object) -> float:
    """``value`` is an int or a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {check.describe(value)}")
    return float(value)
