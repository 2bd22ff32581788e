"""Convolution with a fused epilogue, and max-pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fmkernels import _checks
from fmkernels._dispatch import UnsupportedError, current_backend, record_decision
from fmkernels.ops import _activations
from fmkernels.ops.conv import autograd
from fmkernels.ops.conv.backends import FUSED_POOL_WINDOWS
from fmkernels.ops.conv.schema import MAX_POOL_AREA, conv_output_size, pool_output_size

IntOrTuple = int | Sequence[int]
Pool = tuple[str, IntOrTuple] | tuple[str, IntOrTuple, IntOrTuple | None, IntOrTuple]

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple | str = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    pool: Pool | None = None,
    backend: str | None = None,
    packed_weight: Tensor | None = None,
) -> Tensor:
    """2-D convolution with a fused epilogue.

    ``y = pool(activation(scale * (conv2d(input, weight) + bias) + shift + residual))``

    Args:
        input: (N, C, H, W) or (C, H, W), float32, bfloat16, float16 or float64. The output has the
            memory format of the input (contiguous or channels_last); any other strides are copied.
        weight: (O, C / groups, KH, KW), dtype and device of ``input``.
        bias: (O) or None.
        stride, dilation: int or pair, at least 1.
        padding: int or pair, at least 0; ``"valid"`` for none; ``"same"`` for an output of the
            input's size (stride 1 only; an odd total puts the extra row and column at the end).
        groups: divides C and O.
        padding_mode: what is padded with: ``"zeros"``, ``"reflect"``, ``"replicate"``,
            ``"circular"``.
        activation: a name as in :func:`fmkernels.functional.linear`, or None.
        scale, shift: (O) or None, for example a folded batch norm. A scale that requires a
            gradient is applied by PyTorch's own operators after the convolution.
        residual: the shape of the convolution's output (before pooling), or None.
        pool: None or ``("max" | "avg", kernel_size, stride, padding)``; stride None or left out is
            kernel_size, padding left out is 0. 2x2 and 3x3 max windows are fused, other max
            windows are pooled by a second kernel; average pooling and windows of more than 256
            elements are left to PyTorch (recorded in ``last_decisions``; refused under an explicit
            native backend).
        backend: an explicit backend never falls back; None takes that of ``use_backend``.
        packed_weight: what ``freeze`` packed from ``weight`` for these arguments.

    Returns:
        (N, O, OH, OW), or without N for a 3-D input. Sums are accumulated in float32 (float64 for
        float64). Differentiable once with respect to every tensor argument.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    return _conv(
        2,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        activation,
        scale,
        shift,
        residual,
        pool,
        backend,
        packed_weight,
    )


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: IntOrTuple | str = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    activation: str | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    pool: Pool | None = None,
    backend: str | None = None,
    packed_weight: Tensor | None = None,
) -> Tensor:
    """1-D convolution with a fused epilogue: :func:`conv2d` on images of height 1.

    ``input`` is (N, C, L) or (C, L), ``weight`` (O, C / groups, K), ``residual`` (N, O, OL); the
    integer arguments are ints or 1-tuples. Everything else, including what is raised, is as in
    :func:`conv2d`; pooling runs as a second kernel.
    """
    return _conv(
        1,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        activation,
        scale,
        shift,
        residual,
        pool,
        backend,
        packed_weight,
    )


def max_pool2d(
    input: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = None,
    padding: IntOrTuple = 0,
    dilation: IntOrTuple = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """2-D max-pooling, as :func:`torch.nn.functional.max_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), float32, bfloat16, float16 or float64.
        kernel_size, stride, dilation: int or pair, at least 1; stride None means kernel_size.
        padding: int or pair, at most half of kernel_size (padding counts as minus infinity).
        ceil_mode: let a last window overhang the end of the input.
        return_indices: also return the int64 position ``row * W + column`` of each maximum.
        backend: an explicit backend never falls back; windows of more than 256 elements are left
            to PyTorch (recorded in ``last_decisions``; refused under an explicit backend).

    Returns:
        (N, C, OH, OW), or without N for a 3-D input, in the input's memory format; NaN wins over
        every number. With ``return_indices`` a pair.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        UnsupportedError: the explicit backend cannot serve the call.
    """
    _checks.tensor("input", input)
    _checks.rank("input", input, 3, 4)
    window = _pool_window(kernel_size, stride, padding, dilation, 2)
    _checks.boolean("ceil_mode", ceil_mode)
    _checks.boolean("return_indices", return_indices)
    _check_image("input", input)
    _check_window("input", input.shape[-2:], window, ceil_mode)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    output, indices = _max_pool2d(batched, *window, ceil_mode, backend, return_indices)
    if input.dim() == 3:
        output = output.squeeze(0)
        indices = None if indices is None else indices.squeeze(0)
    return (output, indices) if return_indices else output


def pool2d(input: Tensor, pool: Pool, *, backend: str | None = None) -> Tensor:
    """The pooling step of :func:`conv2d` on its own: ``pool`` as there, ``input`` (N, C, H, W)."""
    _checks.tensor("input", input)
    _checks.rank("input", input, 4)
    _check_image("input", input)
    kind, window = _parse_pool(pool, 2)
    _check_window("input", input.shape[2:], window, False)
    return _pool2d(input, kind, window, backend)


def _conv(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrTuple,
    padding: IntOrTuple | str,
    dilation: IntOrTuple,
    groups: int,
    padding_mode: str,
    activation: str | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    pool: Pool | None,
    backend: str | None,
    packed_weight: Tensor | None,
) -> Tensor:
    """Check everything, reduce to a batched 2-D convolution, and pool what is left."""
    _checks.tensor("input", input)
    _checks.tensor("weight", weight)
    _checks.same_kind("weight", weight, "input", input)
    _checks.rank("input", input, dims + 1, dims + 2)
    _checks.rank("weight", weight, dims + 2)
    _checks.not_empty("weight", weight)
    _check_image("input", input)
    out_channels = weight.shape[0]
    _check_groups(input.shape[-dims - 1], weight, groups)
    for name, vector in (("bias", bias), ("scale", scale), ("shift", shift)):
        if vector is not None:
            _checks.tensor(name, vector)
            _checks.same_kind(name, vector, "input", input)
            _checks.shape(name, vector, (out_channels,), "one per output channel")
    _checks.choice("activation", activation, _activations.CHOICES)
    _checks.choice("padding_mode", padding_mode, _PADDING_MODES)
    stride = _checks.integers("stride", stride, dims, 1)
    dilation = _checks.integers("dilation", dilation, dims, 1)
    kernel = tuple(weight.shape[2:])
    edges = padding_edges(padding, kernel, stride, dilation)

    unbatched = input.dim() == dims + 1
    if unbatched:
        input = input.unsqueeze(0)
    if padding_mode == "zeros" and all(before == after for before, after in edges):
        padding = tuple(before for before, _ in edges)
    else:
        input = _pad(input, edges, padding_mode)
        padding = (0,) * dims
    output_size = _check_kernel_fits(input.shape[2:], kernel, stride, padding, dilation)
    if residual is not None:
        _checks.tensor("residual", residual)
        _checks.same_kind("residual", residual, "input", input)
        expected = (input.shape[0], out_channels, *output_size)
        _checks.shape(
            "residual", residual, expected[1:] if unbatched else expected, "the conv's output"
        )
        if unbatched:
            residual = residual.unsqueeze(0)
    if packed_weight is not None:
        _checks.packed_weight("packed_weight", packed_weight, weight)
    kind, window = _parse_pool(pool, dims)
    if kind is not None:
        _check_window("pool: the conv's output", output_size, window, False)

    if dims == 1:
        input, weight = input.unsqueeze(2), weight.unsqueeze(2)
        residual = None if residual is None else residual.unsqueeze(2)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
        window = tuple((first, *rest) for first, rest in zip((1, 1, 0, 1), window, strict=True))
    fused = kind == "max" and window[0] in FUSED_POOL_WINDOWS
    output = autograd.conv2d(
        input,
        weight,
        bias,
        scale,
        shift,
        residual,
        packed_weight,
        stride,
        padding,
        dilation,
        groups,
        activation,
        (*window[0], *window[1], *window[2]) if fused else (),
        backend,
    )
    if kind is not None and not fused:
        output = _pool2d(output, kind, window, backend)
    if dims == 1:
        output = output.squeeze(2)
    return output.squeeze(0) if unbatched else output


def _check_image(name: str, input: Tensor) -> None:
    """Only the batch may be empty."""
    if 0 in input.shape[-3:] if input.dim() != 4 else 0 in input.shape[1:]:
        raise ValueError(
            f"{name} may be empty in its batch dimension only, got {_checks.describe(input)}"
        )


def _check_groups(channels: int, weight: Tensor, groups: int) -> None:
    _checks.integer("groups", groups, 1)
    if channels % groups or weight.shape[0] % groups:
        raise ValueError(
            f"groups must divide the {channels} channels of input and the "
            f"{weight.shape[0]} output channels of weight, got {groups}"
        )
    if weight.shape[1] != channels // groups:
        raise ValueError(
            f"weight must have {channels // groups} in its second dimension (the "
            f"{channels} channels of input over groups = {groups}), got {_checks.describe(weight)}"
        )


def padding_edges(
    padding: IntOrTuple | str,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
    """Padding before and after each spatial dimension."""
    if not isinstance(padding, str):
        return tuple((p, p) for p in _checks.integers("padding", padding, len(kernel), 0))
    _checks.choice("padding", padding, ("same", "valid"))
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if any(s != 1 for s in stride):
        raise ValueError(f"padding 'same' needs a stride of 1, got stride {stride}")
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


def _pad(input: Tensor, edges: tuple[tuple[int, int], ...], mode: str) -> Tensor:
    for axis, (before, after) in enumerate(edges):
        # Beyond this, torch's own check would compare overflowed sizes.
        _checks.integer(f"padding[{axis}]", after, 0)
        size = input.shape[2 + axis]
        limit = {"reflect": size - 1, "circular": size}.get(mode)
        if limit is not None and max(before, after) > limit:
            raise ValueError(
                f"padding[{axis}] must be at most {limit} under padding_mode {mode!r} for "
                f"an input of size {size}, got {max(before, after)}"
            )
    flat = [amount for edge in reversed(edges) for amount in edge]
    return F.pad(input, flat, mode="constant" if mode == "zeros" else mode)


def _check_kernel_fits(
    size: Sequence[int],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """Size of the output, every dimension of which is at least 1."""
    for axis, (n, k, p, d) in enumerate(zip(size, kernel, padding, dilation, strict=True)):
        if d * (k - 1) + 1 > n + 2 * p:
            raise ValueError(
                f"weight is too large for input: in spatial dimension {axis} the dilated kernel "
                f"spans {d * (k - 1) + 1}, the padded input {n + 2 * p}"
            )
    return conv_output_size(size, kernel, stride, padding, dilation)


Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _parse_pool(pool: Pool | None, dims: int) -> tuple[str | None, Window]:
    """``(kind, (kernel_size, stride, padding, dilation))``; kind None without pooling."""
    if pool is None:
        return None, ((1,) * dims, (1,) * dims, (0,) * dims, (1,) * dims)
    if not isinstance(pool, (tuple, list)) or not 2 <= len(pool) <= 4:
        raise TypeError(
            "pool must be None or a tuple (kind, kernel_size[, stride[, padding]]), "
            f"got {_checks.describe(pool)}"
        )
    kind, kernel_size, stride, padding = (*pool, None, 0)[:4] if len(pool) < 4 else pool
    if len(pool) == 3:
        stride, padding = pool[2], 0
    _checks.choice("pool[0]", kind, ("max", "avg"))
    return kind, _pool_window(kernel_size, stride, padding, 1, dims, "pool: ")


def _pool_window(
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None,
    padding: IntOrTuple,
    dilation: IntOrTuple,
    dims: int,
    prefix: str = "",
) -> Window:
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


def _check_window(name: str, size: Sequence[int], window: Window, ceil_mode: bool) -> None:
    kernel, stride, padding, dilation = window
    output_size = pool_output_size(size, kernel, stride, padding, dilation, ceil_mode)
    for axis, count in enumerate(output_size):
        # A dilated window may also step over all of a small input, from padding to padding.
        steps_over = padding[axis] > 0 and dilation[axis] > size[axis]
        if count < 1 or steps_over:
            raise ValueError(
                f"{name} is too small to pool in spatial dimension {axis}: size {size[axis]} with "
                f"padding {padding[axis]} and a window spanning "
                f"{dilation[axis] * (kernel[axis] - 1) + 1}"
            )


def _pool2d(input: Tensor, kind: str, window: Window, backend: str | None) -> Tensor:
    if kind == "avg":
        _leave_to_torch("average pooling", "has no average pooling", backend)
        return F.avg_pool2d(input, *window[:3])
    return _max_pool2d(input, *window, False, backend, False)[0]


def _max_pool2d(
    input: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
    backend: str | None,
    return_indices: bool,
) -> tuple[Tensor, Tensor | None]:
    if kernel_size[0] * kernel_size[1] > MAX_POOL_AREA:
        reason = f"a window holds at most {MAX_POOL_AREA} elements"
        _leave_to_torch("max_pool2d", reason, backend)
        return F.max_pool2d(
            input, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True
        )
    output, argmax = autograd.max_pool2d(
        input, kernel_size, stride, padding, dilation, ceil_mode, backend
    )
    if not return_indices:
        return output, None
    return output, autograd.flat_indices(
        argmax, input.shape[3], kernel_size, stride, padding, dilation
    )


def check_pool(pool: Pool | None, dims: int) -> None:
    """Raise TypeError or ValueError, naming ``pool``, unless it is a valid pool argument."""
    _parse_pool(pool, dims)


def _leave_to_torch(op: str, reason: str, backend: str | None) -> None:
    """Record that PyTorch serves ``op``, or refuse where an explicit backend rules that out."""
    requested = current_backend() if backend is None else backend
    if requested not in ("auto", "reference"):
        raise UnsupportedError(
            f"{op}: backend {requested!r} cannot serve this call: {reason}\n  reference: supported"
        )
    record_decision(op, "reference", (("cpu", reason),))
