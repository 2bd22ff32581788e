"""Schemas and fake kernels of the convolution and pooling ops.

conv2d_forward computes
``maxpool(activation(scale * (conv2d(input, weight) + bias) + shift + residual))``.

* ``input`` (N, C, H, W) is contiguous or channels_last; ``weight`` (O, C / groups, KH, KW) and the
  per-channel vectors ``bias``, ``scale``, ``shift`` (O) are contiguous; ``residual`` has the shape
  of the convolution's output. All share one dtype. ``output``, ``residual`` and everything else
  that is shaped like an image has the memory format of ``input``: channels_last if ``input`` is
  channels_last and not contiguous (a tensor can be both, for example when C is 1), contiguous
  otherwise.
* ``pool`` is empty or [kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w], floor mode.
* ``saved`` is the pre-activation (shaped like the convolution's output), only if
  ``save_for_backward`` and the activation is neither None nor relu.
* ``argmax`` (uint8, shaped like ``output``), only if ``save_for_backward`` and there is a pool, is
  the position ``i * kernel_w + j`` of the first maximum within its window; where the activation is
  relu and that maximum is zero it is RELU_ZERO instead, and no element gets a gradient. The
  backward then reads ``output`` only for a relu without a pool.

``exact`` forbids algorithms with a larger error than direct summation (Winograd). A weight packed
without it may be passed to a forward with it: the forward then packs anew if it has to.

max_pool2d_forward/backward use the same kind of ``argmax``; a window holds at most 256 elements.

An output that is not asked for is an empty tensor of shape (0,).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmkernels.ops._activations import needs_preactivation

MAX_POOL_AREA = 256  # a window-local argmax fits in uint8
RELU_ZERO = 255  # no position: a fused window holds at most 9 elements

_library = torch.library.Library("fmkernels", "FRAGMENT")
_library.define(
    "conv2d_forward(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "Tensor? residual, Tensor? packed_weight, int[] stride, int[] padding, int[] dilation, "
    "int groups, str? activation, int[] pool, bool save_for_backward, bool exact=False) "
    "-> (Tensor output, Tensor saved, Tensor argmax)"
)
_library.define(
    "conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? scale, "
    "Tensor output, Tensor saved, Tensor argmax, int[] stride, int[] padding, int[] dilation, "
    "int groups, str? activation, int[] pool, bool need_input, bool need_weight, bool need_bias, "
    "bool need_shift, bool need_residual, bool exact=False) -> (Tensor grad_input, "
    "Tensor grad_weight, Tensor grad_bias, Tensor grad_shift, Tensor grad_residual)"
)
_library.define(
    "conv2d_pack_weight(Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool exact=False) -> Tensor"
)
_library.define(
    "max_pool2d_forward(Tensor input, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation, bool ceil_mode) -> (Tensor output, Tensor argmax)"
)
_library.define(
    "max_pool2d_backward(Tensor grad_output, Tensor argmax, int[] input_size, int[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation) -> Tensor"
)


def memory_format_of(input: Tensor) -> torch.memory_format:
    """The layout the ops see in a tensor that is contiguous or channels_last."""
    if input.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last


def conv_output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Spatial size of a convolution's output: the number of places the dilated kernel fits in."""
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )


def pool_output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[int, ...]:
    """Spatial size of a pooled output.

    With ``ceil_mode`` a partial window at the end counts, as in torch, only if it starts inside
    the input or its leading padding.
    """
    if not ceil_mode:
        return conv_output_size(size, kernel, stride, padding, dilation)
    sizes = []
    for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True):
        count = -((d * (k - 1) + 1 - n - 2 * p) // s) + 1
        if (count - 1) * s >= n + p:
            count -= 1
        sizes.append(count)
    return tuple(sizes)


def _conv_shape(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    spatial = conv_output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return (input.shape[0], weight.shape[0], *spatial)


def _image(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of this shape in the memory format of ``like``."""
    return torch.empty(
        shape,
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=memory_format_of(like),
    )


@torch.library.register_fake("fmkernels::conv2d_forward", lib=_library)
def _conv2d_forward_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    packed_weight: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    pool: Sequence[int],
    save_for_backward: bool,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    conv_shape = _conv_shape(input, weight, stride, padding, dilation)
    shape = conv_shape
    if pool:
        pooled = pool_output_size(conv_shape[2:], pool[0:2], pool[2:4], pool[4:6], (1, 1), False)
        shape = (*conv_shape[:2], *pooled)
    saved = argmax = None
    if save_for_backward and needs_preactivation(activation):
        saved = _image(input, conv_shape)
    if save_for_backward and pool:
        argmax = _image(input, shape, torch.uint8)
    return (
        _image(input, shape),
        input.new_empty((0,)) if saved is None else saved,
        input.new_empty((0,), dtype=torch.uint8) if argmax is None else argmax,
    )


@torch.library.register_fake("fmkernels::conv2d_backward", lib=_library)
def _conv2d_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    output: Tensor,
    saved: Tensor,
    argmax: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    pool: Sequence[int],
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_shift: bool,
    need_residual: bool,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    conv_shape = _conv_shape(input, weight, stride, padding, dilation)
    channels = (weight.shape[0],)
    return (
        _image(input, input.shape) if need_input else input.new_empty((0,)),
        input.new_empty(weight.shape if need_weight else (0,)),
        input.new_empty(channels if need_bias else (0,)),
        input.new_empty(channels if need_shift else (0,)),
        _image(input, conv_shape) if need_residual else input.new_empty((0,)),
    )


@torch.library.register_fake("fmkernels::conv2d_pack_weight", lib=_library)
def _conv2d_pack_weight_fake(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    exact: bool = False,
) -> Tensor:
    # The packed size depends on the ISA of the machine, which only the kernel knows.
    size = torch.library.get_ctx().new_dynamic_size(min=64)
    return weight.new_empty((size,), dtype=torch.uint8)


@torch.library.register_fake("fmkernels::max_pool2d_forward", lib=_library)
def _max_pool2d_forward_fake(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    spatial = pool_output_size(input.shape[2:], kernel_size, stride, padding, dilation, ceil_mode)
    shape = (*input.shape[:2], *spatial)
    return _image(input, shape), _image(input, shape, torch.uint8)


@torch.library.register_fake("fmkernels::max_pool2d_backward", lib=_library)
def _max_pool2d_backward_fake(
    grad_output: Tensor,
    argmax: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return _image(grad_output, tuple(input_size))
