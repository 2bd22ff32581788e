"""The linear family's kernels and the production shapes that they are compiled at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fmkernels.bench.gpu.registry import Case, Kernel
from fmkernels.ops._triton.splits import SUM_CONFIGS
from fmkernels.ops.linear import triton as kernels

KERNELS = (
    Kernel("linear_fwd_kernel", kernels.FORWARD_CONFIGS, matrix=True),
    Kernel("linear_bwd_kernel", kernels.BACKWARD_CONFIGS, matrix=True),
    Kernel("linear_bwd_activation_kernel", kernels.ACTIVATION_CONFIGS),
    Kernel("split_sum_kernel", SUM_CONFIGS),
)


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _linear(
    rows: int, columns: int, depth: int, activation: str | None, residual: bool = False
) -> Callable[[torch.dtype], None]:
    """Forward and backward with every gradient."""

    def call(dtype: torch.dtype) -> None:
        input, weight = _meta(dtype, rows, depth), _meta(dtype, columns, depth)
        bias = _meta(dtype, columns)
        added = _meta(dtype, rows, columns) if residual else None
        output, saved = kernels.linear_forward(input, weight, bias, added, None, activation, True)
        kernels.linear_backward(
            torch.empty_like(output),
            input,
            weight,
            output,
            saved,
            activation,
            True,
            True,
            True,
            residual,
        )

    return call


CASES = (
    # BERT-large's feed-forward at batch 8 x 512; a projection with its residual; decoding.
    Case("ffn_gelu", _linear(4096, 4096, 1024, "gelu")),
    Case("projection_residual", _linear(4096, 1024, 4096, None, residual=True)),
    Case("rows_64", _linear(64, 4096, 4096, "relu"), dtypes=("bf16", "fp16")),
    Case("rows_8", _linear(8, 4096, 4096, "silu"), dtypes=("bf16", "fp16")),
    Case("fp64", _linear(512, 512, 512, "gelu"), dtypes=("fp64",)),
    Case("unaligned", _linear(1000, 1001, 999, "gelu"), dtypes=("bf16",), aligned=False),
    Case("huge", _linear(2**21, 2048, 1024, None), dtypes=("bf16",), huge=True),
)
