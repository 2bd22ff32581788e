"""Replacement of a model's layers; the public names are in :mod:`fmkernels`."""

from fmkernels._replace.report import Report, Row
from fmkernels._replace.swap import patched, replace

__all__ = ["Report", "Row", "patched", "replace"]
