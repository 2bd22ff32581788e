"""The backward of the convolution ops as Triton kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from fmkernels.ops import _activations
from fmkernels.ops._triton.launch import (
    Config,
    accumulator_dtype,
    architecture,
    dot_precision,
    index_dtype,
    launch,
    multiprocessors,
    split_count,
)
from fmkernels.ops._triton.splits import sum_splits
from fmkernels.ops.conv.geometry import (
    ConvOptions,
    conv_shape,
    edges_of,
    in_layout,
    is_channels_last,
    new_image,
    window_parts,
)
from fmkernels.ops.conv.triton_configs import BACKWARD_CONFIGS, DEPTHWISE_CONFIGS, EPILOGUE_CONFIGS
from fmkernels.ops.conv.triton_depthwise import conv_depthwise_bwd_kernel
from fmkernels.ops.conv.triton_forward import launch_convolution
from fmkernels.ops.conv.triton_gemm import (
    conv_bwd_kernel,
)
from fmkernels.ops.conv.triton_pool import conv_bwd_epilogue_kernel
from fmkernels.ops.conv.triton_problem import (
    Problem,
    config_family,
    make_problem,
    row_grid,
    tap_stride,
    three,
    weight_for_kernels,
    weight_strides,
)


def backward_config(tensor: Tensor, precision: str, channels: int) -> Config:
    """The launch configuration of :func:`conv_bwd_kernel`, by the smaller side of a group."""
    name = config_family(tensor, precision)
    if not name:
        name = "groups" if channels < 32 else "narrow" if channels < 64 else "large"
    return BACKWARD_CONFIGS[architecture()][name]


def conv_backward(
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
    """See schema.py.

    Three launches: the epilogue's backward with the sums over pixels, both gradients, and the sum
    of the parts of a split reduction. Packing the weight is another, see :func:`conv_forward`;
    the gradient of the scale needs the convolution again.
    """
    options = ConvOptions(
        tuple(stride), tuple(padding), tuple(dilation), groups, transposed, padding_mode,
        activation, pool, tuple(window),
    )  # fmt: skip
    problem = make_problem(input, weight, options)
    conv = None
    if need_scale:
        conv = new_image(input, conv_shape(input, weight, options), is_channels_last(input))
        launch_convolution(
            problem, input, weight, bias, None, None, None, conv, None, None, None, None, exact
        )
    operand = None
    if activation is not None and not (pool and activation == "relu"):
        operand = output if activation == "relu" else saved
    grad_pre, grad_conv, shift_sums, scale_sums = _epilogue_backward(
        grad_output, argmax if argmax.numel() else None, operand, conv, scale, input, options,
        tuple(problem.y_size), need_input or need_weight, need_residual,
        need_bias or need_shift, need_scale,
    )  # fmt: skip
    absent = input.new_empty
    opmath = _activations.opmath_dtype(input.dtype)
    channels = problem.y_channels * groups
    sums = None
    if need_bias or need_shift:
        shared = need_shift or scale is not None
        sums = input.new_empty((channels,), dtype=opmath if shared else input.dtype)
    grad_input, grad_weight = _matrix_gradients(
        problem, grad_conv, input, weight, need_input, need_weight, shift_sums, sums, exact
    )
    grad_bias = None
    if need_bias:
        grad_bias = sums if scale is None else sums * scale
        grad_bias = grad_bias.to(input.dtype, copy=need_shift)  # two results share no memory
    return (
        absent(0) if grad_input is None else grad_input,
        absent(0) if grad_weight is None else grad_weight,
        absent(0) if grad_bias is None else grad_bias,
        scale_sums.sum(0) if need_scale else absent(0, dtype=opmath),
        sums if need_shift else absent(0, dtype=opmath),
        grad_pre if need_residual else absent(0),
    )


def _epilogue_backward(
    grad_output: Tensor,
    argmax: Tensor | None,
    operand: Tensor | None,
    conv: Tensor | None,
    scale: Tensor | None,
    input: Tensor,
    options: ConvOptions,
    size: tuple[int, ...],
    need_conv: bool,
    need_pre: bool,
    need_sums: bool,
    need_scale: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients before the activation and of the convolution, and sums over pixels, in parts."""
    unchanged = options.pool is None and options.activation is None
    if unchanged and scale is None and not need_sums:
        return (grad_output.clone() if need_pre else None), grad_output, None, None
    channels_last = is_channels_last(input)
    batch, channels = input.shape[0], grad_output.shape[1]
    shape = (batch, channels, *size[3 - len(options.stride) :])
    grad_pre = new_image(input, shape, channels_last) if need_pre else None
    grad_conv = grad_output
    write_conv = need_conv and not (unchanged and scale is None)
    if write_conv and scale is None and grad_pre is not None:
        grad_conv, write_conv = grad_pre, False
    elif write_conv:
        grad_conv = new_image(input, shape, channels_last)
    case = "double" if input.dtype is torch.float64 else "rows"
    setting = EPILOGUE_CONFIGS[architecture()][case]
    row_programs, column_programs = row_grid(setting, batch, size, channels)
    # Few enough row programs that their partial sums are quickly added, enough to fill the device.
    wanted = max(1, 8 * multiprocessors(input) // column_programs)
    blocks = max(1, triton.cdiv(row_programs, wanted)) if need_sums or need_scale else 1
    row_programs = triton.cdiv(row_programs, blocks)
    opmath = _activations.opmath_dtype(input.dtype)
    parts = [
        input.new_empty((row_programs, channels), dtype=opmath) if need else None
        for need in (need_sums, need_scale)
    ]
    kernel, stride, padding = ((1,) * 3, (1,) * 3, (0,) * 3)
    if options.pool:
        kernel, stride, padding = window_parts(options.window)
    launch(
        conv_bwd_epilogue_kernel,
        (row_programs, column_programs),
        setting,
        grad_output,
        argmax,
        operand,
        conv,
        scale,
        grad_pre,
        grad_conv if write_conv else None,
        *parts,
        batch,
        channels,
        *size,
        *three(grad_output.shape[2:]),
        *three(padding, 0),
        0,
        blocks,
        KERNEL=three(kernel),
        STRIDE=three(stride),
        DILATION=(1, 1, 1),
        POOL=options.pool,
        COUNT_PADDING=True,
        ACTIVATION=None if operand is None else options.activation,
        CHANNELS_LAST=channels_last,
        ACC=accumulator_dtype(input),
        INDEX=index_dtype(grad_output, grad_conv, grad_pre),
    )
    return grad_pre, grad_conv, *parts


def _matrix_gradients(
    problem: Problem,
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    need_input: bool,
    need_weight: bool,
    sum_parts: Tensor | None,
    sums: Tensor | None,
    exact: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and weight; adds up ``sum_parts`` into ``sums`` along the way."""
    channels_last = is_channels_last(input)
    folded = problem.options.padding_mode != "zeros" and any(problem.options.padding)
    shape = list(input.shape)
    if folded:
        for axis, edges in enumerate(edges_of(problem.options.padding)):
            shape[2 + axis] += sum(edges)
    grad_input = new_image(input, shape, channels_last) if need_input else None
    # In the weight's own layout, which is what the optimizer's state and autograd expect.
    last = is_channels_last(weight) and not problem.depthwise
    grad_weight = new_image(weight, weight.shape, last) if need_weight else None
    if problem.batch == 0:
        for zeros in (grad_weight, sums):
            if zeros is not None:
                zeros.zero_()
        return grad_input, grad_weight
    parts = None
    if need_input or need_weight:
        operands = (problem, grad, input, weight, grad_input, grad_weight, folded)
        if problem.depthwise:
            parts = _launch_depthwise(*operands)
        else:
            parts = _launch_backward(*operands, exact)
    if parts is not None:
        sum_splits(parts, grad_weight, sum_parts, sums)
    elif sum_parts is not None:
        sum_splits(sum_parts, sums, None, None)
    if folded and need_input:
        grad_input = _fold_padding(grad_input, input, problem.options)
    return grad_input, grad_weight


def _launch_backward(
    problem: Problem,
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    folded: bool,
    exact: bool,
) -> Tensor | None:
    """Both gradients in one launch; returns the parts of the weight's, if it was split."""
    precision = dot_precision(input, "conv", exact)
    channels = min(problem.x_channels, problem.y_channels)
    setting = backward_config(input, precision, channels)
    block_m, block_n, block_k = setting["BLOCK_M"], setting["BLOCK_N"], setting["BLOCK_K"]
    transposed = problem.options.transposed
    # Where the padding repeats the input, the gradient of the padded input is made first.
    x_size, padding = problem.x_size, problem.padding
    if folded and grad_input is not None:
        x_size = three(grad_input.shape[2:])
    q_size = x_size if transposed else problem.per_phase(x_size)
    dx_programs = dw_programs = 0
    if grad_input is not None:
        weight = weight_for_kernels(weight)
        dx_programs = triton.cdiv(problem.batch * math.prod(q_size), block_m) * problem.groups
        dx_programs *= triton.cdiv(problem.x_channels, block_n)
        dx_programs *= 1 if transposed else problem.phases
    parts, dw, rows_per_split = None, grad_weight, block_k
    if grad_weight is not None:
        rows = problem.batch * math.prod(problem.x_size if transposed else problem.y_size)
        a, b = problem.y_channels, problem.x_channels
        a, b = (b, a) if transposed else (a, b)
        tiles = triton.cdiv(a, block_m) * triton.cdiv(b, block_n) * problem.groups
        tiles *= math.prod(problem.kernel)
        splits = split_count(input, tiles, triton.cdiv(rows, block_k))
        rows_per_split = triton.cdiv(triton.cdiv(rows, splits), block_k) * block_k
        splits = triton.cdiv(rows, rows_per_split)
        dw_programs = tiles * splits
        if splits > 1:
            opmath = _activations.opmath_dtype(input.dtype)
            parts = dw = weight.new_empty((splits, *grad_weight.shape), dtype=opmath)
    dw_strides = (0, 0) if dw is None else (grad_weight.stride(1), tap_stride(grad_weight))
    arguments = (
        problem.batch, *x_size, *problem.y_size, *q_size, problem.x_channels, problem.y_channels,
        problem.groups, *weight_strides(weight, problem), *dw_strides,
    )  # fmt: skip
    constants = {
        **problem.constants(),
        "CHANNELS_LAST": is_channels_last(input),
        "PRECISION": precision,
        "ACC": accumulator_dtype(input),
        "INDEX": index_dtype(input, grad, grad_input),
    }
    if not folded:
        launch(
            conv_bwd_kernel, (dx_programs + dw_programs,), setting, grad, input, weight,
            grad_input, dw, *arguments, *padding, dx_programs, rows_per_split, **constants,
        )  # fmt: skip
        return parts
    # dx is that of the padded input, dw reads the input itself: sizes and padding differ.
    if grad_input is not None:
        launch(
            conv_bwd_kernel, (dx_programs,), setting, grad, input, weight, grad_input, None,
            *arguments, 0, 0, 0, dx_programs, rows_per_split, **constants,
        )  # fmt: skip
    if grad_weight is not None:
        arguments = (problem.batch, *problem.x_size, *arguments[4:])
        launch(
            conv_bwd_kernel, (dw_programs,), setting, grad, input, weight, None, dw,
            *arguments, *padding, 0, rows_per_split, **constants,
        )  # fmt: skip
    return parts


def _launch_depthwise(
    problem: Problem,
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    folded: bool,
) -> Tensor | None:
    """As :func:`_launch_backward`, for depthwise convolutions."""
    setting = DEPTHWISE_CONFIGS[architecture()]["rows"]
    x_size = problem.x_size if grad_input is None else three(grad_input.shape[2:])
    dx_programs = dw_programs = 0
    if grad_input is not None:
        dx_programs = math.prod(row_grid(setting, problem.batch, x_size, input.shape[1]))
    parts, dw, blocks = None, grad_weight, 1
    if grad_weight is not None:
        rows = problem.x_size if problem.options.transposed else problem.y_size
        channels = max(input.shape[1], grad.shape[1])
        row_blocks, columns = row_grid(setting, problem.batch, rows, channels)
        programs = columns * math.prod(problem.kernel)
        blocks = triton.cdiv(row_blocks, split_count(input, programs, row_blocks))
        splits = triton.cdiv(row_blocks, blocks)
        dw_programs = programs * splits
        if splits > 1:
            opmath = _activations.opmath_dtype(input.dtype)
            parts = dw = grad_weight.new_empty((splits, *grad_weight.shape), dtype=opmath)
    constants = problem.constants()
    del constants["STEP"]

    def run(
        grad_input: Tensor | None,
        dw: Tensor | None,
        x_size: Sequence[int],
        padding: Sequence[int],
        programs: tuple[int, int],
    ) -> None:
        launch(
            conv_depthwise_bwd_kernel,
            (sum(programs),),
            setting,
            grad,
            input,
            weight.contiguous(),
            grad_input,
            dw,
            problem.batch,
            input.shape[1],
            grad.shape[1],
            *x_size,
            *problem.y_size,
            *padding,
            programs[0],
            blocks,
            MULTIPLIER=problem.x_channels if problem.y_channels == 1 else 1,
            FAN_IN=problem.y_channels,
            CHANNELS_LAST=is_channels_last(input),
            ACC=accumulator_dtype(input),
            INDEX=index_dtype(grad, input, grad_input),
            **constants,
        )

    if not folded:
        run(grad_input, dw, x_size, problem.padding, (dx_programs, dw_programs))
        return parts
    # dx is that of the padded input, dw reads the input itself: sizes and padding differ.
    if grad_input is not None:
        run(grad_input, None, x_size, (0, 0, 0), (dx_programs, 0))
    if grad_weight is not None:
        run(None, dw, problem.x_size, problem.padding, (0, dw_programs))
    return parts


def _fold_padding(grad: Tensor, input: Tensor, options: ConvOptions) -> Tensor:
    """Gradient of the input from that of the padded input: each copy adds to its original."""
    grad = grad.to(_activations.opmath_dtype(input.dtype))
    for axis, (before, after) in enumerate(edges_of(options.padding)):
        dim, size = 2 + axis, input.shape[2 + axis]
        front, back = grad.narrow(dim, 0, before), grad.narrow(dim, before + size, after)
        grad = grad.narrow(dim, before, size).clone()
        if options.padding_mode == "replicate":
            grad.narrow(dim, 0, 1).add_(front.sum(dim, keepdim=True))
            grad.narrow(dim, size - 1, 1).add_(back.sum(dim, keepdim=True))
        elif options.padding_mode == "circular":
            grad.narrow(dim, size - before, before).add_(front)
            grad.narrow(dim, 0, after).add_(back)
        else:
            grad.narrow(dim, 1, before).add_(front.flip(dim))
            grad.narrow(dim, size - 1 - after, after).add_(back.flip(dim))
    return in_layout(grad.to(input.dtype), is_channels_last(input))
