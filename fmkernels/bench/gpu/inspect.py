"""Reads a compiled kernel: registers, spills, memory, instructions, occupancy.

NVIDIA: ``cuobjdump`` and ``nvdisasm``, which come with triton. AMD: the assembly and its metadata.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from triton import knobs


# Per multiprocessor or compute unit. The shared memory a block may have is `shared`; `reserved`
# bytes of it go to the system for each block.
@dataclass(frozen=True)
class Chip:
    """Limits of one chip, of a block unless said otherwise; ``*_total`` per multiprocessor."""

    shared: int
    shared_total: int
    reserved: int
    warps_total: int
    blocks_total: int


CHIPS = {
    "sm_80": Chip(166912, 167936, 1024, 64, 32),
    "sm_90": Chip(232448, 233472, 1024, 64, 32),
    "sm_100": Chip(232448, 233472, 1024, 64, 32),
    "gfx942": Chip(65536, 65536, 0, 32, 16),
}
TENSOR_MEMORY_COLUMNS = 512

_MATRIX = {"HMMA": r"\b[HDQI]MMA\b", "HGMMA": r"\b[HQI]GMMA\b", "UTCMMA": r"\bUTC\w*MMA\b"}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of a multiprocessor.

    Attributes:
        registers: per thread (AMD: vector registers, accumulators included).
        spills: instructions that spill or refill a register through memory.
        stack: bytes of stack (AMD: scratch) per thread.
        shared: bytes of shared memory per block.
        tensor_memory: columns of tensor memory per block (sm_100).
        matrix: matrix instructions found, name -> count.
        occupancy: share of the resident warps that registers and memory allow.
        blocks: resident blocks per multiprocessor.
        load_bits: widths of the loads from global memory, bits -> count.
        loop_load_bits: of those inside loops.
        offsets32: address computations in Triton's IR whose offset is a 32-bit tensor.
        traps: whether the compiler gave up and emitted a trap.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    tensor_memory: int
    matrix: dict[str, int]
    occupancy: float
    blocks: int
    load_bits: dict[int, int]
    loop_load_bits: dict[int, int]
    offsets32: int
    traps: bool


def inspect(compiled: Any, arch: str) -> Resources:
    """Read a kernel compiled for ``arch``."""
    return _inspect_amd(compiled, arch) if arch == "gfx942" else _inspect_nvidia(compiled, arch)


def binary(compiled: Any) -> tuple[bytes, str]:
    """The code object and the ending of its file."""
    for ending in ("cubin", "hsaco"):
        if ending in compiled.asm:
            return compiled.asm[ending], ending
    raise ValueError(f"no code object among {list(compiled.asm)}")


def _inspect_nvidia(compiled: Any, arch: str) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _tool(knobs.nvidia.nvdisasm.path, "-c", file.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    shared = compiled.metadata.shared
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
    warps = compiled.metadata.num_warps
    chip = CHIPS[arch]
    # Registers are handed out to warps in multiples of 256, to quarters of a multiprocessor.
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        65536 // 4 // per_warp * 4 // warps,
        chip.shared_total // (shared + chip.reserved),
        chip.warps_total // warps,
        chip.blocks_total,
        TENSOR_MEMORY_COLUMNS // tensor_memory if tensor_memory else chip.blocks_total,
    )
    return Resources(
        registers=registers,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=shared,
        tensor_memory=tensor_memory,
        matrix=_counts(_MATRIX, code),
        occupancy=blocks * warps / chip.warps_total,
        blocks=blocks,
        load_bits=_nvidia_loads(code),
        loop_load_bits=_nvidia_loads(_loops(code)),
        offsets32=_offsets32(compiled),
        traps=bool(re.search(r"^\s*trap;", compiled.asm["ptx"], re.MULTILINE)),
    )


def _inspect_amd(compiled: Any, arch: str) -> Resources:
    text = compiled.asm["amdgcn"]
    registers = _amd_field(text, "vgpr_count")
    shared = compiled.metadata.shared
    warps = compiled.metadata.num_warps
    chip = CHIPS[arch]
    # Each of the four SIMDs has 512 registers per lane, handed out in eights, and holds 8 waves.
    per_simd = min(8, 512 // max(8, -(-registers // 8) * 8))
    blocks = min(per_simd * 4 // warps, chip.shared_total // max(shared, 1), chip.blocks_total)
    return Resources(
        registers=registers,
        spills=len(re.findall(r"^\s+scratch_(?:store|load)", text, re.MULTILINE)),
        stack=_amd_field(text, "private_segment_fixed_size"),
        shared=shared,
        tensor_memory=0,
        matrix=_counts({"MFMA": r"\bv_mfma_"}, text),
        occupancy=blocks * warps / chip.warps_total,
        blocks=blocks,
        load_bits=_amd_loads(text),
        loop_load_bits=_amd_loads(_loops(text)),
        offsets32=_offsets32(compiled),
        traps="s_trap" in text,
    )


def _tool(path: str, *arguments: str) -> str:
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _counts(patterns: dict[str, str], text: str) -> dict[str, int]:
    counts = {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}
    return {name: count for name, count in counts.items() if count}


def _loops(code: str) -> str:
    """The lines between a label and a jump back to it."""
    lines = code.splitlines()
    labels: dict[str, int] = {}
    inside: set[int] = set()
    for number, line in enumerate(lines):
        label = re.match(r"(\.L\w+):", line)
        if label:
            labels[label[1]] = number
        jump = re.search(r"\b(?:BRA|s_c?branch)\w*\b[^;]*?(\.L\w+)", line)
        if jump and jump[1] in labels:
            inside.update(range(labels[jump[1]], number))
    return "\n".join(lines[number] for number in sorted(inside))


def _nvidia_loads(code: str) -> dict[int, int]:
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.E(?:\.\w+)*", code)
    return _widths(_nvidia_load_bits(load) for load in loads)


def _amd_loads(code: str) -> dict[int, int]:
    loads = re.findall(r"\b(?:global|buffer)_load_(\w+)", code)
    return _widths(_amd_load_bits(load) for load in loads)


def _widths(bits: Any) -> dict[int, int]:
    counts: dict[int, int] = {}
    for width in bits:
        counts[width] = counts.get(width, 0) + 1
    return dict(sorted(counts.items()))


def _nvidia_load_bits(load: str) -> int:
    for part in load.split("."):
        if part in ("64", "128", "256"):
            return int(part)
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:])
    return 32


def _amd_load_bits(load: str) -> int:
    multiple = re.search(r"x([234])$", load)
    if multiple:
        return 32 * int(multiple[1])
    if "byte" in load:
        return 8
    return 16 if "short" in load else 32


def _amd_field(text: str, name: str) -> int:
    found = re.search(rf"^\s*\.{name}:\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


def _offsets32(compiled: Any) -> int:
    """Pointer arithmetic on tensors with 32-bit offsets, in the IR before any lowering."""
    return len(re.findall(r"tt\.addptr .*, tensor<[^>]*xi32>", compiled.asm["ttir"]))
