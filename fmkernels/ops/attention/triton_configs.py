"""Launch configurations of the attention kernels, per chip and case.

A case is the operands' width in bits and the padded head width, ``"16-128"`` or, for scores that
are more than products, ``"16-128-rich"``. An entry should compile without a spill for its chip
with aligned strides, fit its shared and tensor memory, and use its matrix unit: ``python
benchmarks/gpu_static.py --match attention`` judges that. They come from compiled code
(registers, occupancy), not from timings: no GPU was at hand.
"""

from __future__ import annotations

from fmkernels.ops._triton.launch import Config, Table, config

_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
_WIDTHS = (64, 128, 256, 512)
_Tile = tuple[int, ...]  # BLOCK_M, BLOCK_N, num_warps, num_stages; CHUNK in the backward


def case(element_size: int, width: int, rich: bool = False) -> str:
    """The key of a table's inner mapping.

    Args:
        width: the wider of the padded head widths.
        rich: whether the scores pass through a mask, softcap, ALiBi or dropout, whose operands
            take registers from the tile.
    """
    return f"{8 * element_size}-{max(_WIDTHS[0], width)}" + ("-rich" if rich else "")


def _cases(
    element_size: int, plain: tuple[_Tile, ...], rich: tuple[_Tile, ...]
) -> dict[str, Config]:
    """A tile for each head width; rich ones may stop early, where the plain ones serve them."""
    found = {}
    for index, width in enumerate(_WIDTHS):
        for is_rich, tiles in ((False, plain), (True, rich)):
            tile = tiles[index] if index < len(tiles) else plain[index]
            found[case(element_size, width, is_rich)] = _config(*tile)
    return found


def _config(m: int, n: int, warps: int, stages: int, chunk: int = 0) -> Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n}
    if chunk:
        blocks["CHUNK"] = chunk
    return config(warps, stages, **blocks)


def _interpreted(m: int, n: int) -> dict[str, Config]:
    tiles = ((m, n, 4, 1),) * len(_WIDTHS)
    return _cases(2, tiles, tiles) | _cases(4, tiles, tiles)


_TINY = (16, 16, 4, 1)
_WIDE = (16, 16, 8, 1)  # at 512 features on NVIDIA, where 4 warps spill
_SMALL = (32, 32, 4, 1)
_FULL_PRECISION = ((32, 32, 4, 1), (32, 16, 4, 1), _TINY, _TINY)
# Of the forward on NVIDIA: at 128 features it spills with 4 warps, and in tf32 with more rows.
_FULL_FORWARD = ((32, 32, 4, 1), (16, 32, 8, 1), _TINY, _TINY)
_FULL_KEYS_VALUES = (*_FULL_PRECISION[:3], _WIDE)

FORWARD: Table = {
    "sm_80": _cases(
        2,
        ((128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 1), (16, 32, 8, 1)),
        ((64, 32, 4, 2), (64, 32, 8, 1), _SMALL, _TINY),
    )
    | _cases(4, _FULL_FORWARD, ((32, 16, 4, 1), _TINY)),
    "sm_90": _cases(
        2,
        ((128, 64, 8, 2), (128, 128, 8, 2), (64, 32, 8, 1), (16, 32, 4, 1)),
        ((128, 64, 8, 2), (128, 64, 8, 2), _SMALL, _TINY),
    )
    | _cases(4, _FULL_FORWARD, ((32, 16, 4, 1), _TINY)),
    "sm_100": _cases(
        2,
        ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1), (16, 32, 8, 1)),
        ((64, 64, 8, 2), (64, 64, 8, 2), _SMALL, _TINY),
    )
    | _cases(4, _FULL_FORWARD, ((32, 16, 8, 1), _TINY)),
    "gfx942": _cases(
        2,
        ((128, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 1), _TINY),
        ((64, 32, 4, 1), (64, 32, 4, 1), _SMALL, _TINY),
    )
    | _cases(4, _FULL_PRECISION, ()),
    "interpret": _interpreted(64, 64),
}

KEYS_VALUES: Table = {
    "sm_80": _cases(
        2,
        ((32, 64, 8, 2), (64, 64, 8, 2), (16, 32, 4, 1), _WIDE),
        (_SMALL, _SMALL, (16, 32, 4, 1), _WIDE),
    )
    | _cases(4, _FULL_KEYS_VALUES, ()),
    "sm_90": _cases(
        2,
        ((64, 128, 8, 2), (32, 128, 8, 2), (16, 32, 4, 1), _WIDE),
        (_SMALL, _SMALL, (16, 32, 4, 1), _WIDE),
    )
    | _cases(4, _FULL_KEYS_VALUES, ()),
    "sm_100": _cases(
        2,
        ((64, 128, 8, 2), (64, 128, 8, 1), (16, 32, 4, 1), _WIDE),
        (_SMALL, _SMALL, (16, 32, 8, 1), (16, 16, 8, 1, 128)),
    )
    | _cases(4, _FULL_KEYS_VALUES, ()),
    "gfx942": _cases(
        2,
        ((64, 64, 4, 2), (32, 64, 4, 1), _TINY, _TINY),
        (_SMALL, _SMALL, _TINY, _TINY),
    )
    | _cases(4, (*_FULL_PRECISION[:3], (16, 32, 4, 1, 64)), ()),  # whole rows of 512 spill
    "interpret": _interpreted(64, 64),
}

QUERIES: Table = {
    "sm_80": _cases(
        2,
        ((64, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1), _TINY),
        (_SMALL, (32, 32, 8, 1), (16, 32, 4, 1), _TINY),
    )
    | _cases(4, _FULL_PRECISION, ()),
    "sm_90": _cases(
        2,
        ((128, 64, 8, 2), (128, 64, 8, 2), (32, 16, 8, 1), _TINY),
        (_SMALL, (32, 32, 8, 1), (16, 32, 4, 1), _TINY),
    )
    | _cases(4, _FULL_PRECISION, ()),
    "sm_100": _cases(
        2,
        ((128, 64, 8, 2), (128, 64, 8, 2), (32, 32, 4, 1), _TINY),
        (_SMALL, _SMALL, (16, 32, 4, 1), _TINY),
    )
    | _cases(4, _FULL_PRECISION, ()),
    "gfx942": _cases(
        2,
        ((64, 64, 4, 1), (64, 32, 4, 1), _TINY, _TINY),
        (_SMALL, _SMALL, _TINY, _TINY),
    )
    | _cases(4, (*_FULL_PRECISION[:3], (64, 16, 4, 1, 64)), ()),  # whole rows of 512 spill
    "interpret": _interpreted(64, 64),
}

# The sum over a tile is held in registers too. A mask is always there: only rich cases. Whole rows
# of 512 features in float32 spill on gfx942.
MASK: Table = {
    arch: {
        case(size, width, True): _config(*tile)
        for size, tiles in (
            (2, (_SMALL, _SMALL, _TINY, _TINY if arch == "gfx942" else (16, 32, 8, 1))),
            (4, (*_FULL_PRECISION[:3], (32, 32, 4, 1, 64) if arch == "gfx942" else _WIDE)),
        )
        for width, tile in zip(_WIDTHS, tiles, strict=True)
    }
    for arch in _ARCHITECTURES
} | {"interpret": _interpreted(64, 64)}

# Rows are queries times the heads of a group; 16 is the least that a matrix instruction takes.
_DECODE_WIDE = ((16, 32, 4, 2), (16, 32, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1))
DECODE: Table = {
    arch: {
        case(size, width): _config(*tile)
        for size, tiles in (
            (2, ((16, 64, 4, stages), (16, 64, 4, stages), (16, 32, 4, 1), (16, 16, 4, 1))),
            (4, _DECODE_WIDE),
        )
        for width, tile in zip(_WIDTHS, tiles, strict=True)
    }
    for arch, stages in (("sm_80", 3), ("sm_90", 3), ("sm_100", 3), ("gfx942", 1))
} | {"interpret": _interpreted(16, 64)}

# Kernels that only stream rows. With 4 warps the row sums of 512 features spill on sm_80.
STREAM: Table = {
    **{
        arch: {"all": config(8 if arch == "sm_80" else 4, 1, BLOCK_M=16)}
        for arch in _ARCHITECTURES
    },
    "interpret": {"all": config(4, 1, BLOCK_M=64)},
}
MERGE: Table = {arch: {"all": config(4, 1)} for arch in (*_ARCHITECTURES, "interpret")}
