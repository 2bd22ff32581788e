"""Sizes, layouts and padding of the convolution, pooling and norm ops, for one to three axes.

An image is (N, C, *spatial). The ops see it in one of two memory layouts: contiguous, or channels
last (channels innermost: torch.channels_last, torch.channels_last_3d, and the same for one axis).
A tensor that is both, for example because C is 1, counts as contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class ConvOptions(NamedTuple):
    """The arguments of a convolution that are no tensors, in the order of the ops' schemas.

    Attributes:
        stride, dilation: one int per spatial axis.
        padding: what is padded before and after each axis in turn: (before, after) for one axis.
            Of a transposed convolution that is cut away; ``after`` is negative where torch's
            output_padding exceeds the padding.
        groups: divides the channels on both sides.
        transposed: the adjoint of the convolution; its weight is (C, O / groups, *kernel).
        padding_mode: one of PADDING_MODES; "zeros" if transposed.
        activation: a name of fmkernels.ops._activations, or None.
        pool: None, "max" or "avg".
        window: kernel, stride and padding of the pool, one int per axis each; empty without pool.
            Floor mode; an average counts the padding.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    padding_mode: str = "zeros"
    activation: str | None = None
    pool: str | None = None
    window: tuple[int, ...] = ()


def edges_of(padding: Sequence[int]) -> list[tuple[int, int]]:
    """``(before, after)`` of each axis."""
    return list(zip(padding[0::2], padding[1::2], strict=True))


def window_parts(window: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """``(kernel, stride, padding)`` of a pool's window."""
    dims = len(window) // 3
    return tuple(tuple(window[i * dims : (i + 1) * dims]) for i in range(3))


def conv_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool = False,
) -> tuple[int, ...]:
    """Spatial size of a convolution's output: the number of places the dilated kernel fits in.

    Of a transposed convolution: the size that the convolution would have come from.
    """
    axes = zip(size, kernel, stride, edges_of(padding), dilation, strict=True)
    if transposed:
        return tuple((n - 1) * s + d * (k - 1) + 1 - b - a for n, k, s, (b, a), d in axes)
    return tuple((n + b + a - d * (k - 1) - 1) // s + 1 for n, k, s, (b, a), d in axes)


def conv_shape(input: Tensor, weight: Tensor, options: ConvOptions) -> tuple[int, ...]:
    """Shape of a convolution's output before pooling."""
    o = options
    spatial = conv_size(
        input.shape[2:], weight.shape[2:], o.stride, o.padding, o.dilation, o.transposed
    )
    channels = weight.shape[1] * o.groups if o.transposed else weight.shape[0]
    return (input.shape[0], channels, *spatial)


def pool_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] | None = None,
    ceil_mode: bool = False,
) -> tuple[int, ...]:
    """Spatial size of a pooled output.

    With ``ceil_mode`` a partial window at the end counts, as in torch, only if it starts inside
    the input or its leading padding.
    """
    dilation = (1,) * len(kernel) if dilation is None else dilation
    sizes = []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        count = room // s + 1
        if ceil_mode:
            count = -(-room // s) + 1
            if (count - 1) * s >= n + p:
                count -= 1
        sizes.append(count)
    return tuple(sizes)


def pooled_shape(shape: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """Shape of an image after a pool in floor mode; ``shape`` itself for an empty window."""
    if not window:
        return tuple(shape)
    return (*shape[:2], *pool_size(shape[2:], *window_parts(window)))


def is_channels_last(image: Tensor) -> bool:
    """The layout of an image that is in one of the two."""
    if image.is_contiguous():
        return False
    if image.dim() in _CHANNELS_LAST:
        return image.is_contiguous(memory_format=_CHANNELS_LAST[image.dim()])
    return image.movedim(1, -1).is_contiguous()


def in_layout(image: Tensor, channels_last: bool) -> Tensor:
    """The image in the given layout: itself where it is already."""
    if not channels_last:
        return image.contiguous()
    if image.dim() in _CHANNELS_LAST:
        return image.contiguous(memory_format=_CHANNELS_LAST[image.dim()])
    return image.movedim(1, -1).contiguous().movedim(-1, 1)


def new_image(
    like: Tensor, shape: Sequence[int], channels_last: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised image in the given layout."""
    dtype = dtype or like.dtype
    if channels_last and len(shape) not in _CHANNELS_LAST:
        batch, channels, *spatial = shape
        empty = torch.empty((batch, *spatial, channels), dtype=dtype, device=like.device)
        return empty.movedim(-1, 1)
    memory_format = _CHANNELS_LAST[len(shape)] if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def per_channel(vector: Tensor, dims: int) -> Tensor:
    """A (C) vector, or (N, C) rows, to be broadcast over an image with ``dims`` spatial axes."""
    return vector.reshape(*vector.shape, *(1,) * dims)


def padding_source(size: int, before: int, after: int, mode: str, device) -> Tensor:
    """Which position of an axis each padded position repeats; for all modes but zeros."""
    position = torch.arange(-before, size + after, device=device)
    if mode == "replicate":
        return position.clamp(0, size - 1)
    if mode == "circular":
        return position % size
    position = position.abs()  # reflect, at most once on either side
    return torch.where(position < size, position, 2 * (size - 1) - position)
