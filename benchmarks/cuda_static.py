"""Compiles the CUDA C++ kernels for each chip and reads what nvcc made of them, without a GPU.

``gpu_static.py`` prints the rows; ``tests/test_cuda_build.py`` fails on what :func:`problems`
says.
Registers and spills come from ptxas, instructions from the disassembled code.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # last: the installed fmkernels comes before the checkout's sources
from build_support import cuda, native  # noqa: E402

ARCHS = ("sm_80", "sm_90", "sm_100")
MAJOR = 13  # of the toolkit: other compilers need other registers
# Kernels whose half-precision instances multiply matrices; the other kernels are bandwidth-bound.
MATRIX = ("rnn_forward_kernel", "rnn_backward_kernel", "decode_kernel")
# Kernels that have too little to read for vectors.
WITHOUT_VECTORS = ("merge_kernel", "depthwise_sum_kernel", "probe_kernel")


@dataclass(frozen=True)
class Row:
    """One kernel on one chip.

    Attributes:
        kernel: its name with template arguments, e.g. ``"rnn_forward_kernel<bf16, 8>"``.
        arch: ``"sm_90"``.
        registers: per thread.
        spills: bytes stored and loaded because registers ran out.
        shared: static shared memory in bytes; the launchers check the dynamic one.
        matrix: matrix instructions (HMMA).
        vector_loads: 16-byte loads from global memory, asynchronous copies included.
    """

    kernel: str
    arch: str
    registers: int
    spills: int
    shared: int
    matrix: int
    vector_loads: int

    def __str__(self) -> str:
        return (
            f"{self.kernel:<50} {self.arch:<7} reg {self.registers:>3} spill {self.spills:>3} "
            f"smem {self.shared:>5} HMMA {self.matrix:>4} loads 128b:{self.vector_loads}"
        )


@dataclass(frozen=True)
class Tools:
    nvcc: Path
    nvdisasm: str


def find_tools() -> Tools | str:
    """nvcc with a complete toolkit, and a disassembler; or what is missing."""
    toolkit = cuda.find_toolkit(cuda.toolkit_candidates(os.environ), MAJOR)
    if isinstance(toolkit, str):
        return toolkit
    nvdisasm = shutil.which("nvdisasm") or _triton_nvdisasm()
    if nvdisasm is None:
        return "no nvdisasm was found, neither on the PATH nor with triton"
    return Tools(toolkit.nvcc, nvdisasm)


def _triton_nvdisasm() -> str | None:
    try:
        from triton import knobs
    except ImportError:
        return None
    return knobs.nvidia.nvdisasm.path


def rows(tools: Tools, archs: Iterable[str] = ARCHS, workers: int | None = None) -> Iterator[Row]:
    """Compiles every csrc/cuda/*.cu for every chip."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with concurrent.futures.ThreadPoolExecutor(workers or native.job_count(os.environ)) as pool:
        jobs = [pool.submit(_compile, tools, s, arch) for s in sources for arch in archs]
        for job in jobs:
            yield from job.result()


def problems(row: Row) -> list[str]:
    """What no kernel may have, or lack."""
    name = row.kernel.split("<")[0]
    wrong = []
    if row.spills:
        wrong.append(f"{row.spills} bytes spilled")
    if name in MATRIX and "float" not in row.kernel and row.matrix == 0:
        wrong.append("no matrix instruction")
    if name not in WITHOUT_VECTORS and row.vector_loads == 0:
        wrong.append("no 16-byte load")
    return wrong


def _compile(tools: Tools, source: Path, arch: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        command = [str(tools.nvcc), *native.NVCC_FLAGS, f"-arch={arch}", "-cubin", "-Xptxas=-v"]
        report = _run([*command, str(source), "-o", cubin])
        listing = _run([tools.nvdisasm, "-c", cubin])
    code = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)[1:]:
        code[re.match(r"[\w$]+", section)[0]] = section
    found = []
    for entry in re.split(r"Compiling entry function '", report)[1:]:
        symbol = entry.split("'")[0]
        used = re.search(r"Used (\d+) registers", entry)
        assert used is not None, f"no register count in ptxas's report on {symbol}"
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", entry)]
        shared = re.search(r"(\d+) bytes smem", entry)
        instructions = code[symbol]
        found.append(
            Row(
                kernel=kernel_name(symbol),
                arch=arch,
                registers=int(used[1]),
                spills=sum(spills),
                shared=int(shared[1]) if shared else 0,
                matrix=len(re.findall(r"\bHMMA\b", instructions)),
                vector_loads=len(
                    re.findall(r"\b(?:LDG|LDGSTS)\.E(?:\.\w+)*\.128\b", instructions)
                ),
            )
        )
    return found


def kernel_name(symbol: str) -> str:
    """``"kernel<bf16, 8>"`` for the mangled name of an instance in an anonymous namespace."""
    match = re.search(r"\d([a-z_]+_kernel)(?:I(.*?)E+v)?", symbol)
    assert match is not None, symbol
    arguments = re.findall(r"\d(bf16|f16)|Li(\d+)|^(f)", match[2] or "")
    names = [half or number or "float" for half, number, _ in arguments]
    return match[1] + (f"<{', '.join(names)}>" if names else "")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def main(match: str = "") -> int:
    """Prints a row per kernel and chip; returns 1 if one has a problem, or nvcc is missing."""
    tools = find_tools()
    if isinstance(tools, str):
        print(f"the CUDA kernels cannot be compiled here: {tools}")
        return 1
    failed = {}
    for row in rows(tools):
        if match not in row.kernel:
            continue
        print(row, flush=True)
        if wrong := problems(row):
            failed[f"{row.kernel} {row.arch}"] = wrong
    for key, reasons in failed.items():
        print(f"FAIL {key}: {'; '.join(reasons)}")
    return 1 if failed else 0


def check_tools() -> int:
    """Prints where nvcc is; or returns 1 and says what is missing."""
    tools = find_tools()
    print(tools if isinstance(tools, str) else tools.nvcc)
    return int(isinstance(tools, str))


if __name__ == "__main__":
    sys.exit(check_tools() if sys.argv[1:] == ["--tools"] else main())
