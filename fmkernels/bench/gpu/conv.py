"""The conv family's kernels and the production shapes that they are compiled at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmkernels.bench.gpu.registry import Case, Kernel
from fmkernels.ops.conv import triton as kernels
from fmkernels.ops.conv.geometry import (
    ConvOptions,
    conv_shape,
    in_layout,
    new_image,
    pooled_shape,
    window_parts,
)
from fmkernels.ops.conv.triton_configs import (
    BACKWARD_CONFIGS,
    DEPTHWISE_CONFIGS,
    EPILOGUE_CONFIGS,
    GATHER_CONFIGS,
    ROW_CONFIGS,
)

KERNELS = (
    Kernel("conv_fwd_kernel", GATHER_CONFIGS, matrix=True),
    Kernel("conv_bwd_kernel", BACKWARD_CONFIGS, matrix=True),
    Kernel("conv_depthwise_fwd_kernel", DEPTHWISE_CONFIGS),
    Kernel("conv_depthwise_bwd_kernel", DEPTHWISE_CONFIGS),
    Kernel("conv_bwd_epilogue_kernel", EPILOGUE_CONFIGS),
    Kernel("pool_fwd_kernel", ROW_CONFIGS),
    Kernel("channel_norm_stats_kernel", ROW_CONFIGS),
    Kernel("channel_norm_fwd_kernel", ROW_CONFIGS),
    Kernel("channel_norm_bwd_sums_kernel", ROW_CONFIGS),
    Kernel("channel_norm_bwd_kernel", ROW_CONFIGS),
)


def _conv(
    shape: tuple[int, ...],
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    groups: int = 1,
    scale: bool = False,
    residual: bool = False,
    channels_last: bool = True,
    **options: Any,
) -> Callable[[torch.dtype], None]:
    """Forward and backward with every gradient; the weight is channels_last too."""
    batch, channels, *spatial = shape
    dims = len(spatial)
    edges = padding or (kernel // 2, kernel // 2)
    problem = ConvOptions((stride,) * dims, edges * dims, (1,) * dims, groups, **options)

    def empty(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def call(dtype: torch.dtype) -> None:
        image = new_image(empty(0, dtype=dtype), (batch, channels, *spatial), channels_last)
        sides = (channels, out_channels // groups)
        if not problem.transposed:
            sides = (out_channels, channels // groups)
        weight = in_layout(empty(*sides, *(kernel,) * dims, dtype=dtype), channels_last)
        bias = empty(out_channels, dtype=dtype)
        opmath = torch.float64 if dtype is torch.float64 else torch.float32
        per_channel = empty(out_channels, dtype=opmath) if scale else None
        size = conv_shape(image, weight, problem)
        added = new_image(image, size, channels_last) if residual else None
        results = kernels.conv_forward(
            image, weight, bias, per_channel, per_channel, added, None, *problem, True
        )
        grad = new_image(image, pooled_shape(size, problem.window), channels_last)
        kernels.conv_backward(
            grad, image, weight, bias, per_channel, *results, *problem,
            True, True, True, False, scale, residual,
        )  # fmt: skip

    return call


def _max_pool(shape: tuple[int, ...]) -> Callable[[torch.dtype], None]:
    """3x3 with stride 2, which is not fused: forward alone, the backward is an epilogue's."""

    def call(dtype: torch.dtype) -> None:
        image = new_image(torch.empty(0, dtype=dtype, device="meta"), shape, True)
        window = (3, 3, 2, 2, 1, 1)
        kernels.max_pool_forward(image, *window_parts(window), (1, 1), False)

    return call


def _norm(
    shape: tuple[int, ...], groups: int, residual: bool = False
) -> Callable[[torch.dtype], None]:
    """Norm, residual, relu and 2x2 max-pool, forward and backward with every gradient."""

    def call(dtype: torch.dtype) -> None:
        image = new_image(torch.empty(0, dtype=dtype, device="meta"), shape, True)
        opmath = torch.float64 if dtype is torch.float64 else torch.float32
        weight = torch.empty(shape[1], dtype=opmath, device="meta")
        options = (groups, 1e-5, "relu", "max", (2, 2, 2, 2, 0, 0))
        inputs = (image, weight, weight, image if residual else None)
        output, *kept = kernels.channel_norm_forward(*inputs, *options, True)
        kernels.channel_norm_backward(
            torch.empty_like(output), *inputs, *kept, *options, True, True, True, residual
        )

    return call


_BLOCK = (32, 64, 56, 56)
_POOL = {"activation": "relu", "pool": "max", "window": (2, 2, 2, 2, 0, 0)}
_BF16 = ("bf16",)

CASES = (
    # A block of a CNN, of ResNet-50 (3x3 in its third stage, 1x1, the strided one), its stem.
    Case("block_pool", _conv(_BLOCK, 128, 3, scale=True, **_POOL)),
    Case(
        "resnet_3x3",
        _conv((32, 256, 14, 14), 256, 3, scale=True, activation="relu"),
        dtypes=_BF16,
    ),
    Case(
        "resnet_1x1",
        _conv((32, 256, 56, 56), 64, 1, residual=True, activation="gelu"),
        dtypes=_BF16,
    ),
    Case("stride_2", _conv((32, 256, 28, 28), 512, 3, stride=2), dtypes=_BF16),
    Case("stem", _conv((32, 16, 224, 224), 64, 7, stride=2, activation="relu"), dtypes=_BF16),
    Case("narrow", _conv((32, 64, 112, 112), 32, 3, activation="silu"), dtypes=_BF16),
    Case("grouped", _conv((32, 256, 28, 28), 256, 3, groups=16, activation="relu"), dtypes=_BF16),
    Case(
        "depthwise",
        _conv((32, 256, 28, 28), 256, 3, groups=256, activation="hardswish"),
        dtypes=("bf16", "fp32"),
    ),
    Case(
        "causal_1d",
        _conv((8, 2048, 4096), 2048, 4, padding=(3, 0), groups=2048, activation="silu"),
        dtypes=("bf16", "fp16", "fp32"),
    ),
    Case("audio_1d", _conv((16, 256, 4096), 256, 5, activation="gelu"), dtypes=_BF16),
    Case("video_3d", _conv((4, 64, 16, 56, 56), 64, 3), dtypes=_BF16),
    Case(
        "transposed",
        _conv((16, 256, 28, 28), 128, 4, stride=2, padding=(1, 1), transposed=True),
        dtypes=_BF16,
    ),
    Case("pool_3x3", _max_pool(_BLOCK), dtypes=("bf16", "fp32")),
    Case("batch_norm", _norm(_BLOCK, 0), dtypes=("bf16", "fp32")),
    Case("group_norm", _norm(_BLOCK, 8, residual=True), dtypes=_BF16),
    Case("fp64", _conv((4, 64, 28, 28), 64, 3, activation="gelu"), dtypes=("fp64",)),
    Case("contiguous", _conv(_BLOCK, 128, 3, channels_last=False), dtypes=_BF16, aligned=False),
    Case(
        "unaligned",
        _conv((32, 99, 33, 33), 101, 3, activation="gelu"),
        dtypes=_BF16,
        aligned=False,
    ),
    Case("huge", _conv((64, 256, 512, 512), 256, 3), dtypes=_BF16, huge=True),
)
