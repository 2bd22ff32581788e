"""This machine's ceilings, probed in the same run as the timings, and what they allow a workload.

``fmkernels._lab`` probes them with loops that do nothing else: independent FMAs on registers, and
reads of a buffer much larger than the caches. Without the native library, PyTorch's own matmul and
sum stand in; those are lower bounds of the real ceilings, and the report says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from fmkernels import _native
from fmkernels.info import last_level_cache_bytes

_STREAM_BYTES = 256 << 20
_LAB_DTYPES = {"fp32": "f32", "bf16": "bf16"}
_TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Ceilings:
    """What this machine can do at a thread count.

    Attributes:
        threads: number of threads all figures are for.
        peak_gflops: dtype name -> 1e9 floating-point operations per second (an FMA counts as two).
        read_gbs: 1e9 bytes per second read from memory.
        cache_bytes: size of the last-level cache; smaller working sets need not come from memory.
        source: how the figures were obtained.
    """

    threads: int
    peak_gflops: dict[str, float]
    read_gbs: float
    cache_bytes: int
    source: str

    def roof_gflops(self, dtype: str, flops: int, nbytes: int) -> float:
        """The most GFLOP/s that ``flops`` operations over ``nbytes`` can reach. Memory bounds them
        only when the bytes do not fit the last-level cache."""
        peak = self.peak_gflops[dtype]
        if nbytes <= self.cache_bytes or nbytes == 0:
            return peak
        return min(peak, self.read_gbs * flops / nbytes)


def probe(threads: int, seconds: float = 0.3) -> Ceilings:
    """Measure the ceilings at ``threads`` threads, spending about ``seconds`` on each."""
    lab = _native.lab()
    if lab is not None and hasattr(lab, "peak_gflops"):
        peaks, source = _lab_peaks(lab, threads, seconds), "fmkernels._lab: FMAs on registers"
    else:
        peaks = _torch_peaks(seconds)
        source = "torch.matmul (no native library): a lower bound of the FMA ceiling"
    if lab is not None and hasattr(lab, "read_bandwidth_gbs"):
        share = _STREAM_BYTES // threads
        bandwidth = _on_threads(threads, lambda: lab.read_bandwidth_gbs(share, seconds))
    else:
        bandwidth = _torch_bandwidth(seconds)
        source += "; memory by torch.sum"
    return Ceilings(threads, peaks, bandwidth, last_level_cache_bytes(), source)


def _on_threads(threads: int, rate: Callable[[], float]) -> float:
    """The summed rates of simultaneous runs on ``threads`` threads (the probes drop the GIL)."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(future.result() for future in [pool.submit(rate) for _ in range(threads)])


def _lab_peaks(lab, threads: int, seconds: float) -> dict[str, float]:
    peaks = {}
    for dtype, lab_name in _LAB_DTYPES.items():
        try:
            peaks[dtype] = _on_threads(
                threads, lambda name=lab_name: lab.peak_gflops(name, seconds)
            )
        except (ValueError, RuntimeError):
            # An ISA without bf16 arithmetic computes bf16 with fp32 FMAs.
            peaks[dtype] = peaks["fp32"]
    return peaks


def _torch_peaks(seconds: float) -> dict[str, float]:
    size = 1024
    peaks = {}
    for name, dtype in _TORCH_DTYPES.items():
        a = torch.ones(size, size, dtype=dtype)
        out = torch.empty_like(a)
        best = _quickest(lambda a=a, out=out: torch.mm(a, a, out=out), seconds)
        peaks[name] = 2 * size**3 / best / 1e9
    return peaks


def _torch_bandwidth(seconds: float) -> float:
    buffer = torch.ones(_STREAM_BYTES // 4)
    return _STREAM_BYTES / _quickest(buffer.sum, seconds) / 1e9


def _quickest(call: Callable[[], object], seconds: float) -> float:
    call()
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
