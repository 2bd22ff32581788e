"""Launch configurations of the conv family's Triton kernels, per chip."""

from __future__ import annotations

from fmkernels.ops._triton.launch import config

# "narrow": fewer than 64 channels of the result; "stem": fewer than 32 are reduced, "groups": both
# are few. "tf32" and "ieee": as in the linear family. 8 warps: with 4 a 128x128 tile spills.
GATHER_CONFIGS = {
    "sm_80": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "narrow": config(4, 3, BLOCK_M=128, BLOCK_N=32, BLOCK_K=64),
        "stem": config(4, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=16),
        "groups": config(4, 3, BLOCK_M=64, BLOCK_N=16, BLOCK_K=16),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "sm_90": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "narrow": config(4, 3, BLOCK_M=128, BLOCK_N=32, BLOCK_K=64),
        "stem": config(4, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=16),
        "groups": config(4, 3, BLOCK_M=64, BLOCK_N=16, BLOCK_K=16),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "sm_100": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "narrow": config(4, 3, BLOCK_M=128, BLOCK_N=32, BLOCK_K=64),
        "stem": config(4, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=16),
        "groups": config(4, 3, BLOCK_M=64, BLOCK_N=16, BLOCK_K=16),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "gfx942": {
        "large": config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "narrow": config(4, 2, BLOCK_M=128, BLOCK_N=32, BLOCK_K=64),
        "stem": config(4, 2, BLOCK_M=128, BLOCK_N=64, BLOCK_K=16),
        "groups": config(4, 2, BLOCK_M=64, BLOCK_N=16, BLOCK_K=16),
        "tf32": config(8, 2, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
        "ieee": config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "interpret": {
        "large": config(4, 1, BLOCK_M=128, BLOCK_N=32, BLOCK_K=32),
        "narrow": config(4, 1, BLOCK_M=128, BLOCK_N=32, BLOCK_K=32),
        "stem": config(4, 1, BLOCK_M=128, BLOCK_N=32, BLOCK_K=16),
        "groups": config(4, 1, BLOCK_M=128, BLOCK_N=16, BLOCK_K=16),
        "tf32": config(4, 1, BLOCK_M=128, BLOCK_N=32, BLOCK_K=32),
        "ieee": config(4, 1, BLOCK_M=128, BLOCK_N=32, BLOCK_K=32),
    },
}
# Of the backward kernel, whose tiles are of the input's gradient (pixels x channels) and of the
# weight's (channels x channels, BLOCK_K pixels at a time).
BACKWARD_CONFIGS = {
    "sm_80": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "narrow": config(4, 3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=32),
        "groups": config(4, 3, BLOCK_M=16, BLOCK_N=16, BLOCK_K=32),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "sm_90": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "narrow": config(4, 3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=32),
        "groups": config(4, 3, BLOCK_M=16, BLOCK_N=16, BLOCK_K=32),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "sm_100": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "narrow": config(4, 3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=32),
        "groups": config(4, 3, BLOCK_M=16, BLOCK_N=16, BLOCK_K=32),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "gfx942": {
        "large": config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "narrow": config(4, 2, BLOCK_M=64, BLOCK_N=32, BLOCK_K=32),
        "groups": config(4, 2, BLOCK_M=16, BLOCK_N=16, BLOCK_K=32),
        "tf32": config(8, 2, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
        "ieee": config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "interpret": {
        name: config(4, 1, BLOCK_M=64, BLOCK_N=32, BLOCK_K=128)
        for name in ("large", "narrow", "groups", "tf32", "ieee")
    },
}
# Bound by memory. Taps are looped over at run time: unrolled, 7x7 spills in every tile tried. On
# sm_100 the backward spills in float32 with 4 warps.
DEPTHWISE_CONFIGS = {
    **{
        arch: {"rows": config(warps, 2, BLOCK_M=64, BLOCK_N=64)}
        for arch, warps in (("sm_80", 4), ("sm_90", 4), ("sm_100", 8), ("gfx942", 4))
    },
    "interpret": {"rows": config(4, 1, BLOCK_M=128, BLOCK_N=32)},
}
# Bound by memory: 16 or 32 elements per thread, so that each reads 16 bytes at a time. On sm_100
# the pool spills with 32.
ROW_CONFIGS = {
    **{
        arch: {"rows": config(warps, 1, BLOCK_M=64, BLOCK_N=64)}
        for arch, warps in (("sm_80", 4), ("sm_90", 4), ("sm_100", 8), ("gfx942", 4))
    },
    "interpret": {"rows": config(4, 1, BLOCK_M=128, BLOCK_N=32)},
}
# "double": float64, which spills on sm_80 with 32 elements, as bfloat16 with a pool does with 16.
EPILOGUE_CONFIGS = {
    arch: rows
    | {"double": config(8, 1, BLOCK_M=64, BLOCK_N=64) if arch == "sm_80" else rows["rows"]}
    for arch, rows in ROW_CONFIGS.items()
}
