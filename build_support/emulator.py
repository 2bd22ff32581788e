"""Builds the CUDA operators for the CPU: csrc/cuda and csrc/torch/*_cuda.cpp, compiled by the C++
compiler against csrc/lab/emu.

The library registers the operators for CPU tensors when torch loads it. Tests build it when they
need it; it is no part of the package.

    python -m build_support.emulator [plain | address | thread]    builds and prints the path
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from build_support.native import (
    COMMON_FLAGS,
    BuildError,
    Unit,
    compile_all,
    exclusive,
    find_compiler,
    job_count,
    torch_flags,
    working_directory,
)

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Variant:
    """One way to run the kernels.

    Attributes:
        flags: for compiling and linking.
        scheduler: the file of csrc/lab/emu that runs the threads.
        runtime: the sanitizer's library, which a Python that loads the result has to preload.
        settings: environment variables that the sanitizer wants.
    """

    flags: tuple[str, ...]
    scheduler: str = "fibers"
    runtime: str | None = None
    settings: tuple[tuple[str, str], ...] = ()


# Line numbers and whole stacks, for the sanitizers' reports.
_REPORTS = ("-O1", "-g1", "-fno-omit-frame-pointer")
VARIANTS = {
    "plain": Variant(("-O2",)),
    "address": Variant(
        (*_REPORTS, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        runtime="libasan.so",
        # Python and torch leave memory to the end of the process.
        settings=(("ASAN_OPTIONS", "detect_leaks=0"),),
    ),
    "thread": Variant(
        (*_REPORTS, "-fsanitize=thread"),
        scheduler="threads",
        runtime="libtsan.so",
        # A process that has reported a race ends with this status.
        settings=(("TSAN_OPTIONS", "exitcode=66"),),
    ),
}


def build(variant: str, root: Path = ROOT) -> Path:
    """Bring the library of one variant up to date and return its path.

    Args:
        variant: a key of VARIANTS.
        root: the folder that holds csrc/ and gets build/; tests pass a copy with broken kernels.

    Raises BuildError, also when there is no C++ compiler.
    """
    import torch

    chosen = VARIANTS[variant]
    compiler = find_compiler(os.environ)
    if compiler is None:
        raise BuildError("no C++ compiler was found")
    # Relative to root, so that a copy of csrc/ and build/ has only its changes to compile.
    csrc, folder = Path("csrc"), Path("build") / f"emulator-{variant}"
    library = folder / "emulated_ops.so"
    flags = [
        *compiler,
        *(flag for flag in COMMON_FLAGS if not flag.startswith(("-O", "-g"))),
        *chosen.flags,
        "-DFMK_EMULATE_CUDA",
        "-Wno-unknown-pragmas",  # unroll
        "-Icsrc",
    ]
    torch_dir = Path(torch.__file__).parent
    with working_directory(root), exclusive(folder):
        kernels = sorted((csrc / "cuda").glob("*.cu"))
        emulation = csrc / "lab" / "emu"
        kernels += [emulation / "emulator.cpp", emulation / f"{chosen.scheduler}.cpp"]
        operators = [*sorted((csrc / "torch").glob("*_cuda.cpp")), emulation / "pieces.cpp"]
        stamp = f"torch {torch.__version__}"
        units = [_unit(source, folder, flags, stamp) for source in kernels]
        flags += torch_flags(torch_dir)
        units += [_unit(source, folder, flags, stamp) for source in operators]
        stale = compile_all(units, job_count(os.environ))
        if stale or not library.is_file():
            _link(compiler, chosen, units, torch_dir, library)
    return root / library


def _unit(source: Path, folder: Path, flags: list[str], stamp: str) -> Unit:
    target = folder / f"{source.stem}.o"
    outputs = ("-MMD", "-MF", str(target.with_suffix(".d")), "-c")
    command = (*flags, *outputs, "-x", "c++", str(source), "-o", str(target))
    return Unit(source, target, command, stamp)


def environment(variant: str, library: Path) -> Mapping[str, str]:
    """What a process that runs a variant's library needs in its environment."""
    chosen = VARIANTS[variant]
    settings = {"FMK_EMULATED_OPS": str(library), **dict(chosen.settings)}
    if chosen.runtime is not None:
        compiler = find_compiler(os.environ)
        assert compiler is not None, "the library was built with one"
        # A sanitizer that starts before libstdc++ is there does not find the function that throws.
        found = [_library_path(compiler, name) for name in (chosen.runtime, "libstdc++.so")]
        settings["LD_PRELOAD"] = " ".join(found)
    return settings


def _library_path(compiler: list[str], name: str) -> str:
    query = [*compiler, f"-print-file-name={name}"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def _link(
    compiler: list[str], variant: Variant, units: list[Unit], torch_dir: Path, library: Path
) -> None:
    objects = [str(unit.object) for unit in units]
    command = [*compiler, *variant.flags, "-shared", "-pthread", *objects]
    command += [f"-L{torch_dir / 'lib'}", "-ltorch", "-ltorch_cpu", "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(result.stdout + result.stderr)


if __name__ == "__main__":
    print(build(sys.argv[1] if len(sys.argv) > 1 else "plain"))
