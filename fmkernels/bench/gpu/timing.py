"""Timing on a GPU: a clock that waits for it, CUDA graphs, and its measured ceilings.

Written for the timer of ``fmkernels.bench.timer``; not run so far, for want of a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fmkernels.bench.roofline import Ceilings

_TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def clock() -> float:
    """Seconds, after all work on the GPU has ended: bursts between two readings are whole."""
    torch.cuda.synchronize()
    return time.perf_counter()


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """``call`` as the replay of a CUDA graph, so that launches cost no host time.

    What cannot be captured, because it synchronises or reads the host, is called as it is.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compilation, library handles and workspaces
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


def probe() -> Ceilings:
    """PyTorch's matmul and sum on large operands: lower bounds of what the GPU can do."""
    peaks = {}
    for name, dtype in _TORCH_DTYPES.items():
        size = 8192
        a = torch.randn(size, size, device="cuda", dtype=dtype)
        peaks[name] = 2 * size**3 / _seconds(lambda a=a: a @ a) / 1e9
    buffer = torch.ones(1 << 28, device="cuda")
    return Ceilings(
        threads=torch.get_num_threads(),
        peak_gflops=peaks,
        read_gbs=buffer.numel() * buffer.itemsize / _seconds(buffer.sum) / 1e9,
        cache_bytes=torch.cuda.get_device_properties(0).L2_cache_size,
        source=f"torch.matmul and torch.sum on {torch.cuda.get_device_name()}",
    )


def _seconds(call: Callable[[], object], repeats: int = 10) -> float:
    call()
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats
