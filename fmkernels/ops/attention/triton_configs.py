"""Launch configurations of the attention kernels, per chip and case.

A case is the operands' width in bits and the padded head width, ``"16-128"``. Every entry
compiles without a spill for that chip with aligned strides, fits its shared and tensor memory, and
uses its matrix unit; ``python benchmarks/gpu_static.py`` prints the evidence. They were chosen
from compiled code (registers, occupancy), not from timings: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping

from fmkernels.ops._triton.launch import Config, Table, config

_WIDTHS = (64, 128, 256, 512)


def _rows(
    bits: int, *tiles: tuple[int, int, int, int], waves_per_eu: int = 0
) -> dict[str, Config]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) of each head width."""
    return {
        f"{bits}-{width}": config(warps, stages, waves_per_eu, BLOCK_M=m, BLOCK_N=n)
        for width, (m, n, warps, stages) in zip(_WIDTHS, tiles, strict=True)
    }


def _interpreted(m: int, n: int) -> dict[str, Config]:
    return {
        case: config(4, 1, BLOCK_M=m, BLOCK_N=n)
        for bits in (16, 32)
        for case in (f"{bits}-{width}" for width in _WIDTHS)
    }


FORWARD: Table = {
    "sm_80": _rows(16, (128, 64, 4, 2), (128, 64, 8, 3), (64, 64, 8, 2), (16, 32, 4, 1))
    | _rows(32, (64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1), (16, 16, 4, 1)),
    "sm_90": _rows(16, (128, 64, 4, 2), (128, 128, 8, 2), (128, 64, 8, 2), (16, 32, 4, 1))
    | _rows(32, (64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1), (16, 16, 4, 1)),
    "sm_100": _rows(16, (128, 64, 4, 2), (128, 128, 8, 2), (128, 32, 8, 2), (16, 32, 4, 1))
    | _rows(32, (64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1), (16, 16, 4, 1)),
    "gfx942": _rows(16, (128, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 1), (16, 16, 4, 1))
    | _rows(32, (64, 32, 4, 1), (64, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1)),
    "interpret": _interpreted(64, 64),
}

KEYS_VALUES: Table = {
    "sm_80": _rows(16, (64, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (16, 16, 4, 1))
    | _rows(32, (32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    "sm_90": _rows(16, (64, 128, 8, 2), (32, 128, 8, 2), (16, 64, 8, 2), (16, 16, 4, 1))
    | _rows(32, (32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    "sm_100": _rows(16, (64, 128, 8, 2), (64, 128, 8, 2), (64, 64, 8, 1), (16, 16, 4, 1))
    | _rows(32, (32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    "gfx942": _rows(16, (64, 64, 4, 2), (32, 64, 4, 2), (16, 64, 8, 1), (16, 16, 4, 1))
    | _rows(32, (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    "interpret": _interpreted(64, 64),
}

QUERIES: Table = {
    "sm_80": _rows(16, (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (16, 16, 4, 1))
    | _rows(32, (32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    "sm_90": _rows(16, (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (16, 16, 4, 1))
    | _rows(32, (32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    "sm_100": _rows(16, (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 1), (16, 16, 4, 1))
    | _rows(32, (32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    "gfx942": _rows(16, (128, 64, 8, 2), (128, 32, 8, 2), (64, 16, 8, 1), (16, 16, 4, 1))
    | _rows(32, (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    "interpret": _interpreted(64, 64),
}

# The same tiles as the queries' kernel, smaller: the sum over a tile is held in registers too.
MASK: Table = {
    arch: _rows(16, (64, 64, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1))
    | _rows(32, (32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1))
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942")
} | {"interpret": _interpreted(64, 64)}

# Rows are queries times the heads of a group; 16 is the least that a matrix instruction takes.
DECODE: Table = {
    "sm_80": _rows(16, (16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 2), (16, 16, 4, 1))
    | _rows(32, (16, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 1)),
    "sm_90": _rows(16, (16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 2), (16, 16, 4, 1))
    | _rows(32, (16, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 1)),
    "sm_100": _rows(16, (16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 2), (16, 16, 4, 1))
    | _rows(32, (16, 32, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 1)),
    "gfx942": _rows(16, (16, 64, 4, 1), (16, 64, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1))
    | _rows(32, (16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    "interpret": _interpreted(16, 64),
}

# Kernels that only stream rows.
STREAM: Mapping[str, Config] = {
    arch: config(4, 1, BLOCK_M=16) for arch in ("sm_80", "sm_90", "sm_100", "gfx942")
} | {"interpret": config(4, 1, BLOCK_M=64)}

MERGE: Mapping[str, Config] = {
    arch: config(4, 1) for arch in ("sm_80", "sm_90", "sm_100", "gfx942", "interpret")
}


def case(element_size: int, width: int) -> str:
    """The key of a table's inner mapping; ``width``: the wider of the padded head widths."""
    return f"{8 * element_size}-{max(_WIDTHS[0], width)}"
