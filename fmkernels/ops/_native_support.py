"""What the native CPU library can serve, whatever the op."""

from __future__ import annotations

from torch import Tensor

from fmkernels import _native
from fmkernels._checks import FLOAT_DTYPES
from fmkernels._dispatch import SUPPORTED, Support

_MISSING = (
    None
    if _native.HAS_NATIVE
    else Support(False, f"the native library is not loaded: {_native.NATIVE_ERROR}")
)


def native_cpu_support(tensor: Tensor) -> Support:
    """Whether the native library is there and computes on this tensor's device and in its dtype."""
    if _MISSING is not None:
        return _MISSING
    if tensor.device.type != "cpu":
        return Support(False, f"computes on CPU tensors, got a tensor on {tensor.device}")
    if tensor.dtype not in FLOAT_DTYPES:
        return Support(False, f"computes in float32, bfloat16, float16, float64; got {tensor.dtype}")
    return SUPPORTED
