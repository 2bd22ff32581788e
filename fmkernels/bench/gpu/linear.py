"""The kernels of fully connected layers and norms, and the shapes that they are compiled at."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fmkernels.bench.gpu.registry import Case, Kernel
from fmkernels.ops._triton import gemm_configs
from fmkernels.ops._triton.splits import SUM_CONFIGS
from fmkernels.ops.feed_forward import triton as feed_forward
from fmkernels.ops.linear import triton as linear
from fmkernels.ops.norm import triton as norm

KERNELS = (
    Kernel("gemm_fwd_kernel", gemm_configs.FORWARD_CONFIGS, matrix=True),
    Kernel("gemm_bwd_kernel", gemm_configs.BACKWARD_CONFIGS, matrix=True),
    Kernel("gemm_gated_fwd_kernel", gemm_configs.GATED_CONFIGS, matrix=True),
    Kernel("activation_bwd_kernel", gemm_configs.ELEMENTWISE_CONFIGS),
    Kernel("split_sum_kernel", SUM_CONFIGS),
    Kernel("norm_fwd_kernel", norm.NORM_CONFIGS),
    Kernel("norm_bwd_kernel", norm.NORM_CONFIGS),
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
        output, saved = linear.linear_forward(input, weight, bias, added, None, activation, True)
        grad = torch.empty_like(output)
        linear.linear_backward(
            grad, input, weight, output, saved, activation, True, True, True, False
        )

    return call


def _feed_forward(
    rows: int, width: int, hidden: int, activation: str, gated: bool, dropout_p: float = 0.0
) -> Callable[[torch.dtype], None]:
    """Forward and backward with every gradient."""

    def call(dtype: torch.dtype) -> None:
        input = _meta(dtype, rows, width)
        up, down = _meta(dtype, hidden, width), _meta(dtype, width, hidden)
        gate = _meta(dtype, hidden, width) if gated else None
        seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p else None
        dropout = (activation, dropout_p, seed)
        _, *kept = feed_forward.feed_forward_forward(
            input, up, None, gate, None, down, None, input, None, None, *dropout, True
        )
        feed_forward.feed_forward_backward(
            torch.empty_like(input), input, up, gate, down, *kept, *dropout,
            True, True, False, gated, False, True, False,
        )  # fmt: skip

    return call


def _norm(
    rows: int, features: int, rms: bool, dropout_p: float = 0.0
) -> Callable[[torch.dtype], None]:
    """Residual and norm, forward and backward with every gradient."""

    def call(dtype: torch.dtype) -> None:
        input, weight = _meta(dtype, rows, features), _meta(dtype, features)
        bias = None if rms else weight
        seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout_p else None
        _, *kept = norm.norm_forward(
            input, input, weight, bias, rms, 1e-5, dropout_p, seed, True, True
        )
        norm.norm_backward(
            torch.empty_like(input), torch.empty_like(input), kept[0], weight, *kept[1:], rms,
            dropout_p, seed, True, True, True, not rms,
        )  # fmt: skip

    return call


_BF16 = ("bf16",)

CASES = (
    # BERT-large's first layer at batch 8 x 512; a projection with its residual; decoding.
    Case("gelu", _linear(4096, 4096, 1024, "gelu")),
    Case("residual", _linear(4096, 1024, 4096, None, residual=True), dtypes=_BF16),
    Case("rows_64", _linear(64, 4096, 4096, "relu"), dtypes=_BF16),
    Case("rows_8", _linear(8, 4096, 4096, "silu"), dtypes=_BF16),
    Case("fp64", _linear(512, 512, 512, "gelu"), dtypes=("fp64",)),
    Case("unaligned", _linear(1000, 1001, 999, "gelu"), dtypes=_BF16, aligned=False),
    Case("huge", _linear(2**21, 2048, 1024, None), dtypes=_BF16, huge=True),
    # Llama's gated form; BERT's plain one with dropout.
    Case(
        "swiglu",
        _feed_forward(4096, 4096, 11008, "silu", gated=True),
        dtypes=("bf16", "fp32", "tf32"),
    ),
    Case("ffn_dropout", _feed_forward(4096, 1024, 4096, "gelu", False, 0.1), dtypes=_BF16),
    Case("norm_256", _norm(65536, 256, rms=False), dtypes=_BF16),
    Case("norm_1024", _norm(4096, 1024, rms=False, dropout_p=0.1), dtypes=("bf16", "fp32")),
    Case("norm_4096", _norm(4096, 4096, rms=True), dtypes=_BF16),
    Case("norm_16384", _norm(4096, 16384, rms=False), dtypes=_BF16),
)
