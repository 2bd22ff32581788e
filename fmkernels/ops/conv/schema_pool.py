"""Schemas and fake kernels of the pooling ops, for one, two and three spatial axes.

Images are laid out as in schema.py. ``argmax`` (uint8) is the position of the first maximum within
its window, counted in the order of the window's elements, of which there are at most
MAX_POOL_AREA. A NaN counts as larger than every number.

An average divides by the number of elements of the window: with ``count_include_pad`` those in the
padding count, those beyond it (ceil_mode) do not; ``divisor_override`` replaces that number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels.ops.conv.geometry import is_channels_last, new_image, pool_size

MAX_POOL_AREA = 256  # a window-local argmax fits in uint8

_library = torch.library.Library("fmkernels", "FRAGMENT")
_library.define(
    "max_pool_forward(Tensor input, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation, bool ceil_mode) -> (Tensor output, Tensor argmax)"
)
_library.define(
    "max_pool_backward(Tensor grad_output, Tensor argmax, int[] input_size, int[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation) -> Tensor"
)
_library.define(
    "avg_pool_forward(Tensor input, int[] kernel_size, int[] stride, int[] padding, "
    "bool ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor"
)
_library.define(
    "avg_pool_backward(Tensor grad_output, int[] input_size, int[] kernel_size, int[] stride, "
    "int[] padding, bool count_include_pad, int? divisor_override) -> Tensor"
)


@torch.library.register_fake("fmkernels::max_pool_forward", lib=_library)
def _max_pool_forward_fake(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    spatial = pool_size(input.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    shape, channels_last = (*input.shape[:2], *spatial), is_channels_last(input)
    return (
        new_image(input, shape, channels_last),
        new_image(input, shape, channels_last, torch.uint8),
    )


@torch.library.register_fake("fmkernels::max_pool_backward", lib=_library)
def _max_pool_backward_fake(
    grad_output: Tensor,
    argmax: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return new_image(grad_output, tuple(input_size), is_channels_last(grad_output))


@torch.library.register_fake("fmkernels::avg_pool_forward", lib=_library)
def _avg_pool_forward_fake(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    spatial = pool_size(input.shape[2:], kernel_size, stride, padding, None, ceil_mode)
    return new_image(input, (*input.shape[:2], *spatial), is_channels_last(input))


@torch.library.register_fake("fmkernels::avg_pool_backward", lib=_library)
def _avg_pool_backward_fake(
    grad_output: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    return new_image(grad_output, tuple(input_size), is_channels_last(grad_output))
