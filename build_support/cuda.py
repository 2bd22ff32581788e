"""Decides whether the CUDA kernels are built, and says why not.

Everything the decision rests on comes in as an argument, so that tests can describe machines that
are not here.
"""

from __future__ import annotations

import re
import shutil
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# What an explicit FMKERNELS_CUDA=1 compiles for on a machine without a GPU and without
# TORCH_CUDA_ARCH_LIST.
DEFAULT_ARCH_LIST = "8.0;9.0;10.0+PTX"


class CudaBuildError(RuntimeError):
    """FMKERNELS_CUDA=1 asked for CUDA kernels that cannot be built; the text says why."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit folder that holds everything a build needs."""

    root: Path
    library_dir: Path
    major: int

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"


@dataclass(frozen=True)
class CudaDecision:
    """`toolkit` is None when the CUDA kernels are not built. `reason` is a sentence for a person
    either way."""

    toolkit: Toolkit | None
    reason: str
    gencode: tuple[str, ...] = ()


def inspect_toolkit(root: Path) -> Toolkit | str:
    """The toolkit at `root`, or what is missing there for a build."""
    if not (root / "bin" / "nvcc").is_file():
        return "no bin/nvcc"
    if not (root / "include" / "cuda_runtime.h").is_file():
        return "no include/cuda_runtime.h"
    # What cuda_fp16.h includes comes in a package of its own where the toolkit comes as wheels.
    if not any(
        (root / "include" / folder / "nv" / "target").is_file() for folder in (".", "cccl")
    ):
        return "no include/nv/target nor include/cccl/nv/target (nvidia-cuda-cccl)"
    version_header = root / "include" / "cuda_runtime_api.h"
    text = version_header.read_text(errors="replace") if version_header.is_file() else ""
    version = re.search(r"^#define\s+CUDART_VERSION\s+(\d+)", text, re.MULTILINE)
    if version is None:
        return "no CUDART_VERSION in include/cuda_runtime_api.h"
    # As NVIDIA's installer, wheels, conda and Debian's packages have it.
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "lib/x86_64-linux-gnu"):
        library_dir = root / folder
        if (library_dir / "libcudart_static.a").is_file():
            return Toolkit(root, library_dir, int(version.group(1)) // 1000)
    return "no libcudart_static.a"


def toolkit_candidates(environ: Mapping[str, str]) -> list[Path]:
    """Folders where a toolkit may lie on this machine, most explicit first, each once."""
    found = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc is not None:
        found.append(Path(nvcc).resolve().parent.parent)
    found.append(Path("/usr/local/cuda"))
    found.extend(sorted(Path("/usr/local").glob("cuda-*"), reverse=True))
    # The toolkit as wheels: nvidia/cu13 and so on, beside torch.
    found.extend(sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu[0-9]*"), reverse=True))
    return list(dict.fromkeys(found))


def find_toolkit(candidates: Iterable[Path], major: int) -> Toolkit | str:
    """The first complete toolkit of a major version, or what the candidates lack."""
    rejected = []
    for root in candidates:
        toolkit = inspect_toolkit(root)
        if isinstance(toolkit, str):
            rejected.append(f"{root}: {toolkit}")
        elif toolkit.major != major:
            rejected.append(f"{root}: is CUDA {toolkit.major}")
        else:
            return toolkit
    looked = "; ".join(rejected) or "nothing to look at"
    return f"no complete CUDA {major} toolkit was found ({looked})"


def gpu_present() -> bool:
    """Whether the NVIDIA driver shows a device. No CUDA call: those take seconds."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def gencode_flags(arch_list: str) -> tuple[str, ...]:
    """nvcc's flags for a TORCH_CUDA_ARCH_LIST such as "8.0;9.0a 10.0+PTX".

    Raises CudaBuildError for an entry that is no compute capability.
    """
    flags = []
    for entry in re.split(r"[;\s]+", arch_list.strip("; \t")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise CudaBuildError(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is no compute capability "
                "like '8.0', '9.0a' or '10.0+PTX'"
            )
        number = match[1] + match[2] + match[3]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return tuple(flags)


def decide(
    mode: str,
    *,
    torch_cuda: str | None,
    sources: Sequence[Path],
    candidates: Iterable[Path],
    has_gpu: bool,
    environ: Mapping[str, str],
) -> CudaDecision:
    """Whether to build the CUDA kernels.

    Args:
        mode: FMKERNELS_CUDA: "0" never, "1" always, "auto" when everything needed is there.
        torch_cuda: torch.version.cuda, None for a CPU build of torch.
        sources: the .cu files to build.
        candidates: folders to look for a toolkit in; the first complete one of torch's major
            version is taken.
        has_gpu: whether this machine has a GPU.
        environ: os.environ, for TORCH_CUDA_ARCH_LIST.

    Raises:
        ValueError: for another mode.
        CudaBuildError: mode is "1" and something is missing.
    """
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"FMKERNELS_CUDA must be 'auto', '0' or '1', not {mode!r}")
    if mode == "0":
        return CudaDecision(None, "FMKERNELS_CUDA=0")

    def refuse(reason: str) -> CudaDecision:
        if mode == "1":
            raise CudaBuildError(f"FMKERNELS_CUDA=1, but {reason}")
        return CudaDecision(None, reason)

    if not sources:
        return refuse("this version has no CUDA sources (csrc/cuda/*.cu)")
    if torch_cuda is None:
        return refuse("the installed torch is a CPU build")
    arch_list = environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if mode == "auto" and not arch_list and not has_gpu:
        return refuse("there is no GPU here and TORCH_CUDA_ARCH_LIST is not set")

    toolkit = find_toolkit(candidates, int(torch_cuda.split(".")[0]))
    if isinstance(toolkit, str):
        return refuse(toolkit)
    if not arch_list and has_gpu:
        gencode: tuple[str, ...] = ("-arch=native",)
    else:
        gencode = gencode_flags(arch_list or DEFAULT_ARCH_LIST)
    return CudaDecision(toolkit, f"CUDA {toolkit.major} toolkit at {toolkit.root}", gencode)
