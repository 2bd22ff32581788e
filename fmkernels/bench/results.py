"""The records a benchmark run leaves: what tables, JSON, CSV and HTML files are made from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from fmkernels.bench.roofline import Ceilings

SCHEMA_VERSION = 1
EAGER, OURS = "eager", "fmkernels"


@dataclass
class Measurement:
    """One candidate in one cell.

    Attributes:
        candidate: "eager", "fmkernels" or a peer.
        layout: memory format of its inputs, "contiguous" or "channels_last".
        status: "ok"; "wrong" (its numbers failed, so it was not timed); "unavailable" (not
            installed, or it cannot run this cell); "error" (it raised).
        message: the reason where the status is not "ok".
        backend: of fmkernels: which backends served its calls; empty for others.
        error: largest deviation from float64, relative to the largest magnitude; None if not run.
        allowed: the largest error the tolerance policy accepts.
        median_s, iqr_s: seconds per call: median and interquartile range over the rounds.
        rounds: number of bursts timed.
        gflops: 1e9 floating-point operations per second, with the workload's operation count.
        of_peak: fraction of the probed FMA ceiling.
        of_roof: fraction of the roofline: the FMA ceiling, or what the memory bandwidth allows
            where the data exceeds the last-level cache.
    """

    candidate: str
    layout: str = "contiguous"
    status: str = "ok"
    message: str = ""
    backend: str = ""
    error: float | None = None
    allowed: float | None = None
    median_s: float | None = None
    iqr_s: float | None = None
    rounds: int = 0
    gflops: float | None = None
    of_peak: float | None = None
    of_roof: float | None = None

    @property
    def label(self) -> str:
        return self.candidate + (" channels_last" if self.layout == "channels_last" else "")


@dataclass
class Cell:
    """One workload in one dtype and mode, with everyone who took part."""

    workload: str
    family: str
    dtype: str
    mode: str
    flops: int
    bytes: int
    measurements: list[Measurement] = field(default_factory=list)

    def fastest(self, candidate: str, layout: str | None = None) -> Measurement | None:
        """The quickest timed measurement of ``candidate`` (in ``layout``, if given)."""
        timed = [
            m
            for m in self.measurements
            if m.candidate == candidate and m.median_s is not None and layout in (None, m.layout)
        ]
        return min(timed, key=lambda m: m.median_s or math.inf, default=None)

    @property
    def ratio(self) -> float | None:
        """Eager's time in its faster layout over fmkernels' time in its faster layout."""
        return _ratio(self.fastest(EAGER), self.fastest(OURS))

    @property
    def ratio_same_layout(self) -> float | None:
        """The same with both on contiguous (NCHW) tensors: the gain if nothing else is changed.
        None for workloads that have only one layout."""
        if len({m.layout for m in self.measurements}) < 2:
            return None
        return _ratio(self.fastest(EAGER, "contiguous"), self.fastest(OURS, "contiguous"))

    @property
    def failed(self) -> bool:
        """fmkernels or eager gave wrong numbers or raised."""
        return any(
            m.status in ("wrong", "error")
            for m in self.measurements
            if m.candidate in (EAGER, OURS)
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "ratio": self.ratio,
            "ratio_same_layout": self.ratio_same_layout,
            "failed": self.failed,
        }


@dataclass
class Results:
    """A whole run.

    Attributes:
        environment: see :func:`fmkernels.bench.environment.environment`.
        ceilings: probed in this run.
        cells: in the order measured.
        quick: whether ``--quick`` shortened it.
    """

    environment: dict[str, Any]
    ceilings: Ceilings
    cells: list[Cell] = field(default_factory=list)
    quick: bool = False

    @property
    def failures(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.failed]

    def geometric_means(self) -> list[dict[str, Any]]:
        """Per family, dtype and mode: geometric mean, least value and number of the ratios."""
        groups: dict[tuple[str, str, str], list[float]] = {}
        for cell in self.cells:
            if cell.ratio is not None:
                groups.setdefault((cell.family, cell.dtype, cell.mode), []).append(cell.ratio)
        return [
            {
                "family": family,
                "dtype": dtype,
                "mode": mode,
                "ratio": geometric_mean(ratios),
                "least": min(ratios),
                "workloads": len(ratios),
            }
            for (family, dtype, mode), ratios in groups.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "quick": self.quick,
            "environment": self.environment,
            "ceilings": asdict(self.ceilings),
            "geometric_means": self.geometric_means(),
            "cells": [cell.to_dict() for cell in self.cells],
        }

    def flat_rows(self) -> Iterator[dict[str, Any]]:
        """One dictionary per measurement, with its cell's columns: the rows of the CSV file."""
        for cell in self.cells:
            shared = cell.to_dict()
            del shared["measurements"]
            for measurement in cell.measurements:
                yield {**shared, **asdict(measurement)}


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _ratio(base: Measurement | None, ours: Measurement | None) -> float | None:
    if base is None or ours is None:
        return None
    return base.median_s / ours.median_s
