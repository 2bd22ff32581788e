"""Compiles and links the two native libraries from csrc/.

    _ops.so    csrc/torch   the operators, on torch's stable ABI; serves every torch >= 2.11
    _lab.*.so  csrc/lab     a pybind11 module without torch, for facts and tests

Both contain the same kernels: each csrc/cpu/*.cpp except isa.cpp is compiled once per instruction
set and its objects are linked into both. New source files are found by pattern, so a new kernel
needs no edit here.

An object is compiled again when its source, a header it includes, or its command changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from build_support.cuda import CudaDecision

# The oldest torch whose stable ABI the ops library asks for: 2.11, in the encoding of torch's
# headers.
TORCH_TARGET_VERSION = "0x020b000000000000"
MINIMUM_TORCH = (2, 11)


class BuildError(RuntimeError):
    """The native libraries cannot be built; the text says why, compiler output included."""


@dataclass(frozen=True)
class Isa:
    """One instruction set: `name` is the C++ namespace and the value of FMKERNELS_ISA."""

    name: str
    flags: tuple[str, ...]
    probe: str  # a statement that only compiles where the compiler knows the instructions

    @property
    def macro(self) -> str:
        return f"FMK_HAVE_{self.name.upper()}"


_AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
_WIDE = ("-mtune=znver3", "-mprefer-vector-width=512")
# gcc's own AVX-512 headers start from "undefined" vectors and warn about themselves; clang does
# not know all of these options.
_QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option")
ISAS = (
    Isa("scalar", (), "int zero = 0"),
    Isa("avx2", ("-mavx2", "-mfma", "-mf16c"), "__m256 zero = _mm256_setzero_ps()"),
    Isa("avx512", (*_AVX512_FLAGS, *_WIDE, *_QUIET), "__m512 zero = _mm512_setzero_ps()"),
    Isa(
        "avx512_bf16",
        (*_AVX512_FLAGS, "-mavx512bf16", *_WIDE, *_QUIET),
        "__m512 zero = _mm512_dpbf16_ps(__m512(), __m512bh(), __m512bh())",
    ),
)

# No -ffast-math: kernels keep NaN and infinity. Contraction is off so that a result does not
# depend on which compiler saw a chance for an fma; kernels ask for one by name.
COMMON_FLAGS = (
    "-std=c++20",
    "-O3",
    "-g0",
    "-DNDEBUG",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
)

NVCC_FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-Icsrc", "--expt-relaxed-constexpr")


def find_compiler(environ: Mapping[str, str]) -> list[str] | None:
    """The C++ compiler's command: $CXX, else the first of c++, g++, clang++ on the PATH, else
    None.

    Raises BuildError when $CXX is set and is not there: that was asked for and must not be
    ignored.
    """
    path = environ.get("PATH")
    requested = shlex.split(environ.get("CXX", ""))
    if requested:
        if shutil.which(requested[0], path=path) is None:
            raise BuildError(f"CXX={environ['CXX']!r}: no such compiler")
        return requested
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name, path=path) is not None:
            return [name]
    return None


def requested_isas(environ: Mapping[str, str]) -> list[Isa]:
    """The instruction sets named in $FMKERNELS_BUILD_ISAS, comma-separated; all when it is unset.
    scalar always, because it is what every machine can fall back to. Raises BuildError for an
    unknown name."""
    names = [n.strip() for n in environ.get("FMKERNELS_BUILD_ISAS", "").split(",") if n.strip()]
    if unknown := set(names) - {isa.name for isa in ISAS}:
        raise BuildError(
            f"FMKERNELS_BUILD_ISAS: unknown {', '.join(sorted(unknown))}; "
            f"there are {', '.join(isa.name for isa in ISAS)}"
        )
    return [isa for isa in ISAS if not names or isa.name in names or isa is ISAS[0]]


def usable_isas(
    compiler: Sequence[str], machine: str, requested: Sequence[Isa] = ISAS
) -> list[Isa]:
    """Of the `requested` instruction sets those that this compiler can build for `machine`
    (platform.machine()), scalar always."""
    usable = [ISAS[0]]
    for isa in requested[1:] if machine in ("x86_64", "AMD64") else ():
        program = f"#include <immintrin.h>\nvoid probe() {{ {isa.probe}; (void)zero; }}\n"
        command = [*compiler, "-std=c++20", *isa.flags, "-x", "c++", "-fsyntax-only", "-"]
        result = subprocess.run(command, input=program, capture_output=True, text=True)
        if result.returncode == 0:
            usable.append(isa)
        else:
            print(f"fmkernels: {compiler[0]} cannot compile for {isa.name}; that path is left out")
    return usable


@dataclass(frozen=True)
class Unit:
    """One object file: what to run to make it, and what that depends on."""

    source: Path
    object: Path
    command: tuple[str, ...]
    stamp: str  # what else makes an old object useless, such as another version of torch's headers

    def up_to_date(self) -> bool:
        stamp_file = self.object.with_suffix(".stamp")
        if not self.object.is_file() or not stamp_file.is_file():
            return False
        if stamp_file.read_text() != self._stamp_text():
            return False
        built = self.object.stat().st_mtime_ns
        try:
            return all(Path(name).stat().st_mtime_ns < built for name in self._dependencies())
        except FileNotFoundError:  # a header was renamed or removed
            return False

    def compile(self) -> None:
        """Raises BuildError with the compiler's output. Warnings are printed."""
        self.object.parent.mkdir(parents=True, exist_ok=True)
        stamp_file = self.object.with_suffix(".stamp")
        stamp_file.unlink(missing_ok=True)
        started = time.time_ns()
        result = subprocess.run(self.command, capture_output=True, text=True)
        if result.returncode != 0:
            raise BuildError(f"{shlex.join(self.command)}\n{result.stdout}{result.stderr}")
        if result.stderr.strip():
            print(result.stderr, end="", flush=True)
        os.utime(
            self.object, ns=(started, started)
        )  # an edit made meanwhile is newer than the object
        stamp_file.write_text(self._stamp_text())

    def _stamp_text(self) -> str:
        return f"{shlex.join(self.command)}\n{self.stamp}\n"

    def _dependencies(self) -> list[str]:
        dependency_file = self.object.with_suffix(".d")
        if not dependency_file.is_file():
            return [str(self.source), str(dependency_file)]
        _, _, names = dependency_file.read_text().partition(":")
        return names.replace("\\\n", " ").split()


@dataclass(frozen=True)
class Builder:
    """Everything a build needs to know. Paths in commands are relative to `root`, the folder that
    holds csrc/ and the working directory of the build, so that no path of this machine ends up in
    the libraries."""

    root: Path
    compiler: Sequence[str]
    isas: Sequence[Isa]
    torch_dir: Path
    torch_version: str
    pybind_include: str
    cuda: CudaDecision
    extra_flags: tuple[str, ...] = ()  # $CXXFLAGS

    @property
    def object_dir(self) -> Path:
        # Relative to root; per Python, because _lab is.
        return Path("build") / f"native-{sysconfig.get_config_var('SOABI')}"

    def common_units(self) -> list[Unit]:
        """What both libraries contain: shared code once, kernels once per ISA."""
        units = [self._unit(path) for path in self._sources("core")]
        units.append(self._unit(Path("csrc/cpu/isa.cpp")))
        return units + self._isa_units(p for p in self._sources("cpu") if p.name != "isa.cpp")

    def ops_units(self) -> list[Unit]:
        """What only _ops.so contains."""
        flags = torch_flags(self.torch_dir)
        cuda_files = set(self._sources("torch", "*_cuda.cpp"))
        units = [
            self._unit(path, flags) for path in self._sources("torch") if path not in cuda_files
        ]
        if self.cuda.toolkit is not None:
            # USE_CUDA: torch's headers then declare how to get at the current stream.
            flags += ["-DUSE_CUDA", f"-isystem{self.cuda.toolkit.root / 'include'}"]
            units += [self._unit(path, flags) for path in sorted(cuda_files)]
            units += [self._cuda_unit(path) for path in self._sources("cuda", "*.cu")]
        return units

    def lab_units(self) -> list[Unit]:
        """What only _lab contains."""
        version = _output([*self.compiler, "--version"]).splitlines()[0]
        flags = [
            f"-isystem{self.pybind_include}",
            f"-isystem{sysconfig.get_path('include')}",
            f'-DFMK_BUILD_COMPILER="{version}"',
            f'-DFMK_BUILD_TORCH="{self.torch_version}"',
        ]
        units = [self._unit(path, flags) for path in self._sources("lab")]
        return units + self._isa_units(self._sources("lab/isa"))

    def _sources(self, folder: str, pattern: str = "*.cpp") -> list[Path]:
        return sorted(
            p.relative_to(self.root) for p in (self.root / "csrc" / folder).glob(pattern)
        )

    def _isa_units(self, sources: Iterable[Path]) -> list[Unit]:
        return [
            self._unit(source, [*isa.flags, f"-DFMK_ISA={isa.name}"], suffix=f".{isa.name}")
            for source in sources
            for isa in reversed(self.isas)  # the widest first: they take longest to compile
        ]

    def _unit(self, source: Path, flags: Sequence[str] = (), suffix: str = "") -> Unit:
        target = self._object(source, suffix)
        have = [f"-D{isa.macro}={int(isa in self.isas)}" for isa in ISAS[1:]]
        command = (*self.compiler, *COMMON_FLAGS, "-Icsrc", *have, *flags, *self.extra_flags)
        outputs = (
            "-MMD",
            "-MF",
            str(target.with_suffix(".d")),
            "-c",
            str(source),
            "-o",
            str(target),
        )
        return Unit(source, target, command + outputs, f"torch {self.torch_version}")

    def _cuda_unit(self, source: Path) -> Unit:
        toolkit = self.cuda.toolkit
        assert toolkit is not None, "CUDA units are planned only after decide() found a toolkit"
        target = self._object(source)
        host = ("-Xcompiler", "-fPIC,-fvisibility=hidden", "-ccbin", self.compiler[-1])
        command = (
            str(toolkit.nvcc),
            *NVCC_FLAGS,
            *self.cuda.gencode,
            *host,
        )
        outputs = (
            "-MD",
            "-MF",
            str(target.with_suffix(".d")),
            "-c",
            str(source),
            "-o",
            str(target),
        )
        return Unit(source, target, command + outputs, f"CUDA {toolkit.major}")

    def _object(self, source: Path, suffix: str = "") -> Path:
        return self.object_dir / source.relative_to("csrc").with_suffix(f"{suffix}.o")

    def build(self, ops_library: Path, lab_library: Path, jobs: int) -> None:
        """Bring both libraries up to date. Raises BuildError."""
        common, ops, lab = self.common_units(), self.ops_units(), self.lab_units()
        with working_directory(self.root), exclusive(self.object_dir):
            compile_all([*common, *ops, *lab], jobs)
            torch_lib = self.torch_dir / "lib"
            libraries = [f"-L{torch_lib}", "-ltorch", "-ltorch_cpu"]
            if self.cuda.toolkit is not None:
                libraries += [
                    f"-L{self.cuda.toolkit.library_dir}",
                    "-lcudart_static",
                    "-ldl",
                    "-lrt",
                ]
            # Every symbol must be found now rather than at a user's import. _lab cannot promise
            # that: the Python interpreter that loads it brings Python's.
            self._link(ops_library, [*common, *ops], ["-Wl,--no-undefined", *libraries])
            self._link(lab_library, [*common, *lab], [])

    def _link(self, library: Path, units: Sequence[Unit], libraries: Sequence[str]) -> None:
        library.parent.mkdir(parents=True, exist_ok=True)
        # A running process may have the old file mapped: replace it, never write into it.
        temporary = library.with_name(f"{library.name}.{os.getpid()}.tmp")
        objects = [str(unit.object) for unit in units]
        command = [
            *self.compiler,
            "-shared",
            "-pthread",
            *objects,
            *libraries,
            "-o",
            str(temporary),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            temporary.unlink(missing_ok=True)
            raise BuildError(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")
        temporary.replace(library)


def job_count(environ: Mapping[str, str]) -> int:
    """$MAX_JOBS if set, never more than the processors this process may use."""
    processors = len(os.sched_getaffinity(0))
    return max(1, min(processors, int(environ.get("MAX_JOBS", processors))))


def make_builder(root: Path, compiler: Sequence[str], environ: Mapping[str, str]) -> Builder:
    """A builder for this interpreter and the torch installed in it. Raises BuildError,
    CudaBuildError, ValueError."""
    from build_support import cuda

    try:
        import pybind11
        import torch
    except ImportError as error:
        raise BuildError(
            f"the native kernels need {error.name} to build. With --no-build-isolation install "
            "torch and pybind11 first; FMKERNELS_BUILD=0 installs without native kernels"
        ) from error
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise BuildError(f"torch {torch.__version__} is too old; 2.11 or newer is needed")
    decision = cuda.decide(
        environ.get("FMKERNELS_CUDA", "auto"),
        torch_cuda=torch.version.cuda,
        sources=sorted((root / "csrc" / "cuda").glob("*.cu")),
        candidates=cuda.toolkit_candidates(environ),
        has_gpu=cuda.gpu_present(),
        environ=environ,
    )
    print(f"fmkernels: CUDA kernels: {'yes' if decision.toolkit else 'no'}, {decision.reason}")
    isas = usable_isas(compiler, platform.machine(), requested_isas(environ))
    print(
        f"fmkernels: {shlex.join(compiler)}, ISAs: {', '.join(isa.name for isa in isas)}",
        flush=True,
    )
    return Builder(
        root=root,
        compiler=compiler,
        isas=isas,
        torch_dir=Path(torch.__file__).parent,
        torch_version=torch.__version__,
        pybind_include=pybind11.get_include(),
        cuda=decision,
        extra_flags=tuple(shlex.split(environ.get("CXXFLAGS", ""))),
    )


def torch_flags(torch_dir: Path) -> list[str]:
    """For compiling against the stable ABI of the torch installed at `torch_dir`."""
    include = torch_dir / "include"
    return [
        f"-isystem{include}",
        # torch's headers put __FILE__ into error messages
        f"-ffile-prefix-map={include}{os.sep}=",
        "-DTORCH_STABLE_ONLY",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    ]


def compile_all(units: Sequence[Unit], jobs: int) -> int:
    """Compile what is out of date; returns how many that were. Raises BuildError."""
    stale = [unit for unit in units if not unit.up_to_date()]
    print(
        f"fmkernels: {len(stale)} of {len(units)} objects to compile, {jobs} at a time", flush=True
    )

    def timed_compile(unit: Unit) -> float:
        start = time.monotonic()
        unit.compile()
        return time.monotonic() - start

    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(timed_compile, unit): unit for unit in stale}
        for done, future in enumerate(as_completed(running), start=1):
            try:
                seconds = future.result()
            except BuildError:
                pool.shutdown(cancel_futures=True)
                raise
            print(
                f"[{done}/{len(stale)}] {running[future].object.name} {seconds:.1f} s", flush=True
            )
    return len(stale)


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def working_directory(path: Path) -> Iterator[None]:
    previous = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(previous)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One build at a time in `folder`; a second one waits and then finds the objects made."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
