"""The weight of a convolution as the Triton kernels read it, packed for a frozen layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_weight(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    padding_mode: str,
    exact: bool = False,
) -> Tensor:
    """The bytes of the weight with its second dimension innermost; the options do not matter."""
    return weight.movedim(1, -1).contiguous().view(-1).view(torch.uint8)


def unpack_weight(packed: Tensor | None, weight: Tensor) -> Tensor:
    """A view of ``packed`` with the shape of ``weight``; ``weight`` if it was packed otherwise."""
    if packed is None or packed.numel() != weight.numel() * weight.itemsize:
        return weight
    outer, inner, *kernel = weight.shape
    return packed.view(weight.dtype).view(outer, *kernel, inner).movedim(-1, 1)
