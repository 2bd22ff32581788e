"""Whether Triton kernels can serve a call, and the way a call reaches them; imports no triton."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fmkernels._checks import FLOAT_DTYPES
from fmkernels._dispatch import SUPPORTED, Backend, Support, UnsupportedError

MINIMUM_TRITON = (3, 6)
# Chips with a table of launch configurations of their own, and those that use another's.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
_HIP_TABLES = {"gfx90a": "gfx942", "gfx942": "gfx942", "gfx950": "gfx942"}

# Triton decides when a kernel is defined; as it reads the variable only then, so do we.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def cuda_table(major: int, minor: int) -> str | None:
    """The architecture whose launch configurations serve a compute capability; None below 8.0."""
    if major < 8:
        return None
    # 8.6, 8.9 and 12.x have less shared memory than 8.0 and no wgmma or tcgen05.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def hip_table(arch: str) -> str | None:
    """The same for AMD's name of a chip, ``"gfx942:sramecc+:xnack-"`` for example."""
    return _HIP_TABLES.get(arch.split(":")[0])


def _find_triton() -> Support:
    if sys.platform == "win32":
        return Support(False, "Triton has no Windows build")
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return Support(False, "triton is not installed")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < MINIMUM_TRITON:
        needed = ".".join(map(str, MINIMUM_TRITON))
        return Support(False, f"triton {needed} or newer is needed, {version} is installed")
    return SUPPORTED


TRITON = _find_triton()


def triton_support(tensor: Tensor) -> Support:
    """Whether the Triton kernels serve this tensor's device and dtype.

    CPU tensors are served by Triton's interpreter, if it was on when the package was imported.
    Meta tensors are: calls with them return shapes, or compile under :func:`compile_only`.
    """
    if not TRITON.ok:
        return TRITON
    if tensor.dtype not in FLOAT_DTYPES:
        return Support(
            False, f"computes in float32, bfloat16, float16, float64; got {tensor.dtype}"
        )
    kind = tensor.device.type
    if kind == "meta" or INTERPRETING and kind in ("cpu", "cuda"):
        return SUPPORTED
    if kind == "cpu":
        return Support(False, "computes on CUDA tensors; on CPU tensors if TRITON_INTERPRET=1")
    if kind != "cuda":
        return Support(False, f"computes on CUDA tensors, got a tensor on {tensor.device}")
    return _gpu_support(tensor.device)


def _gpu_support(device: torch.device) -> Support:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        if hip_table(properties.gcnArchName) is None:
            return Support(False, f"has kernels for gfx90a, gfx942, gfx950; got {properties.name}")
    elif cuda_table(properties.major, properties.minor) is None:
        return Support(
            False,
            f"needs compute capability 8.0, {properties.name} has "
            f"{properties.major}.{properties.minor}",
        )
    return SUPPORTED


def device_state() -> Support:
    """Whether any call can be served here, for :func:`fmkernels.info`."""
    if not TRITON.ok or INTERPRETING:
        return TRITON
    if not torch.cuda.is_available():
        return Support(False, "no GPU is available, and TRITON_INTERPRET=1 is not set")
    return _gpu_support(torch.device("cuda", torch.cuda.current_device()))


_compiling_for_meta = False


@contextlib.contextmanager
def compile_only() -> Iterator[None]:
    """Calls with meta tensors run the launchers: for a stand-in driver that compiles only."""
    global _compiling_for_meta
    previous, _compiling_for_meta = _compiling_for_meta, True
    try:
        yield
    finally:
        _compiling_for_meta = previous


def triton_backend(
    module: str,
    supports: Callable[..., Support],
    forward: str,
    backward: str,
    pack: Callable[..., Any] | None = None,
    yields_to: Callable[..., tuple[str, str] | None] | None = None,
) -> Backend:
    """The backend whose kernels are in ``module``.

    Args:
        module: full name of the family's ``triton.py``; imported at the first launch.
        supports: as in :class:`Backend`; asked only where :func:`triton_support` agrees to the
            first tensor of the problem.
        forward, backward: names of the family's ops, and of the launchers in ``module`` with the
            same signatures.
        pack, yields_to: as in :class:`Backend`.
    """

    def both(*problem: Any) -> Support:
        common = triton_support(problem[0])
        return supports(*problem) if common.ok else common

    return Backend(
        supports=both,
        forward=triton_op(module, forward),
        backward=triton_op(module, backward),
        pack=pack,
        yields_to=yields_to,
    )


_library = torch.library.Library("fmkernels_triton", "FRAGMENT")


def triton_op(module: str, name: str) -> Callable[..., Any]:
    """A function that calls the launcher ``name`` of ``module``.

    Where a call is traced (torch.compile, fake and plain meta tensors) it goes through a twin of
    the op ``fmkernels::<name>`` with the same schema, which tracers take as one node. Everywhere
    else the launcher is called directly: a dispatcher round trip costs as much as a launch.
    """
    original = getattr(torch.ops.fmkernels, name).default

    def launcher(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments)

    schema = str(original._schema).removeprefix("fmkernels::")
    _library.define(schema)
    _library.impl(name, launcher, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fmkernels_triton::{name}", original, lib=_library)
    twin = getattr(torch.ops.fmkernels_triton, name).default

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not _is_launchable(arguments):
            return twin(*arguments)
        return launcher(*arguments)

    return call


def _is_launchable(arguments: tuple[Any, ...]) -> bool:
    tensor = next(value for value in arguments if isinstance(value, Tensor))
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return _compiling_for_meta or not tensor.is_meta


def unsupported(op: str, reason: str) -> UnsupportedError:
    """The error of a launcher that meets a problem its kernels do not take."""
    return UnsupportedError(f"{op}: backend 'triton' cannot serve this call\n  triton: {reason}")
