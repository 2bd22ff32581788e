"""Convolutions over one and three axes, and padding modes, against PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fmkernels.functional as FF
from fmkernels import testing
from fmkernels.ops.conv.backends import CONV
from fmkernels.ops.conv.geometry import ConvOptions, in_layout

PROBE = torch.zeros(1, 1, 1, 1)
BACKENDS = testing.available_backends(
    CONV, PROBE, PROBE, ConvOptions((1, 1), (0, 0, 0, 0), (1, 1))
)
pytestmark = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])

CONVS = {1: FF.conv1d, 2: FF.conv2d, 3: FF.conv3d}
TORCH_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# name: input shape, output channels, kernel, stride, padding, dilation, groups
PROBLEMS = {
    "1d": ((2, 6, 21), 8, (5,), 1, 2, 2, 1),
    "1d_strided": ((2, 16, 40), 16, (3,), 2, 1, 1, 1),
    "1d_grouped": ((2, 8, 19), 12, (4,), 1, 2, 1, 4),
    "1d_depthwise": ((2, 17, 33), 17, (4,), 1, 3, 1, 17),
    "1d_pointwise": ((1, 33, 20), 7, (1,), 1, 0, 1, 1),
    "1d_long": ((2, 3, 1500), 20, (10,), 5, 3, 1, 1),
    "1d_long_taps_per_residue": ((2, 6, 1303), 10, (6,), 3, 2, 1, 2),
    "1d_longer": ((1, 5, 1400), 9, (3,), 1, 1, 1, 1),
    "1d_long_depthwise": ((1, 20, 1400), 20, (3,), 1, 2, 2, 20),
    "3d": ((2, 5, 5, 7, 6), 7, (3, 3, 3), 1, 1, 1, 1),
    "3d_strided": ((1, 4, 7, 9, 8), 6, (3, 3, 3), 2, 1, 1, 1),
    "3d_mixed": ((2, 4, 6, 5, 9), 6, (2, 3, 1), (1, 2, 3), (1, 0, 2), (2, 1, 1), 2),
    "3d_depthwise": ((1, 17, 4, 6, 5), 17, (3, 3, 3), 1, 1, 1, 17),
    "3d_pointwise": ((2, 16, 3, 4, 5), 20, (1, 1, 1), 1, 0, 1, 1),
    "3d_pointwise_in_padding": ((2, 16, 1, 5, 6), 20, (1, 1, 1), (3, 1, 1), (1, 0, 0), 1, 1),
    "3d_planar_kernel": ((1, 32, 4, 18, 18), 32, (1, 3, 3), 1, (0, 1, 1), 1, 1),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def make_arguments(problem, dtype, channels_last, extras=()):
    shape, out_channels, kernel, *conv = problem
    fan_in = shape[1] // conv[3] * torch.Size(kernel).numel()
    weight = testing.normal(out_channels, shape[1] // conv[3], *kernel, dtype=dtype)
    arguments = {
        "input": in_layout(testing.normal(*shape, dtype=dtype), channels_last),
        "weight": weight / fan_in**0.5,
        "bias": testing.normal(out_channels, 1, dtype=dtype).flatten(),
    }
    dims = len(kernel)
    output = TORCH_CONVS[dims](arguments["input"].double(), weight.double(), None, *conv)
    for name in extras:
        shape = output.shape if name == "residual" else (out_channels,)
        arguments[name] = testing.normal(*shape, 1, dtype=dtype).squeeze(-1)
    return arguments


def torch_conv(input, weight, bias, scale=None, shift=None, residual=None, *, conv, activation):
    dims = input.dim() - 2
    output = TORCH_CONVS[dims](input, weight, bias, *conv)
    for name, vector in (("scale", scale), ("shift", shift)):
        if vector is not None:
            vector = vector.view(-1, *(1,) * dims)
            output = output * vector if name == "scale" else output + vector
    output = output if residual is None else output + residual
    return testing.torch_activation(activation, output)


def check(problem, dtype, channels_last, backend, extras=(), activation=None, **options):
    conv = problem[3:]
    testing.compare(
        lambda input, weight, bias, **kw: CONVS[input.dim() - 2](
            input, weight, bias, *conv, activation=activation, backend=backend, **kw
        ),
        lambda **kw: torch_conv(**kw, conv=conv, activation=activation),
        make_arguments(problem, dtype, channels_last, extras),
        **options,
    )


@problems
@layouts
@dtypes
def test_matches_torch(problem, channels_last, dtype, backend):
    check(problem, dtype, channels_last, backend)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("problem", [PROBLEMS[n] for n in ("1d", "1d_longer", "3d", "3d_mixed")])
@layouts
def test_epilogue(problem, activation, channels_last, backend):
    extras = ("scale", "shift", "residual")
    check(problem, torch.float32, channels_last, backend, extras, activation)


@pytest.mark.parametrize("grad_layout", testing.GRADIENT_LAYOUTS)
@pytest.mark.parametrize("problem", [PROBLEMS["1d"], PROBLEMS["3d"]], ids=["1d", "3d"])
def test_gradient_strides(problem, grad_layout, backend):
    check(problem, torch.float32, False, backend, grad_layout=grad_layout)


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("size", [2, 4])
def test_pool_of_one_axis(pool, size, backend):
    input = torch.randn(2, 4, 30)
    weight = torch.randn(6, 4, 3)
    pooling = F.max_pool1d if pool == "max" else F.avg_pool1d
    testing.compare(
        lambda input, weight: FF.conv1d(
            input, weight, activation="relu", pool=(pool, size, 2, 1), backend=backend
        ),
        lambda input, weight: pooling(F.relu(F.conv1d(input, weight)), size, 2, 1),
        {"input": input, "weight": weight},
    )


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_pool_of_three_axes(pool, backend):
    pooling = F.max_pool3d if pool == "max" else F.avg_pool3d
    testing.compare(
        lambda input, weight: FF.conv3d(input, weight, pool=(pool, (1, 2, 2))),
        lambda input, weight: pooling(F.conv3d(input, weight), (1, 2, 2)),
        {"input": torch.randn(2, 3, 5, 7, 8), "weight": torch.randn(4, 3, 3, 3, 3)},
    )


MODES = ("reflect", "replicate", "circular")


def torch_padded(input, weight, bias, mode, padding, stride, dilation):
    flat = [p for p in reversed(padding) for _ in range(2)]
    padded = F.pad(input, flat, mode=mode)
    return TORCH_CONVS[input.dim() - 2](padded, weight, bias, stride, 0, dilation)


PADDED = {
    "1d": ((2, 5, 13), 6, (4,), 1, (3,), 1),
    "2d": ((2, 3, 9, 8), 4, (3, 4), 1, (2, 3), 1),
    "2d_wide": ((2, 32, 9, 10), 32, (3, 3), 1, (1, 1), 1),
    "2d_strided": ((2, 4, 9, 11), 5, (3, 3), 2, (2, 1), 1),
    "2d_dilated": ((1, 17, 8, 9), 18, (3, 2), 1, (4, 2), (2, 3)),
    "3d": ((1, 3, 4, 5, 6), 4, (3, 2, 3), (1, 2, 1), (1, 2, 1), 1),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("problem", PADDED.values(), ids=PADDED)
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_padding_modes(mode, problem, channels_last, dtype, backend):
    shape, out_channels, kernel, stride, padding, dilation = problem
    fan_in = shape[1] * torch.Size(kernel).numel()
    arguments = {
        "input": in_layout(testing.normal(*shape, dtype=dtype), channels_last),
        "weight": testing.normal(out_channels, shape[1], *kernel, dtype=dtype) / fan_in**0.5,
        "bias": testing.normal(out_channels, 1, dtype=dtype).flatten(),
    }
    function = CONVS[len(kernel)]
    testing.compare(
        lambda input, weight, bias: function(
            input,
            weight,
            bias,
            stride,
            padding,
            dilation,
            padding_mode=mode,
            backend=backend,
        ),
        lambda input, weight, bias: torch_padded(
            input, weight, bias, mode, padding, stride, dilation
        ),
        arguments,
    )


def test_padding_mode_that_does_not_fit_is_named(backend):
    input, weight = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
    with pytest.raises(ValueError, match=r"padding\[0\] must be at most 3 under padding_mode"):
        FF.conv2d(input, weight, padding=4, padding_mode="reflect", backend=backend)
