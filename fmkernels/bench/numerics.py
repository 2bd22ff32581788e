"""Are a candidate's numbers right? The policy of ``fmkernels.testing``, over named tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmkernels import testing
from fmkernels.bench.candidates import Tensors


@dataclass(frozen=True)
class Check:
    """The worst of several tensors against float64.

    Attributes:
        ok: all of them are within the policy.
        error: largest deviation relative to the largest magnitude, of the worst tensor; or its
            relative deviation in the 2-norm, see ``corners`` of :func:`check`.
        allowed: what the policy accepts for that tensor, on the same scale.
        worst: its name.
        message: why it is not ok.
    """

    ok: bool
    error: float
    allowed: float
    worst: str
    message: str = ""


# In the 2-norm, relative: what a handful of units among millions that fall on the other side of a
# corner changes a gradient by. A wrong gradient is further off.
_CORNER_FLOOR = 4e-3


def check(
    tensors: Tensors,
    baselines: list[Tensors],
    oracle: Tensors,
    dtype: torch.dtype,
    *,
    corners: bool = False,
) -> Check:
    """Compare with float64.

    Args:
        tensors: what the candidate computed, outputs as "output 0", gradients as "grad ...".
        baselines: PyTorch's own results in ``dtype`` (one per layout); the worst of them counts.
        oracle: PyTorch's results in float64, from the same rounded inputs.
        dtype: of the candidate.
        corners: the computation has ReLUs or max-pooling. Some unit among millions falls on the
            other side of the corner by one rounding, and moves a whole element of the gradient, in
            PyTorch's run or in the candidate's; so gradients are compared in the 2-norm.
    """
    worst: Check | None = None
    for name, exact in oracle.items():
        if name not in tensors:
            return Check(False, math.inf, 0.0, name, f"{name} is missing")
        actual = tensors[name]
        if actual.shape != exact.shape or actual.dtype != dtype:
            found = f"{tuple(actual.shape)} {testing.dtype_name(actual.dtype)}"
            wanted = f"{tuple(exact.shape)} {testing.dtype_name(dtype)}"
            return Check(False, math.inf, 0.0, name, f"{name} is {found}, not {wanted}")
        compare = _in_norm if corners and name.startswith("grad") else _by_policy
        verdict = compare(name, actual, [baseline[name] for baseline in baselines], exact)
        if worst is None or _badness(verdict) > _badness(worst):
            worst = verdict
    assert worst is not None, "the oracle has at least one output"
    if worst.ok:
        return worst
    message = f"{worst.worst} is off by {worst.error:.1e}; {worst.allowed:.1e} is allowed"
    return replace(worst, message=message)


def _by_policy(name: str, actual: Tensor, baselines: list[Tensor], exact: Tensor) -> Check:
    torch_error = max(testing.max_error(baseline, exact) for baseline in baselines)
    error = testing.max_error(actual, exact)
    allowed = testing.allowed_error(torch_error, exact, actual.dtype)
    # Relative figures are for the reader; the verdict needs no division.
    magnitude = exact.abs().max().item() if exact.numel() else 0.0
    scale = magnitude if 0 < magnitude < math.inf else 1.0
    return Check(error <= allowed, error / scale, allowed / scale, name)


def _in_norm(name: str, actual: Tensor, baselines: list[Tensor], exact: Tensor) -> Check:
    def error_of(tensor: Tensor) -> float:
        error = ((tensor.double() - exact).norm() / exact.norm()).item()
        return error if math.isfinite(error) else math.inf

    error, allowed = error_of(actual), 2 * max(map(error_of, baselines)) + _CORNER_FLOOR
    return Check(error <= allowed, error, allowed, name)


def _badness(verdict: Check) -> float:
    """Error as a share of what is allowed; 0 for an exact result."""
    if verdict.error == 0:
        return 0.0
    return verdict.error / verdict.allowed if verdict.allowed else math.inf
