"""Checks and normal forms of the convolutions' and poolings' arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fmkernels import _checks
from fmkernels.ops._activations import opmath_dtype
from fmkernels.ops.conv.geometry import PADDING_MODES, conv_size, edges_of, pool_size

IntOrTuple = int | Sequence[int]
Pool = tuple[str, IntOrTuple] | tuple[str, IntOrTuple, IntOrTuple | None, IntOrTuple]

# kernel_size, stride, padding, dilation
Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def check_image(name: str, input: Tensor, dims: int) -> None:
    """``input`` is (N, C, *spatial) or (C, *spatial); only the batch may be empty."""
    _checks.tensor(name, input)
    check_image_shape(name, input.shape, dims)


def check_image_shape(name: str, shape: Sequence[int], dims: int) -> None:
    """The same of the shape alone."""
    if len(shape) not in (dims + 1, dims + 2):
        raise ValueError(
            f"{name} must have {dims + 1} or {dims + 2} dimensions, got shape {tuple(shape)}"
        )
    if 0 in shape[-dims - 1 :]:
        raise ValueError(
            f"{name} may be empty in its batch dimension only, got shape {tuple(shape)}"
        )


def check_weight_shape(
    shape: Sequence[int], dims: int, channels: int, groups: int, transposed: bool
) -> None:
    """A weight of this shape fits an image of that many channels."""
    if len(shape) != dims + 2:
        raise ValueError(f"weight must have {dims + 2} dimensions, got shape {tuple(shape)}")
    if 0 in shape:
        raise ValueError(f"weight must not be empty, got shape {tuple(shape)}")
    _checks.integer("groups", groups, 1)
    if transposed:
        if channels % groups or shape[0] != channels:
            raise ValueError(
                f"weight must have the {channels} channels of input in its first dimension, and "
                f"groups must divide them, got shape {tuple(shape)} and groups = {groups}"
            )
        return
    if channels % groups or shape[0] % groups:
        raise ValueError(
            f"groups must divide the {channels} channels of input and the "
            f"{shape[0]} output channels of weight, got {groups}"
        )
    if shape[1] != channels // groups:
        raise ValueError(
            f"weight must have {channels // groups} in its second dimension (the {channels} "
            f"channels of input over groups = {groups}), got shape {tuple(shape)}"
        )


def check_vectors(input: Tensor, channels: int, **vectors: Tensor | None) -> None:
    """bias, scale and shift: one number per output channel.

    Scale and shift may also have the dtype that ``input`` is accumulated in.
    """
    for name, vector in vectors.items():
        if vector is None:
            continue
        _checks.tensor(name, vector)
        wide = name != "bias" and vector.dtype == opmath_dtype(input.dtype)
        if not (wide and vector.device == input.device):
            _checks.same_kind(name, vector, "input", input)
        _checks.shape(name, vector, (channels,), "one per output channel")


def padding_edges(
    padding: IntOrTuple | str,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """What is padded before and after each spatial dimension in turn."""
    if not isinstance(padding, str):
        pads = _checks.integers("padding", padding, len(kernel), 0)
        return tuple(p for p in pads for _ in range(2))
    _checks.choice("padding", padding, ("same", "valid"))
    if padding == "valid":
        return (0, 0) * len(kernel)
    if any(s != 1 for s in stride):
        raise ValueError(f"padding 'same' needs a stride of 1, got stride {stride}")
    edges = []
    for axis, (k, d) in enumerate(zip(kernel, dilation, strict=True)):
        total = d * (k - 1)
        _checks.integer(f"padding[{axis}]", total, 0)
        edges += [total // 2, total - total // 2]
    return tuple(edges)


def check_padding_mode(mode: str, size: Sequence[int], padding: tuple[int, ...]) -> None:
    """``mode`` is known, and the image is large enough for it."""
    _checks.choice("padding_mode", mode, PADDING_MODES)
    for axis, edge in enumerate(edges_of(padding)):
        limit = {"reflect": size[axis] - 1, "circular": size[axis]}.get(mode)
        if limit is not None and max(edge) > limit:
            raise ValueError(
                f"padding[{axis}] must be at most {limit} under padding_mode {mode!r} for "
                f"an input of size {size[axis]}, got {max(edge)}"
            )


def check_kernel_fits(
    size: Sequence[int],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """Size of a convolution's output, every dimension of which is at least 1."""
    axes = zip(size, kernel, edges_of(padding), dilation, strict=True)
    for axis, (n, k, (before, after), d) in enumerate(axes):
        if d * (k - 1) + 1 > n + before + after:
            raise ValueError(
                f"weight is too large for input: in spatial dimension {axis} the dilated kernel "
                f"spans {d * (k - 1) + 1}, the padded input {n + before + after}"
            )
    return conv_size(size, kernel, stride, padding, dilation)


def transposed_edges(
    padding: IntOrTuple,
    output_padding: IntOrTuple,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """What a transposed convolution cuts away before and after each dimension in turn."""
    pads = _checks.integers("padding", padding, len(stride), 0)
    extra = _checks.integers("output_padding", output_padding, len(stride), 0)
    for axis, (e, s, d) in enumerate(zip(extra, stride, dilation, strict=True)):
        if e >= max(s, d):
            raise ValueError(
                f"output_padding[{axis}] must be smaller than stride or dilation "
                f"({s} and {d}), got {e}"
            )
    return tuple(edge for p, e in zip(pads, extra, strict=True) for edge in (p, p - e))


def check_transposed_size(
    size: Sequence[int],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """Size of a transposed convolution's output, every dimension of which is at least 1."""
    output = conv_size(size, kernel, stride, padding, dilation, transposed=True)
    for axis, count in enumerate(output):
        if not 1 <= count <= _checks.MAX_INT:
            raise ValueError(
                f"padding leaves an output of size {count} in spatial dimension {axis} for an "
                f"input of size {size[axis]}"
            )
    return output


def parse_pool(pool: Pool | None, dims: int) -> tuple[str | None, Window | tuple[()]]:
    """``(kind, (kernel_size, stride, padding, dilation))``; ``(None, ())`` without pooling."""
    if pool is None:
        return None, ()
    if not isinstance(pool, (tuple, list)) or not 2 <= len(pool) <= 4:
        raise TypeError(
            "pool must be None or a tuple (kind, kernel_size[, stride[, padding]]), "
            f"got {_checks.describe(pool)}"
        )
    kind, kernel_size, stride, padding = (*pool, None, 0)[:4] if len(pool) < 4 else pool
    if len(pool) == 3:
        stride, padding = pool[2], 0
    _checks.choice("pool[0]", kind, ("max", "avg"))
    return kind, pool_window(kernel_size, stride, padding, 1, dims, "pool: ")


def pool_window(
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None,
    padding: IntOrTuple,
    dilation: IntOrTuple,
    dims: int,
    prefix: str = "",
) -> Window:
    """A pooling window from torch's arguments."""
    kernel = _checks.integers(f"{prefix}kernel_size", kernel_size, dims, 1)
    # torch also takes an empty list for "the kernel size".
    no_stride = stride is None or (isinstance(stride, (tuple, list)) and not stride)
    steps = kernel if no_stride else _checks.integers(f"{prefix}stride", stride, dims, 1)
    dilations = _checks.integers(f"{prefix}dilation", dilation, dims, 1)
    pads = _checks.integers(f"{prefix}padding", padding, dims, 0)
    for axis in range(dims):
        if pads[axis] > kernel[axis] // 2:
            raise ValueError(
                f"{prefix}padding[{axis}] must be at most half of kernel_size "
                f"({kernel[axis] // 2}), got {pads[axis]}"
            )
    return kernel, steps, pads, dilations


def check_window(name: str, size: Sequence[int], window: Window, ceil_mode: bool) -> None:
    """Every output of the pool sees something of an image of this size."""
    kernel, stride, padding, dilation = window
    output_size = pool_size(size, kernel, stride, padding, dilation, ceil_mode)
    for axis, count in enumerate(output_size):
        # A dilated window may also step over all of a small input, from padding to padding.
        steps_over = padding[axis] > 0 and dilation[axis] > size[axis]
        if count < 1 or steps_over:
            raise ValueError(
                f"{name} is too small to pool in spatial dimension {axis}: size {size[axis]} with "
                f"padding {padding[axis]} and a window spanning "
                f"{dilation[axis] * (kernel[axis] - 1) + 1}"
            )


def check_pool(pool: Pool | None, dims: int) -> None:
    """Raise TypeError or ValueError, naming ``pool``, unless it is a valid pool argument."""
    parse_pool(pool, dims)
