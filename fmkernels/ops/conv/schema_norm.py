"""Schemas and fake kernels of the norm ops: what follows a convolution in training.

channel_norm_forward computes ``pool(activation(norm(input) * weight + bias + residual))``.

* ``groups`` 0: batch norm (Ioffe and Szegedy 2015) on the statistics of this batch, one mean and
  variance per channel. ``groups`` >= 1: group norm (Wu and He 2018), one per image and group.
* ``input`` and ``residual`` (N, C, *spatial) as in schema.py; ``weight`` and ``bias`` (C), or None
  for 1 and 0; these, ``mean`` and ``variance`` are float32, or float64 if ``input`` is.
* ``mean`` and ``variance`` (biased) are (C) or (N, groups). The forward takes those of ``input``
  where they are known already, as from conv_statistics, and computes them where they are None.
* ``activation``, ``pool`` and ``window`` as in schema.py.
* ``argmax`` (uint8), only if ``save_for_backward`` and the pool is a max, as in schema.py.

The backward computes the normalised values and the pre-activation from ``input`` again, so nothing
else of an image's size is saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels.ops._activations import opmath_dtype
from fmkernels.ops.conv.geometry import is_channels_last, new_image, pooled_shape

_library = torch.library.Library("fmkernels", "FRAGMENT")
_library.define(
    "channel_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
    "int groups, float eps, str? activation, str? pool, int[] window, bool save_for_backward, "
    "Tensor? mean=None, Tensor? variance=None) -> "
    "(Tensor output, Tensor mean, Tensor variance, Tensor argmax)"
)
_library.define(
    "channel_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor mean, Tensor variance, Tensor argmax, int groups, float eps, "
    "str? activation, str? pool, int[] window, bool need_input, bool need_weight, bool need_bias, "
    "bool need_residual) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, "
    "Tensor grad_residual)"
)


def statistics_shape(input: Tensor, groups: int) -> tuple[int, ...]:
    """Shape of mean and variance."""
    return (input.shape[0], groups) if groups else (input.shape[1],)


@torch.library.register_fake("fmkernels::channel_norm_forward", lib=_library)
def _channel_norm_forward_fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    eps: float,
    activation: str | None,
    pool: str | None,
    window: Sequence[int],
    save_for_backward: bool,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, channels_last = pooled_shape(input.shape, window), is_channels_last(input)
    opmath = opmath_dtype(input.dtype)
    argmax = input.new_empty((0,), dtype=torch.uint8)
    if save_for_backward and pool == "max":
        argmax = new_image(input, shape, channels_last, torch.uint8)
    return (
        new_image(input, shape, channels_last),
        input.new_empty(statistics_shape(input, groups), dtype=opmath),
        input.new_empty(statistics_shape(input, groups), dtype=opmath),
        argmax,
    )


@torch.library.register_fake("fmkernels::channel_norm_backward", lib=_library)
def _channel_norm_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    argmax: Tensor,
    groups: int,
    eps: float,
    activation: str | None,
    pool: str | None,
    window: Sequence[int],
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels_last, opmath = is_channels_last(input), opmath_dtype(input.dtype)

    def image(wanted: bool) -> Tensor:
        return new_image(input, input.shape, channels_last) if wanted else input.new_empty((0,))

    def vector(wanted: bool) -> Tensor:
        return input.new_empty((input.shape[1] if wanted else 0,), dtype=opmath)

    return image(need_input), vector(need_weight), vector(need_bias), image(need_residual)
