"""Runs the verification cases on this machine: forward and every gradient against float64.

The float64 result of PyTorch is the oracle, computed from the very same rounded inputs; the
tolerance is the policy of ``fmkernels.testing``, which measures PyTorch's own error in the same
dtype. A case also fails when the backend that was asked for did not do the work: the dispatcher
ops that ran are recorded.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fmkernels.bench.numerics import Check, check
from fmkernels.bench.verify_cases import Case, Named, all_cases
from fmkernels.bench.verify_frozen import frozen_cases
from fmkernels.bench.verify_transformer import transformer_cases

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Verdict:
    """One case in one dtype on one backend.

    Attributes:
        ok: the numbers are right and the named backend computed them.
        error, allowed: of the worst tensor: largest deviation from float64 relative to the largest
            magnitude, and what the policy accepts.
        worst: name of that tensor, "output 0" or "grad input".
        ops: the dispatcher ops of fmkernels that ran, in order of first use.
        message: why it is not ok.
    """

    family: str
    op: str
    case: str
    dtype: str
    backend: str
    ok: bool
    error: float | None = None
    allowed: float | None = None
    worst: str = ""
    ops: tuple[str, ...] = ()
    message: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def select(families: tuple[str, ...] = ("all",)) -> list[Case]:
    """The cases of ``families``."""
    cases = [*all_cases(), *transformer_cases(), *frozen_cases()]
    return [case for case in cases if "all" in families or case.family in families]


def verify(
    cases: Iterable[Case],
    backends: Iterable[str],
    dtypes: Iterable[str] = tuple(DTYPES),
    device: str = "cpu",
) -> Iterator[Verdict]:
    """Verify each case on each backend in each dtype, lazily.

    Args:
        device: where the backends compute; the oracle is computed on the CPU.
    """
    dtypes, backends = tuple(dtypes), tuple(backends)
    for case in cases:
        for dtype in dtypes:
            yield from _verify_dtype(case, dtype, backends, device)


def _verify_dtype(
    case: Case, dtype: str, backends: tuple[str, ...], device: str
) -> Iterator[Verdict]:
    # crc32 rather than hash(): the same inputs in every process.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.op} {case.name}".encode()))
    inputs = {name: _like(tensor, DTYPES[dtype]) for name, tensor in case.make(generator).items()}
    theirs = _evaluate(case, case.torch, inputs)
    oracle = _evaluate(
        case, case.torch, {name: _like(tensor, torch.float64) for name, tensor in inputs.items()}
    )
    for backend in backends:
        recorder = _OpRecorder()
        verdict = {
            "family": case.family,
            "op": case.op,
            "case": case.name,
            "dtype": dtype,
            "backend": backend,
        }
        try:
            with recorder:
                there = {name: _like(tensor, device=device) for name, tensor in inputs.items()}
                computed = _evaluate(case, lambda x, b=backend: case.ours(x, b), there)
                computed = {name: tensor.cpu() for name, tensor in computed.items()}
            result = check(computed, [theirs], oracle, DTYPES[dtype])
        except Exception as error:  # the other cases are still worth knowing
            message = f"{type(error).__name__}: {error}"
            yield Verdict(**verdict, ok=False, ops=tuple(recorder.ops), message=message)
            continue
        yield _verdict(verdict, result, tuple(recorder.ops))


def _verdict(fields: dict[str, str], result: Check, ops: tuple[str, ...]) -> Verdict:
    message = result.message
    ran_elsewhere = fields["backend"] == "cpu" and not ops
    if ran_elsewhere:
        message = "no fmkernels op ran: something other than the cpu backend computed this"
    return Verdict(
        **fields,
        ok=result.ok and not ran_elsewhere,
        error=result.error,
        allowed=result.allowed,
        worst=result.worst,
        ops=ops,
        message=message,
    )


def _evaluate(case: Case, compute: Callable[[Named], object], inputs: Named) -> Named:
    """Every output and gradient by name. The gradients of the outputs are the same random numbers
    whatever the dtype, and not contiguous, since autograd promises no strides."""
    leaves = {name: tensor.detach() for name, tensor in inputs.items()}
    sources = {
        name: leaves[name].requires_grad_()
        for name in leaves
        if case.gradients and leaves[name].is_floating_point() and name not in case.constants
    }
    with torch.set_grad_enabled(case.gradients):
        outputs = compute(leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not case.gradients:
        return {f"output {i}": output for i, output in enumerate(outputs)}
    generator = torch.Generator().manual_seed(7)
    upstream = [_strided_normal(output, generator) for output in outputs]
    gradients = torch.autograd.grad(outputs, list(sources.values()), upstream)
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return named | {f"grad {name}": grad for name, grad in zip(sources, gradients, strict=True)}


def _strided_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    # Rounded to bf16's 8 bits, so that every dtype gets exactly the same values.
    values = torch.randn(*like.shape, 2, generator=generator).bfloat16()
    return values.to(like)[..., 0]


def _like(tensor: Tensor, dtype: torch.dtype | None = None, device: str = "cpu") -> Tensor:
    """``tensor`` in ``dtype``, on ``device``, with its strides; masks keep their dtype."""
    if not tensor.is_floating_point() and device == "cpu":
        return tensor
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
    return copy.copy_(tensor)


class _OpRecorder(TorchDispatchMode):
    """Notes which of fmkernels' dispatcher ops run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[str, None] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fmkernels":
            self.ops[func.overloadpacket.__name__] = None
        return func(*args, **(kwargs or {}))
