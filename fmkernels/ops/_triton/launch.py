"""Launch configurations as data, and the one function that starts a kernel."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from fmkernels._dispatch import current_precision
from fmkernels.ops import _dropout
from fmkernels.ops._triton.support import (
    INTERPRETING,
    compile_only,
    cuda_table,
    hip_table,
    unsupported,
)


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        num_warps, num_stages: Triton's options.
        blocks: the kernel's tile sizes, ``(("BLOCK_M", 128), ...)``.
        options: further compiler options, such as ``(("waves_per_eu", 2),)`` on AMD.
    """

    num_warps: int
    num_stages: int
    blocks: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, int], ...] = ()

    def __getitem__(self, block: str) -> int:
        return dict(self.blocks)[block]

    @property
    def name(self) -> str:
        """``"128x128x64-w8-s3"``."""
        return "x".join(str(size) for _, size in self.blocks) + (
            f"-w{self.num_warps}-s{self.num_stages}"
        )


def config(num_warps: int, num_stages: int, waves_per_eu: int = 0, **blocks: int) -> Config:
    """A :class:`Config` with the tile sizes as keywords."""
    options = (("waves_per_eu", waves_per_eu),) if waves_per_eu else ()
    return Config(num_warps, num_stages, tuple(blocks.items()), options)


# A kernel's configurations: architecture -> name of the case (such as "large") -> Config. The
# architecture "interpret" is Triton's interpreter, where a few large tiles are quickest.
Table = Mapping[str, Mapping[str, Config]]

_architectures: dict[int, str] = {}


def architecture() -> str:
    """Which entry of a :data:`Table` serves the current device."""
    if _counting_for is not None:
        return _counting_for
    if INTERPRETING:
        return "interpret"
    device = driver.active.get_current_device()
    found = _architectures.get(device)
    if found is None:
        target = driver.active.get_current_target()
        if target.backend == "hip":
            found = hip_table(target.arch)
        else:
            found = cuda_table(target.arch // 10, target.arch % 10)
        if found is None:
            raise unsupported("launch", f"no launch configurations for {target.arch}")
        _architectures[device] = found
    return found


def forget_architectures() -> None:
    """After another driver took the place of Triton's."""
    _architectures.clear()


@dataclass(frozen=True)
class Launch:
    """What an observer sees of a launch.

    Attributes:
        bytes: of all tensors among the arguments, each counted once.
        compiled: Triton's kernel; None where kernels are interpreted or only counted.
    """

    kernel: str
    config: Config
    grid: tuple[int, ...]
    constants: Mapping[str, Any]
    bytes: int
    compiled: Any


_observers: list[Callable[[Launch], None]] = []


@contextlib.contextmanager
def observed_launches() -> Iterator[list[Launch]]:
    """Collect every launch made inside, in order."""
    seen: list[Launch] = []
    observer = seen.append
    _observers.append(observer)
    try:
        yield seen
    finally:
        _observers.remove(observer)


_counting_for: str | None = None


@contextlib.contextmanager
def counted_launches(arch: str) -> Iterator[list[Launch]]:
    """As :func:`observed_launches`, for meta tensors: nothing is compiled, nothing runs."""
    global _counting_for
    previous, _counting_for = _counting_for, arch
    try:
        with compile_only(), observed_launches() as seen:
            yield seen
    finally:
        _counting_for = previous


def launch(
    kernel: Any,
    grid: Sequence[int],
    config: Config,
    *arguments: Any,
    **constants: Any,
) -> None:
    """Start ``kernel`` on the device of its first tensor argument; nothing for an empty grid.

    Args:
        grid: programs along each axis.
        arguments: the kernel's run-time arguments, in order.
        constants: its compile-time arguments, without the tile sizes.

    Raises:
        UnsupportedError: more programs than a grid may have.
    """
    grid = tuple(grid)
    if 0 in grid:
        return
    name = kernel.fn.__name__
    if grid[0] >= 2**31 or any(size > 65535 for size in grid[1:]):
        raise unsupported(name, f"a grid of {grid} programs")
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    tensor = tensors[0]
    options = {} if INTERPRETING else dict(config.options)
    compiled = None
    if _counting_for is None:
        with _device_of(tensor):
            compiled = kernel[grid](
                *arguments,
                **constants,
                **dict(config.blocks),
                **options,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
    if _observers:
        distinct = {id(tensor): tensor for tensor in tensors}.values()
        size = sum(tensor.numel() * tensor.itemsize for tensor in distinct)
        for observer in _observers:
            observer(Launch(name, config, grid, constants, size, compiled))


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    # Entering a device context costs a microsecond or two, which most calls need not spend.
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


# Beyond this many elements a 32-bit offset may overflow, the rounding up to whole tiles included.
_INT32_ELEMENTS = 2**31 - 2**24


def index_dtype(*tensors: Tensor | None) -> tl.dtype:
    """The dtype in which offsets into all of these tensors can be computed.

    int64 costs two registers per address, which makes large tiles spill, so it is used where a
    tensor needs it.
    """
    spans = [
        sum((size - 1) * abs(stride) for size, stride in zip(t.shape, t.stride(), strict=True))
        for t in tensors
        if t is not None
    ]
    return tl.int64 if max(spans, default=0) >= _INT32_ELEMENTS else tl.int32


def accumulator_dtype(tensor: Tensor) -> tl.dtype:
    """float64 for float64, otherwise float32."""
    return tl.float64 if tensor.dtype is torch.float64 else tl.float32


def dot_precision(tensor: Tensor, kind: str, exact: bool = False) -> str:
    """``input_precision`` of ``tl.dot``: tf32 only for float32, and where torch allows it.

    Args:
        kind: whose flag to ask: ``"matmul"`` (``torch.backends.cuda.matmul``) or ``"conv"``
            (``torch.backends.cudnn.conv``).
        exact: whether the call was made under ``precision("exact")``, for a backward, which may
            run in another thread; a forward need not say.
    """
    if tensor.dtype is not torch.float32 or exact or current_precision() == "exact":
        return "ieee"
    backend = torch.backends.cuda.matmul if kind == "matmul" else torch.backends.cudnn.conv
    return "tf32" if backend.fp32_precision == "tf32" else "ieee"


def dropout_constants(p: float) -> dict[str, Any]:
    """Arguments of ``primitives.drop``: compile-time ones, for a float one is only a float32."""
    return {"THRESHOLD": _dropout.threshold(p), "FACTOR": _dropout.factor(p)}


def multiprocessors(tensor: Tensor) -> int:
    """How many the tensor's device has; H100's number for a stand-in, few for the interpreter."""
    if INTERPRETING:
        return 4
    if tensor.is_meta:
        return 132
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def split_count(tensor: Tensor, tiles: int, steps: int) -> int:
    """Into how many parts a long reduction is split, so that ``tiles`` outputs fill the device.

    Args:
        steps: iterations of the reduction's loop; each part keeps at least eight.
    """
    wanted = -(-2 * multiprocessors(tensor) // max(tiles, 1))
    return max(1, min(wanted, steps // 8, 64))


# --- autotuning, off by default ---

_tuned: dict[Hashable, Config] = {}
_tuning_lock = threading.Lock()


def tuned(
    key: Hashable, default: Config, table: Mapping[str, Config], run: Callable[[Config], None]
) -> Config:
    """The quickest configuration of the table if ``FMKERNELS_AUTOTUNE=1``, otherwise ``default``.

    Timed once per key and process, under a lock, on the current stream. Never while a CUDA graph
    is captured, when the default serves.

    Args:
        key: kernel, dtype, features and sizes rounded to powers of two; the device is added.
        run: launches the kernel with a configuration, into outputs that may be overwritten.
    """
    if os.environ.get("FMKERNELS_AUTOTUNE") != "1" or not torch.cuda.is_available():
        return default
    key = (torch.cuda.current_device(), key)
    with _tuning_lock:
        if key not in _tuned:
            if torch.cuda.is_current_stream_capturing():
                return default
            choices = dict.fromkeys((default, *table.values()))
            _tuned[key] = min(choices, key=lambda choice: _milliseconds(run, choice))
        return _tuned[key]


def power_of_two(size: int) -> int:
    """The next power of two, for the sizes in a key: what differs less is tuned once."""
    return triton.next_power_of_2(size)


def _milliseconds(run: Callable[[Config], None], choice: Config) -> float:
    try:
        return triton.testing.do_bench(lambda: run(choice), warmup=5, rep=20)
    except triton.runtime.errors.OutOfResources:
        return float("inf")
