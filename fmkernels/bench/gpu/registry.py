"""The kernels of all families, and the calls that compile them at production shapes.

Each family has a module of this name beside this one with two tuples: ``KERNELS`` and ``CASES``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fmkernels.ops._triton.launch import Table

FAMILIES = ("conv", "rnn", "attention", "linear")

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,  # where torch's flags allow it
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Kernel:
    """What is declared about a kernel.

    Attributes:
        name: of the jit function.
        tables: every launch configuration; the sweep must compile each of them.
        matrix: whether it multiplies matrices, so that the chip's matrix instruction has to show.
        m_block: the block that is the products' number of rows. Under 64 rows there is no wgmma
            or tcgen05, and HMMA is expected.
    """

    name: str
    tables: Table
    matrix: bool = False
    m_block: str = "BLOCK_M"


@dataclass(frozen=True)
class Case:
    """A call of a family's launchers with meta tensors.

    Attributes:
        name: part of the file names of a dump; unique within the family.
        call: makes the tensors, of the dtype given, and calls launchers.
        dtypes: keys of :data:`DTYPES`.
        aligned: whether all strides are multiples of 16 bytes. Then nothing may spill; otherwise
            the baseline records what does.
        huge: whether offsets need 64 bits, so that no 32-bit offset may be found.
        archs: the chips it is compiled for.
    """

    name: str
    call: Callable[[torch.dtype], None]
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32", "tf32")
    aligned: bool = True
    huge: bool = False
    archs: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")


def family(name: str) -> tuple[tuple[Kernel, ...], tuple[Case, ...]]:
    """``(KERNELS, CASES)`` of a family; empty for one that has none yet."""
    try:
        module = importlib.import_module(f"fmkernels.bench.gpu.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"fmkernels.bench.gpu.{name}":
            raise
        return (), ()
    return module.KERNELS, module.CASES


def kernels() -> dict[str, Kernel]:
    """Every declared kernel by name."""
    return {kernel.name: kernel for name in FAMILIES for kernel in family(name)[0]}


def cases() -> dict[str, Case]:
    """Every case as ``<family>.<case>``."""
    return {f"{name}.{case.name}": case for name in FAMILIES for case in family(name)[1]}
