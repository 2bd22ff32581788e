"""Are a candidate's numbers right? The policy of ``fmkernels.testing``, over named tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fmkernels.bench.candidates import Tensors


@dataclass(frozen=True)
class Check:
    """The worst of several tensors against float64.

    Attributes:
        ok: all of them are within the policy.
        error: largest deviation relative to the largest magnitude, of the worst tensor.
        allowed: what the policy accepts for that tensor, on the same scale.
        worst: its name.
        message: why it is not ok.
    """

    ok: bool
    error: float
    allowed: float
    worst: str
    message: str = ""


# Below this, relative to the largest magnitude, a deviation is rounding whoever computes it.
_FLOOR = {"fp64": 1e-14, "fp32": 1e-6, "fp16": 2e-3, "bf16": 1.6e-2}


def check(tensors: Tensors, baselines: list[Tensors], oracle: Tensors, dtype: str) -> Check:
    """Compare with float64.

    Args:
        tensors: what the candidate computed.
        baselines: PyTorch's own results in ``dtype`` (one per layout); the worst of them counts.
        oracle: PyTorch's results in float64, from the same rounded inputs.
        dtype: "fp32", "bf16", "fp16" or "fp64".
    """
    worst: Check | None = None
    for name, exact in oracle.items():
        if name not in tensors:
            return Check(False, math.inf, 0.0, name, f"{name} is missing")
        if tensors[name].shape != exact.shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(exact.shape)}"
            return Check(False, math.inf, 0.0, name, f"{name} has shape {shapes}")
        error = _error(tensors[name], exact)
        theirs = max(_error(baseline[name], exact) for baseline in baselines)
        allowed = 2 * theirs + _FLOOR[dtype]
        ok = error <= allowed
        message = "" if ok else f"{name} is off by {error:.1e}; {allowed:.1e} is allowed"
        verdict = Check(ok, error, allowed, name, message)
        if worst is None or _badness(verdict) > _badness(worst):
            worst = verdict
    assert worst is not None, "the oracle has at least one output"
    return worst


def _badness(verdict: Check) -> float:
    return verdict.error / verdict.allowed if verdict.allowed else math.inf


def _error(tensor: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest deviation relative to the largest magnitude; infinite where NaN meets a number."""
    if exact.numel() == 0:
        return 0.0
    deviation = (tensor.double() - exact).abs().max().item()
    scale = exact.abs().max().item()
    error = deviation / scale if scale else deviation
    return error if math.isfinite(error) else math.inf
