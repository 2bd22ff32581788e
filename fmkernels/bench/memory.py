"""Memory that a call needs, PyTorch's beside fmkernels', each in a process of its own.

What counts is anonymous memory (tensors, packed weights, work buffers; not code) above what the
process held with the module and its inputs alone: its peak during a call, with what earlier calls
left behind. Linux only.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fmkernels.bench import candidates
from fmkernels.bench.candidates import Problem
from fmkernels.bench.results import EAGER, OURS
from fmkernels.bench.workloads import WORKLOADS, Workload

_BUILDERS = {EAGER: candidates.eager, OURS: candidates.ours}
_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Peak:
    """The memory of one cell.

    Attributes:
        bytes: by candidate, in the layout where it needs least.
    """

    workload: str
    dtype: str
    mode: str
    bytes: dict[str, int]

    @property
    def ratio(self) -> float:
        """fmkernels' share of what eager needs."""
        return self.bytes[OURS] / max(1, self.bytes[EAGER])

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio}


def measure(workloads: Sequence[Workload], dtypes: Sequence[str], mode: str) -> Iterator[Peak]:
    """The peaks of ``workloads`` in every dtype that they have.

    Args:
        workloads: from :data:`WORKLOADS`.
        mode: "inference" or "training".

    Raises:
        RuntimeError: this is not Linux. What a candidate raises comes through as it is.
    """
    if not (_PROCESS / "clear_refs").exists():
        raise RuntimeError("memory is measured on Linux, which says how much a process holds")
    threads = torch.get_num_threads()
    # A process that was forked would begin with its parent's memory.
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        for workload in workloads:
            for dtype in dtypes:
                if dtype not in workload.dtypes or mode not in workload.modes:
                    continue
                calls = [
                    (workload.name, dtype, mode, name, layout, threads)
                    for name in _BUILDERS
                    for layout in workload.layouts
                ]
                found = zip(calls, pool.map(_peak, calls, chunksize=1), strict=True)
                least: dict[str, int] = {}
                for (*_, name, _, _), peak in found:
                    least[name] = min(peak, least.get(name, peak))
                yield Peak(workload.name, dtype, mode, least)


def _peak(call: tuple[str, str, str, str, str, int]) -> int:
    """In a process of its own: what one candidate needs."""
    name, dtype, mode, candidate_name, layout, threads = call
    torch.set_num_threads(threads)
    (workload,) = [w for w in WORKLOADS if w.name == name]
    problem = Problem.build(workload, dtype, mode)
    if mode == "training":
        one = torch.ones(1, requires_grad=True)
        torch.autograd.grad(one + one, one, torch.ones(1))  # what that imports is nobody's
    _give_back()
    before = _held("RssAnon")
    with torch.set_grad_enabled(mode == "training"):
        candidate = _BUILDERS[candidate_name](problem, layout)
        for _ in range(2):  # the second may find more remembered than the first
            candidate.call()
        (_PROCESS / "clear_refs").write_text("5")  # the peak is now what is held now
        anonymous, all_of_it = _held("RssAnon"), _held("VmRSS")
        candidate.call()
    return anonymous - before + max(0, _held("VmHWM") - all_of_it)


def _give_back() -> None:
    """Returns to the system what the allocator keeps of memory that was freed."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _held(field: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status does not say {field}")
