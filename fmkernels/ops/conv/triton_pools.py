"""The pooling ops as Triton kernels: launchers with the signatures of reference_pool.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels.ops._triton.launch import (
    accumulator_dtype,
    architecture,
    index_dtype,
    launch,
)
from fmkernels.ops.conv.geometry import (
    is_channels_last,
    new_image,
    pool_size,
)
from fmkernels.ops.conv.triton_configs import ROW_CONFIGS
from fmkernels.ops.conv.triton_pool import conv_bwd_epilogue_kernel, pool_fwd_kernel
from fmkernels.ops.conv.triton_problem import (
    row_grid,
    three,
)


def launch_pool(
    input: Tensor,
    output: Tensor,
    argmax: Tensor | None,
    pool: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    count_include_pad: bool,
    divisor: int | None,
    mark_zero: bool,
) -> None:
    setting = ROW_CONFIGS[architecture()]["rows"]
    size = three(output.shape[2:])
    launch(
        pool_fwd_kernel,
        row_grid(setting, output.shape[0], size, output.shape[1]),
        setting,
        input,
        output,
        argmax,
        *input.shape[:2],
        *three(input.shape[2:]),
        *size,
        *three(padding, 0),
        divisor or 0,
        KERNEL=three(kernel_size),
        STRIDE=three(stride),
        DILATION=three(dilation),
        POOL=pool,
        COUNT_PADDING=count_include_pad,
        MARK_ZERO=mark_zero,
        CHANNELS_LAST=is_channels_last(input),
        ACC=accumulator_dtype(input),
        INDEX=index_dtype(input, output),
    )


def max_pool_forward(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """See schema_pool.py."""
    spatial = pool_size(input.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    shape, channels_last = (*input.shape[:2], *spatial), is_channels_last(input)
    output = new_image(input, shape, channels_last)
    argmax = new_image(input, shape, channels_last, torch.uint8)
    launch_pool(
        input, output, argmax, "max", kernel_size, stride, padding, dilation, True, None, False
    )
    return output, argmax


def max_pool_backward(
    grad_output: Tensor,
    argmax: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See schema_pool.py."""
    window = (kernel_size, stride, padding, dilation)
    return _pool_backward(grad_output, argmax, input_size, "max", *window, True, None)


def avg_pool_forward(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """See schema_pool.py."""
    spatial = pool_size(input.shape[2:], kernel_size, stride, padding, None, ceil_mode)
    output = new_image(input, (*input.shape[:2], *spatial), is_channels_last(input))
    ones = (1,) * len(kernel_size)
    launch_pool(
        input, output, None, "avg", kernel_size, stride, padding, ones, count_include_pad,
        divisor_override, False,
    )  # fmt: skip
    return output


def avg_pool_backward(
    grad_output: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """See schema_pool.py."""
    window = (kernel_size, stride, padding, (1,) * len(kernel_size))
    return _pool_backward(
        grad_output, None, input_size, "avg", *window, count_include_pad, divisor_override
    )


def _pool_backward(
    grad_output: Tensor,
    argmax: Tensor | None,
    input_size: Sequence[int],
    pool: str,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    channels_last = is_channels_last(grad_output)
    grad_input = new_image(grad_output, tuple(input_size), channels_last)
    setting = ROW_CONFIGS[architecture()]["rows"]
    size = three(input_size[2:])
    launch(
        conv_bwd_epilogue_kernel,
        row_grid(setting, input_size[0], size, input_size[1]),
        setting,
        grad_output,
        argmax,
        *(None, None, None, None, grad_input, None, None),
        *input_size[:2],
        *size,
        *three(grad_output.shape[2:]),
        *three(padding, 0),
        divisor or 0,
        1,
        KERNEL=three(kernel_size),
        STRIDE=three(stride),
        DILATION=three(dilation),
        POOL=pool,
        COUNT_PADDING=count_include_pad,
        ACTIVATION=None,
        CHANNELS_LAST=channels_last,
        ACC=accumulator_dtype(grad_output),
        INDEX=index_dtype(grad_output, grad_input),
    )
    return grad_input
