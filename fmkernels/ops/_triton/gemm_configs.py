"""Launch configurations of the matrix products that several families share."""

from __future__ import annotations

import torch

from fmkernels.ops._triton.launch import Config, architecture, config

# "tiny" and "small": at most 16 and 64 rows, bound by reading the weight. "dropout": Philox's
# words want the registers of half a large tile. "tf32": twice the bytes per element. "ieee":
# float32 without tf32 runs on the FMA units from registers, so tiles are small; also float64.
FORWARD_CONFIGS = {
    # 128x128x64 w8 s3: 64 KB of shared memory, and no spill with any epilogue; at w4 it spills.
    "sm_80": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "dropout": config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64),
        "small": config(4, 4, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tiny": config(4, 4, BLOCK_M=16, BLOCK_N=64, BLOCK_K=128),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "sm_90": {
        "large": config(8, 4, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "dropout": config(8, 4, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64),
        "small": config(4, 4, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tiny": config(4, 4, BLOCK_M=16, BLOCK_N=64, BLOCK_K=128),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "sm_100": {
        "large": config(8, 4, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "dropout": config(8, 4, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64),
        "small": config(4, 4, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tiny": config(4, 4, BLOCK_M=16, BLOCK_N=64, BLOCK_K=128),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    # LDS is 64 KB; two stages of the large tile take 32 KB.
    "gfx942": {
        "large": config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "dropout": config(8, 2, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64),
        "small": config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tiny": config(4, 2, BLOCK_M=16, BLOCK_N=64, BLOCK_K=128),
        "tf32": config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "interpret": {
        name: config(4, 1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
        for name in ("large", "dropout", "small", "tiny", "tf32", "ieee")
    },
}
# BLOCK_M x BLOCK_N is the tile of either gradient, BLOCK_K the step of its reduction.
BACKWARD_CONFIGS = {
    "sm_80": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "small": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "sm_90": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "small": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "sm_100": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "small": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "gfx942": {
        "large": config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64),
        "small": config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64),
        "tf32": config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
        "ieee": config(4, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=16),
    },
    "interpret": {
        name: config(4, 1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)
        for name in ("large", "small", "tf32", "ieee")
    },
}
# Two products that share their left operand: twice the accumulators of a tile, so half as wide.
GATED_CONFIGS = {
    "sm_80": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=16),
    },
    "sm_90": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=16),
    },
    "sm_100": {
        "large": config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64),
        "tf32": config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
        "ieee": config(4, 3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=16),
    },
    "gfx942": {
        "large": config(8, 2, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64),
        "tf32": config(8, 2, BLOCK_M=128, BLOCK_N=64, BLOCK_K=32),
        "ieee": config(4, 2, BLOCK_M=64, BLOCK_N=32, BLOCK_K=16),
    },
    "interpret": {
        name: config(4, 1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
        for name in ("large", "tf32", "ieee")
    },
}
# Bound by memory: 8 elements per thread.
ELEMENTWISE_CONFIGS = {
    arch: {"all": config(4, 1, BLOCK=1024)}
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942", "interpret")
}


def forward_config(rows: int, precision: str, dtype: torch.dtype, dropout: bool = False) -> Config:
    """The launch configuration of ``gemm_fwd_kernel`` for a number of rows."""
    table = FORWARD_CONFIGS[architecture()]
    if _on_fma_units(precision, dtype):
        return table["ieee"]
    if dtype is torch.float32:
        return table["tf32"]
    if rows > 64:
        return table["dropout" if dropout else "large"]
    return table["tiny" if rows <= 16 else "small"]


def backward_config(rows: int, precision: str, dtype: torch.dtype) -> Config:
    """The launch configuration of ``gemm_bwd_kernel``."""
    table = BACKWARD_CONFIGS[architecture()]
    if _on_fma_units(precision, dtype):
        return table["ieee"]
    if dtype is torch.float32:
        return table["tf32"]
    return table["small" if rows <= 64 else "large"]


def _on_fma_units(precision: str, dtype: torch.dtype) -> bool:
    return dtype is torch.float64 or dtype is torch.float32 and precision == "ieee"


def gated_config(precision: str, dtype: torch.dtype) -> Config:
    """The launch configuration of ``gemm_gated_fwd_kernel``."""
    table = GATED_CONFIGS[architecture()]
    if _on_fma_units(precision, dtype):
        return table["ieee"]
    return table["tf32" if dtype is torch.float32 else "large"]
