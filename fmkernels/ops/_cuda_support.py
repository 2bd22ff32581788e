"""Whether the CUDA C++ kernels can serve a call."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fmkernels import _native
from fmkernels._dispatch import SUPPORTED, Support

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("fmkernels", "FRAGMENT")
_library.define("cuda_device_problem(int device) -> str")
_library.define("cuda_architectures() -> str")

# Tests load the same kernels for CPU tensors (build_support/emulator.py) and set this.
EMULATED = False


OPERATORS = (
    "rnn_recurrence_forward",
    "rnn_recurrence_backward",
    "depthwise_forward",
    "depthwise_backward",
    "sdpa_decode",
)


def is_built() -> bool:
    """Whether the native library holds the CUDA kernels."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    name, key = "fmkernels::cuda_device_problem", "CompositeExplicitAutograd"
    return _native.HAS_NATIVE and has(name, key)


def build_facts() -> dict[str, object]:
    """What the native library holds for CUDA tensors: empty without CUDA kernels."""
    if not is_built():
        return {}
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    operators = [name for name in OPERATORS if has(f"fmkernels::{name}", "CUDA")]
    architectures = torch.ops.fmkernels.cuda_architectures()
    return {"CUDA operators": operators, "CUDA architectures": architectures}


@functools.cache
def _device_problem(index: int) -> str:
    return torch.ops.fmkernels.cuda_device_problem(index)


def problem_of(op: str, device: int | None, dtype: torch.dtype, *numbers: Any) -> str:
    """The answer of an op that says why a device cannot take a problem."""
    name = str(dtype).removeprefix("torch.")
    return getattr(torch.ops.fmkernels, op)(0 if device is None else device, name, *numbers)


# To tracers the answers are constants. This is torch.compiler.assume_constant_result, which would
# import all of torch._dynamo here.
_device_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]
problem_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def device_support(index: int | None = None) -> Support:
    """Whether the kernels run on a CUDA device (the current one if no index is given)."""
    if not _native.HAS_NATIVE:
        return Support(False, f"the native library is not loaded: {_native.NATIVE_ERROR}")
    if not is_built():
        return Support(False, "the native library was built without CUDA kernels")
    if torch.version.cuda is None:
        return Support(False, "the installed torch is not a CUDA build")
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    problem = _device_problem(index)
    return Support(False, problem) if problem else SUPPORTED


def cuda_support(tensor: Tensor) -> Support:
    """Whether the kernels serve this tensor's device and dtype."""
    if tensor.dtype not in DTYPES:
        return Support(False, f"computes in float32, bfloat16, float16; got {tensor.dtype}")
    if EMULATED and tensor.device.type == "cpu":
        return SUPPORTED
    if tensor.device.type != "cuda":
        return Support(False, f"computes on CUDA tensors, got a tensor on {tensor.device}")
    return device_support(tensor.device.index)
