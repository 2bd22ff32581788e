"""Launch configurations of the recurrent kernels, per chip and case.

An entry should compile without a spill for its chip with aligned strides, fit its shared and
tensor memory, and use its matrix unit: ``python benchmarks/gpu_static.py --match rnn`` judges
that. They come from compiled code (registers, occupancy), not from timings: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton

from fmkernels.ops._triton.launch import Config, Table, config

# The padded hidden sizes of operands of 2 and of 4 bytes.
_SIZES = {2: (16, 32, 64, 128, 256), 4: (32, 64)}


def padded_size(element_size: int, features: int) -> int:
    return max(_SIZES[element_size][0], triton.next_power_of_2(features))


def sequence_case(element_size: int, size: int, layer_norm: bool = False) -> str:
    """The operands' width in bits and the padded hidden size: ``"16-64"``, ``"16-64-norm"``."""
    return f"{8 * element_size}-{size}" + ("-norm" if layer_norm else "")


def _sequence(
    two: tuple[int, ...],
    four: tuple[int, ...],
    norm_two: tuple[int, ...] = (),
    norm_four: tuple[int, ...] = (),
) -> dict[str, Config]:
    """num_warps of the sizes, as far as the weights fit, of operands of two and of four bytes;
    ``norm_*``: with layer norm."""
    return {
        sequence_case(element_size, size, is_norm): config(warps, 1, BLOCK_B=16)
        for element_size, counts, is_norm in (
            (2, two, False), (4, four, False), (2, norm_two, True), (4, norm_four, True)
        )
        for size, warps in zip(_SIZES[element_size], counts, strict=False)
    }  # fmt: skip


# The whole sequence in one launch, for the sizes listed: beyond them a multiprocessor's registers
# and shared memory do not hold the weights, and a launch per step serves.
SEQUENCE: Mapping[str, Table] = {
    "lstm": {
        "sm_80": _sequence((4, 4, 8, 8), (4, 8), (4, 4, 8, 8), (4, 16)),
        "sm_90": _sequence((4, 4, 8, 8), (4, 8), (4, 4, 4, 8), (4, 16)),
        "sm_100": _sequence((4, 4, 8, 8), (4, 8), (4, 4, 4, 8), (4, 16)),
        "gfx942": _sequence((4, 4, 4), (4,), (4, 4, 2), (4,)),
        "interpret": _sequence((4, 4, 4), (4, 4), (4, 4, 4), (4, 4)),
    },
    "gru": {
        "sm_80": _sequence((4, 4, 8, 8), (4, 8)),
        "sm_90": _sequence((4, 4, 8, 8), (4, 8)),
        "sm_100": _sequence((4, 4, 8, 8), (4, 8)),
        "gfx942": _sequence((4, 4, 4), (4,)),
        "interpret": _sequence((4, 4, 4), (4, 4)),
    },
    "rnn": {
        "sm_80": _sequence((4, 4, 8, 8, 8), (4, 8)),
        "sm_90": _sequence((4, 4, 8, 8, 8), (4, 8)),
        "sm_100": _sequence((4, 4, 8, 8, 8), (4, 8)),
        "gfx942": _sequence((4, 4, 4, 4), (4, 4)),
        "interpret": _sequence((4, 4, 4), (4, 4)),
    },
}


def step_case(batch: int, element_size: int) -> str:
    """``"few"`` sequences, up to 16, or ``"many"``; of how many bits."""
    return f"{8 * element_size}-" + ("few" if batch <= 16 else "many")


def _steps(
    few: tuple[int, ...], many: tuple[int, ...], few_32: tuple[int, ...], many_32: tuple[int, ...]
) -> dict[str, Config]:
    """(BLOCK_B, BLOCK_U, BLOCK_K, num_warps, num_stages) of each case."""
    return {
        case: config(warps, stages, BLOCK_B=b, BLOCK_U=u, BLOCK_K=k)
        for case, (b, u, k, warps, stages) in (
            ("16-few", few), ("16-many", many), ("32-few", few_32), ("32-many", many_32)
        )
    }  # fmt: skip


_ONE_TILE = (64, 64, 64, 4, 1)
_INTERPRETED = _steps(_ONE_TILE, _ONE_TILE, _ONE_TILE, _ONE_TILE)

_WIDE = ((16, 32, 32, 4, 2), (32, 32, 32, 4, 2))

# A product has BLOCK_U columns for each gate.
STEP_FORWARD: Table = {
    "sm_80": _steps((16, 32, 64, 4, 4), (64, 32, 64, 4, 3), *_WIDE),
    "sm_90": _steps((16, 32, 64, 4, 4), (64, 32, 64, 4, 3), *_WIDE),
    "sm_100": _steps((16, 32, 64, 4, 4), (64, 32, 64, 4, 3), *_WIDE),
    "gfx942": _steps((16, 32, 64, 4, 2), (64, 32, 64, 4, 2), *_WIDE),
    "interpret": _INTERPRETED,
}

# A product has BLOCK_U columns.
STEP_BACKWARD: Table = {
    "sm_80": _steps((16, 32, 64, 4, 4), (64, 32, 64, 4, 3), *_WIDE),
    "sm_90": _steps((16, 32, 64, 4, 4), (64, 32, 64, 4, 3), *_WIDE),
    "sm_100": _steps((16, 32, 64, 4, 4), (64, 32, 64, 4, 3), *_WIDE),
    "gfx942": _steps((16, 32, 64, 4, 2), (64, 32, 64, 4, 2), *_WIDE),
    "interpret": _INTERPRETED,
}
