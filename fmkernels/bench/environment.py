"""The circumstances of a run, for the head of every report."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch

import fmkernels


def environment() -> dict[str, Any]:
    """Everything in ``fmkernels.info()`` plus the time, torch's parallel settings and the load."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average": load_average(),
        "torch_parallel_info": torch.__config__.parallel_info(),
        **fmkernels.info().to_dict(),
    }


def load_average() -> float | None:
    """Running processes, averaged over the last minute; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def busy_warning(load: float | None, cpus: int) -> str | None:
    """A sentence when other work on the machine would disturb the timings, else None.

    A quarter of the processors is the threshold: below it the interleaved medians hold still.
    """
    if load is None or load <= 0.25 * cpus:
        return None
    return (
        f"the load average is {load:.2f} on {cpus} logical CPUs: other work will disturb the "
        "timings; repeat this when the machine is idle"
    )
