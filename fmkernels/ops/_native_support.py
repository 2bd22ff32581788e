"""What the native CPU library can serve, whatever the op."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels import _native
from fmkernels._checks import FLOAT_DTYPES
from fmkernels._dispatch import SUPPORTED, Support


def native_ops_support(*ops: str) -> Support:
    """Whether the native library is loaded and has a CPU kernel for each op; asked at import."""
    if not _native.HAS_NATIVE:
        return Support(False, f"the native library is not loaded: {_native.NATIVE_ERROR}")
    missing = [
        op
        for op in ops
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fmkernels::{op}", "CPU")
    ]
    if missing:
        return Support(False, f"the native library has no kernel for {', '.join(missing)}")
    return SUPPORTED


_LIBRARY = native_ops_support()


def native_cpu_support(tensor: Tensor, ops: Support = _LIBRARY) -> Support:
    """Whether the native kernels serve this tensor's device and dtype.

    Args:
        tensor: one of the op's operands.
        ops: answer of :func:`native_ops_support` for the ops concerned.
    """
    if not ops.ok:
        return ops
    if not tensor.is_cpu:
        return Support(False, f"computes on CPU tensors, got a tensor on {tensor.device}")
    if tensor.dtype not in FLOAT_DTYPES:
        return Support(
            False, f"computes in float32, bfloat16, float16, float64; got {tensor.dtype}"
        )
    return SUPPORTED
