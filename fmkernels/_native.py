"""Loads the compiled ops library once and says what happened.

Two files may lie beside this one. `_ops.so` holds the operators on torch's stable ABI; loading it
adds implementations to `torch.ops.fmkernels`. `_lab.*.so` is a pybind11 module without torch in
it: facts about the build and the processor, and the kernels one by one for tests. A pure-Python
install has neither, and every layer then runs on the reference backend: right, and slow.

Environment:
    FMKERNELS_REQUIRE_NATIVE=1  importing the package fails when the ops library is missing (for
        CI, where a silent fallback would test the wrong thing).
    FMKERNELS_ISA=avx512_bf16|avx512|avx2|scalar  forces a kernel path; read once, at the first
        kernel. A name that is unknown, or that this processor cannot run, raises RuntimeError
        there and from `isa()`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_PACKAGE_DIR = Path(__file__).resolve().parent


def load_ops(package_dir: Path) -> str | None:
    """Load `_ops*.so` from `package_dir` into torch. Returns None, or why that did not work."""
    libraries = sorted(package_dir.glob("_ops*.so"))
    if not libraries:
        if not sys.platform.startswith("linux"):
            return f"native kernels are built on Linux only; this is {sys.platform}"
        return "the package was installed without native kernels (no _ops.so beside it)"
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        return f"{libraries[0].name} does not load into torch {torch.__version__}: {error}"
    return None


NATIVE_ERROR: str | None = load_ops(_PACKAGE_DIR)
HAS_NATIVE: bool = NATIVE_ERROR is None

if not HAS_NATIVE:
    if os.environ.get("FMKERNELS_REQUIRE_NATIVE") == "1":
        raise ImportError(f"FMKERNELS_REQUIRE_NATIVE=1, but {NATIVE_ERROR}")
    if sys.platform.startswith("linux"):
        warnings.warn(
            f"fmkernels runs WITHOUT its native kernels, slowly: {NATIVE_ERROR}. "
            "Reinstall with a C++ compiler and FMKERNELS_BUILD=1 to see what is wrong.",
            RuntimeWarning,
            stacklevel=2,
        )


def lab() -> ModuleType | None:
    """The pybind11 module `fmkernels._lab`, or None where it was not built.

    A module that is there and does not import is a broken install: its ImportError is not hidden.
    """
    if importlib.util.find_spec("fmkernels._lab") is None:
        return None
    return importlib.import_module("fmkernels._lab")


def isa() -> str | None:
    """Name of the instruction set whose kernels run: "avx512_bf16", "avx512", "avx2" or "scalar".

    None without native kernels. Raises RuntimeError when FMKERNELS_ISA asks for a path that does
    not exist.
    """
    module = lab() if HAS_NATIVE else None
    return None if module is None else module.active_isa()


def build_info() -> dict[str, Any]:
    """Facts about the compiled part: "native" and "error" always; where it is loaded also
    "library" (its path), "compiler", "torch" (the version it was compiled against),
    "isas" and "isas_supported" (those that this processor can run)."""
    info: dict[str, Any] = {"native": HAS_NATIVE, "error": NATIVE_ERROR}
    module = lab()
    if HAS_NATIVE and module is not None:
        info["library"] = str(sorted(_PACKAGE_DIR.glob("_ops*.so"))[0])
        info.update(module.build_info())
    return info
