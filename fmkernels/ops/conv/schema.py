"""Schemas and fake kernels of the convolution ops, for one, two and three spatial axes.

conv_forward computes
``pool(activation(scale * (conv(input, weight) + bias) + shift + residual))``.

* ``input`` (N, C, *spatial) is contiguous or channels last (see geometry.py); ``weight`` is
  contiguous, (O, C / groups, *kernel), or (C, O / groups, *kernel) if ``transposed``; ``bias`` is
  (O); ``residual`` has the shape of the convolution's output. All share one dtype.
* ``weight`` may have any strides in a conv_forward that reads ``packed_weight`` in its place: with
  more than one tap, not ``exact``, and with a pool of strides up to PACKED_POOL_STRIDE.
* ``scale`` and ``shift`` (O) are float32, or float64 if the others are.
* ``output``, ``residual`` and everything else that is shaped like an image has ``input``'s layout.
* The integers and names are the fields of geometry.ConvOptions, which documents them.
* ``saved`` is the pre-activation (shaped like the convolution's output), only if
  ``save_for_backward`` and the activation is neither None nor relu.
* ``argmax`` (uint8), only if ``save_for_backward``: for a max-pool, shaped like ``output``, the
  position of the first maximum within its window, counted in the order of the window's elements;
  where the activation is relu and that maximum is zero it is RELU_ZERO instead, and no element
  gets a gradient. For an average-pool after relu, shaped like the convolution's output, 1 where
  relu let the value through, else 0. The backward then reads ``output`` only for a relu without
  a pool.

``exact`` forbids algorithms with a larger error than direct summation (Winograd). A weight packed
without it may be passed to a forward with it: the forward then packs anew if it has to.

A transposed convolution of a stride above 1 takes no pool.

conv_inference is the output of conv_forward alone, with the options in one string, which takes a
small call much less time to pass: :func:`options_text` makes it of ConvOptions.

conv_chain is several conv_forward over two axes that read one another's outputs, without anything
that only training wants; it returns the last one's. ``weights`` has an entry per layer,
``vectors`` four, layer after layer: bias, scale, shift and packed weight. ``options`` has, layer
after layer, what conv_inference takes, followed by which values are the layer's input and
residual: 0 ``input``, i the output of the i-th layer, -1 none; :func:`chain_text` makes it.
``residual`` is the last layer's, if that has no other.

To pass all that takes longer than a small layer. conv_chain_keep checks and keeps it, until
conv_chain_drop, under a number for conv_chain_run. Of the tensors, only the biases may be given
other memory after that.

conv_statistics is conv_forward without an epilogue, together with the mean and the biased variance
of each channel of the output, as it is stored, over batch and pixels: (O), dtypes as ``scale``.
They are gathered while the blocks of the output are in the cache. Not for transposed convolutions.

conv_backward returns gradients of the inputs' dtypes and shapes. It reads ``bias`` only for
``need_scale``. An output that is not asked for is an empty tensor of shape (0,).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fmkernels.ops._activations import needs_preactivation, opmath_dtype
from fmkernels.ops.conv.geometry import (
    ConvOptions,
    conv_shape,
    conv_size,
    is_channels_last,
    new_image,
    pooled_shape,
)

PACKED_POOL_STRIDE = 4  # csrc/cpu/conv.h: kWinogradMaxPoolStride
RELU_ZERO = 255  # no position: a fused window holds at most 9 elements

_OPTIONS = (
    "int[] stride, int[] padding, int[] dilation, int groups, bool transposed, str padding_mode, "
    "str? activation, str? pool, int[] window"
)

_library = torch.library.Library("fmkernels", "FRAGMENT")
_library.define(
    "conv_forward(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    f"Tensor? residual, Tensor? packed_weight, {_OPTIONS}, bool save_for_backward, "
    "bool exact=False) -> (Tensor output, Tensor saved, Tensor argmax)"
)
_library.define(
    "conv_inference(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "Tensor? residual, Tensor? packed_weight, str options, bool exact=False) -> Tensor"
)
_library.define(
    "conv_chain(Tensor input, Tensor[] weights, Tensor?[] vectors, Tensor? residual, "
    "str options, bool exact=False) -> Tensor"
)
_library.define(
    "conv_chain_keep(Tensor[] weights, Tensor?[] vectors, str options, bool exact=False) -> int"
)
_library.define("conv_chain_run(Tensor input, int chain, Tensor? residual) -> Tensor")
_library.define("conv_chain_drop(int chain) -> ()")
_library.define(
    "conv_statistics(Tensor input, Tensor weight, Tensor? bias, Tensor? packed_weight, "
    "int[] stride, int[] padding, int[] dilation, int groups, str padding_mode, "
    "bool exact=False) -> (Tensor output, Tensor mean, Tensor variance)"
)
_library.define(
    "conv_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, Tensor? scale, "
    f"Tensor output, Tensor saved, Tensor argmax, {_OPTIONS}, bool need_input, bool need_weight, "
    "bool need_bias, bool need_scale, bool need_shift, bool need_residual, bool exact=False) -> "
    "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_scale, "
    "Tensor grad_shift, Tensor grad_residual)"
)
_library.define(
    "conv_pack_weight(Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool transposed, str padding_mode, bool exact=False) -> Tensor"
)


@torch.library.register_fake("fmkernels::conv_forward", lib=_library)
def _conv_forward_fake(
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
    transposed: bool,
    padding_mode: str,
    activation: str | None,
    pool: str | None,
    window: Sequence[int],
    save_for_backward: bool,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    options = ConvOptions(stride, padding, dilation, groups, transposed)
    shape = conv_shape(input, weight, options)
    output_shape = pooled_shape(shape, window)
    channels_last = is_channels_last(input)
    saved = argmax = None
    if save_for_backward and needs_preactivation(activation):
        saved = new_image(input, shape, channels_last)
    if save_for_backward and pool == "max":
        argmax = new_image(input, output_shape, channels_last, torch.uint8)
    if save_for_backward and pool == "avg" and activation == "relu":
        argmax = new_image(input, shape, channels_last, torch.uint8)
    return (
        new_image(input, output_shape, channels_last),
        input.new_empty((0,)) if saved is None else saved,
        input.new_empty((0,), dtype=torch.uint8) if argmax is None else argmax,
    )


@lru_cache(maxsize=1024)
def options_text(options: ConvOptions) -> str:
    """The fields between semicolons: integers with commas, None and nothing are empty."""
    fields = (
        ",".join(map(str, field)) if isinstance(field, tuple) else field for field in options
    )
    return ";".join("" if f is None else f if isinstance(f, str) else str(int(f)) for f in fields)


def _options_from(fields: Sequence[str]) -> ConvOptions:
    def integers(field: str) -> tuple[int, ...]:
        return tuple(map(int, field.split(","))) if field else ()

    stride, padding, dilation, groups, transposed, mode, activation, pool, window = fields
    return ConvOptions(
        integers(stride),
        integers(padding),
        integers(dilation),
        int(groups),
        bool(int(transposed)),
        mode,
        activation or None,
        pool or None,
        integers(window),
    )


@torch.library.register_fake("fmkernels::conv_inference", lib=_library)
def _conv_inference_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    packed_weight: Tensor | None,
    options: str,
    exact: bool = False,
) -> Tensor:
    parsed = _options_from(options.split(";"))
    shape = pooled_shape(conv_shape(input, weight, parsed), parsed.window)
    return new_image(input, shape, is_channels_last(input))


def chain_text(layers: Sequence[ConvOptions], reads: Sequence[tuple[int, int]]) -> str:
    """conv_chain's ``options``; ``reads``: input and residual of each layer."""
    return ";".join(
        f"{options_text(options)};{input};{residual}"
        for options, (input, residual) in zip(layers, reads, strict=True)
    )


@torch.library.register_fake("fmkernels::conv_chain", lib=_library)
def _conv_chain_fake(
    input: Tensor,
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor | None],
    residual: Tensor | None,
    options: str,
    exact: bool = False,
) -> Tensor:
    shapes = [tuple(input.shape)]
    fields, count = options.split(";"), len(ConvOptions._fields)
    for i, weight in enumerate(weights):
        layer = fields[i * (count + 2) : (i + 1) * (count + 2)]
        o = _options_from(layer[:count])
        batch, _, *size = shapes[int(layer[count])]
        spatial = conv_size(size, weight.shape[2:], o.stride, o.padding, o.dilation)
        shapes.append(pooled_shape((batch, weight.shape[0], *spatial), o.window))
    return new_image(input, shapes[-1], is_channels_last(input))


@torch.library.register_fake("fmkernels::conv_statistics", lib=_library)
def _conv_statistics_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed_weight: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = conv_shape(input, weight, ConvOptions(stride, padding, dilation, groups))
    opmath = opmath_dtype(input.dtype)
    return (
        new_image(input, shape, is_channels_last(input)),
        input.new_empty((shape[1],), dtype=opmath),
        input.new_empty((shape[1],), dtype=opmath),
    )


@torch.library.register_fake("fmkernels::conv_backward", lib=_library)
def _conv_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    output: Tensor,
    saved: Tensor,
    argmax: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    padding_mode: str,
    activation: str | None,
    pool: str | None,
    window: Sequence[int],
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_scale: bool,
    need_shift: bool,
    need_residual: bool,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = ConvOptions(stride, padding, dilation, groups, transposed)
    shape = conv_shape(input, weight, options)
    channels_last = is_channels_last(input)
    opmath = opmath_dtype(input.dtype)

    def vector(wanted: bool, dtype: torch.dtype) -> Tensor:
        return input.new_empty((shape[1] if wanted else 0,), dtype=dtype)

    return (
        new_image(input, input.shape, channels_last) if need_input else input.new_empty((0,)),
        input.new_empty(weight.shape if need_weight else (0,)),
        vector(need_bias, input.dtype),
        vector(need_scale, opmath),
        vector(need_shift, opmath),
        new_image(input, shape, channels_last) if need_residual else input.new_empty((0,)),
    )


@torch.library.register_fake("fmkernels::conv_pack_weight", lib=_library)
def _conv_pack_weight_fake(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
    padding_mode: str,
    exact: bool = False,
) -> Tensor:
    # The packed size depends on the ISA of the machine, which only the kernel knows.
    size = torch.library.get_ctx().new_dynamic_size(min=64)
    return weight.new_empty((size,), dtype=torch.uint8)
