"""Builds the native part. Metadata is in pyproject.toml, the compiling in build_support/native.py.

Environment:
    FMKERNELS_BUILD=auto|0|1  0: a pure-Python package. 1: any problem is an error. auto (default):
        without a C++ compiler a loud warning and a pure-Python package; with a compiler that
        fails, the install fails.
    FMKERNELS_CUDA=auto|0|1  the same for the CUDA kernels; build_support/cuda.py says what auto
        asks for.
    FMKERNELS_BUILD_ISAS=avx512,avx2  only these instruction sets and scalar, to build faster while
        developing; all by default.
    CXX, CXXFLAGS, MAX_JOBS  the compiler, flags to add, and how many sources to compile at once.
"""

import os
import sys
from pathlib import Path

import setuptools

MINIMUM_SETUPTOOLS = (77, 0, 3)
if tuple(int(part) for part in setuptools.__version__.split(".")[:3]) < MINIMUM_SETUPTOOLS:
    sys.exit(
        "fmkernels needs setuptools 77.0.3 or newer to build, and this environment has "
        f"{setuptools.__version__}. Run: pip install --upgrade setuptools"
    )

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a PEP 517 build does not put this folder on the path

OPS, LAB = "fmkernels._ops", "fmkernels._lab"


def build_mode() -> str:
    mode = os.environ.get("FMKERNELS_BUILD", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"FMKERNELS_BUILD must be 'auto', '0' or '1', not {mode!r}")
    return mode


def choose_compiler(mode: str) -> list[str] | None:
    """The compiler's command, or None for a pure-Python package."""
    if mode == "0":
        return None
    if not sys.platform.startswith("linux"):
        problem = f"native kernels are not supported on {sys.platform} yet, only on Linux"
    else:
        from build_support.native import BuildError, find_compiler

        try:
            compiler = find_compiler(os.environ)
        except BuildError as error:
            sys.exit(f"fmkernels: {error}")
        if compiler is not None:
            return compiler
        problem = "no C++ compiler was found (looked for $CXX, c++, g++, clang++)"
    if mode == "1":
        sys.exit(f"FMKERNELS_BUILD=1, but {problem}")
    line = "*" * 80
    print(
        f"{line}\nfmkernels: {problem}.\n"
        f"Installing WITHOUT native kernels: everything works, slowly.\n{line}",
        file=sys.stderr,
    )
    return None


class BuildNative(build_ext):
    """Hands both libraries to build_support.native; setuptools only learns where they go."""

    def get_ext_filename(self, fullname: str) -> str:
        # torch.ops.load_library takes the ops library, not Python's import: no interpreter tag in
        # its name.
        if fullname.split(".")[-1] == OPS.split(".")[-1]:
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        from build_support.cuda import CudaBuildError
        from build_support.native import BuildError, job_count, make_builder

        ops, lab = (Path(self.get_ext_fullpath(name)).absolute() for name in (OPS, LAB))
        try:
            builder = make_builder(ROOT, COMPILER, os.environ)
            builder.build(ops, lab, job_count(os.environ))
        except (BuildError, CudaBuildError, ValueError) as error:
            sys.exit(f"fmkernels: the native build failed.\n{error}")


COMPILER = choose_compiler(build_mode())
setup(
    ext_modules=[Extension(OPS, sources=[]), Extension(LAB, sources=[])] if COMPILER else [],
    cmdclass={"build_ext": BuildNative},
)
