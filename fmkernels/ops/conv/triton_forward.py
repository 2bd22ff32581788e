"""The forward of the convolution ops as Triton kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
    power_of_two,
    tuned,
)
from fmkernels.ops.conv.geometry import (
    ConvOptions,
    conv_shape,
    is_channels_last,
    new_image,
    pooled_shape,
    window_parts,
)
from fmkernels.ops.conv.triton_configs import DEPTHWISE_CONFIGS, GATHER_CONFIGS
from fmkernels.ops.conv.triton_depthwise import (
    conv_depthwise_fwd_kernel,
)
from fmkernels.ops.conv.triton_gemm import (
    conv_fwd_kernel,
)
from fmkernels.ops.conv.triton_pack import unpack_weight
from fmkernels.ops.conv.triton_pools import launch_pool
from fmkernels.ops.conv.triton_problem import (
    Problem,
    config_family,
    make_problem,
    row_grid,
    weight_for_kernels,
    weight_strides,
)


def gather_config(tensor: Tensor, precision: str, reduced: int, columns: int) -> Config:
    """The launch configuration of :func:`conv_fwd_kernel`, by the channels of a group."""
    name = config_family(tensor, precision)
    if not name and reduced < 32:
        name = "groups" if columns < 32 else "stem"
    elif not name:
        name = "narrow" if columns < 64 else "large"
    return GATHER_CONFIGS[architecture()][name]


def _tiles_whole_windows(problem: Problem) -> bool:
    """Whether the pool runs in the convolution's epilogue: 2x2 windows without remainder."""
    o = problem.options
    if o.pool is None or o.transposed or problem.depthwise or len(o.stride) != 2:
        return False
    even = problem.y_size[1] % 2 == 0 and problem.y_size[2] % 2 == 0
    return even and tuple(o.window) == (2, 2, 2, 2, 0, 0)


def conv_forward(
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
    """See schema.py.

    One launch; another packs a weight that is neither packed, nor channels_last, nor 1x1, and
    another pools where the pool does not fit the tiles of the convolution.
    """
    options = ConvOptions(
        tuple(stride), tuple(padding), tuple(dilation), groups, transposed, padding_mode,
        activation, pool, tuple(window),
    )  # fmt: skip
    problem = make_problem(input, weight, options)
    channels_last = is_channels_last(input)
    shape = conv_shape(input, weight, options)
    fused_pool = pool if _tiles_whole_windows(problem) else None
    output = new_image(input, pooled_shape(shape, window) if fused_pool else shape, channels_last)
    saved = input.new_empty((0,))
    argmax = input.new_empty((0,), dtype=torch.uint8)
    if save_for_backward and _activations.needs_preactivation(activation):
        saved = new_image(input, shape, channels_last)
    if save_for_backward and pool == "max":
        argmax = new_image(input, pooled_shape(shape, window), channels_last, torch.uint8)
    if save_for_backward and pool == "avg" and activation == "relu":
        argmax = new_image(input, shape, channels_last, torch.uint8)
    launch_convolution(
        problem, input, unpack_weight(packed_weight, weight), bias, scale, shift, residual, output,
        saved if saved.numel() else None, argmax if argmax.numel() and fused_pool else None,
        activation, fused_pool, exact,
    )  # fmt: skip
    if pool is not None and not fused_pool:
        conv, output = output, new_image(input, pooled_shape(shape, window), channels_last)
        relu = activation == "relu"
        if pool == "avg" and argmax.numel():
            torch.gt(conv, 0, out=argmax.view(torch.bool))
            argmax.logical_or_(conv.isnan())
        launch_pool(
            conv, output, argmax if pool == "max" and argmax.numel() else None, pool,
            *window_parts(window), (1,) * len(stride), True, None, relu,
        )  # fmt: skip
    return output, saved, argmax


def launch_convolution(
    problem: Problem,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    output: Tensor,
    saved: Tensor | None,
    argmax: Tensor | None,
    activation: str | None,
    pool: str | None,
    exact: bool,
) -> None:
    common = {
        **problem.constants(),
        "ACTIVATION": activation,
        "CHANNELS_LAST": is_channels_last(input),
        "ACC": accumulator_dtype(input),
        "INDEX": index_dtype(input, output, residual, saved),
    }
    tensors = (bias, scale, shift, residual, output, saved)
    if problem.depthwise:
        del common["STEP"]
        _launch_depthwise_forward(problem, input, weight, tensors, common)
        return
    weight = weight_for_kernels(weight)
    precision = dot_precision(input, "conv", exact)
    transposed = problem.options.transposed
    size = problem.per_phase(problem.y_size) if transposed else problem.y_size
    rows = problem.batch * math.prod(size)

    def run(setting: Config) -> None:
        programs = triton.cdiv(rows, setting["BLOCK_M"]) * problem.groups
        programs *= triton.cdiv(problem.y_channels, setting["BLOCK_N"])
        programs *= problem.phases if transposed else 1
        launch(
            conv_fwd_kernel, (programs,), setting, input, weight, *tensors, argmax, problem.batch,
            *size, *problem.y_size, *problem.x_size, problem.x_channels, problem.y_channels,
            problem.groups, *weight_strides(weight, problem), *problem.padding,
            POOL=pool, PRECISION=precision, **common,
        )  # fmt: skip

    shape = (power_of_two(rows), problem.x_channels, problem.y_channels, problem.groups)
    key = ("conv_fwd", input.dtype, precision, activation, pool, problem.kernel, *shape)
    default = gather_config(input, precision, problem.x_channels, problem.y_channels)
    run(tuned(key, default, GATHER_CONFIGS[architecture()], run))


def _launch_depthwise_forward(
    problem: Problem, input: Tensor, weight: Tensor, tensors: tuple, constants: dict[str, Any]
) -> None:
    x_channels, y_channels = problem.x_channels, problem.y_channels
    setting = DEPTHWISE_CONFIGS[architecture()]["rows"]
    launch(
        conv_depthwise_fwd_kernel,
        row_grid(setting, problem.batch, problem.y_size, y_channels * problem.groups),
        setting,
        input,
        weight.contiguous(),
        *tensors,
        problem.batch,
        x_channels * problem.groups,
        y_channels * problem.groups,
        *problem.x_size,
        *problem.y_size,
        *problem.padding,
        MULTIPLIER=y_channels if x_channels == 1 else 1,
        FAN_IN=x_channels,
        **constants,
    )
