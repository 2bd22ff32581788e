"""Transposed convolutions and their layers against PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fmkernels
import fmkernels.functional as FF
import fmkernels.nn as fnn
from fmkernels import testing
from fmkernels.ops.conv.backends import CONV
from fmkernels.ops.conv.geometry import ConvOptions, in_layout

PROBE = torch.zeros(1, 1, 1, 1)
OPTIONS = ConvOptions((1, 1), (0, 0, 0, 0), (1, 1), 1, True)
BACKENDS = testing.available_backends(CONV, PROBE, PROBE, OPTIONS)
pytestmark = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])

OURS = {1: FF.conv_transpose1d, 2: FF.conv_transpose2d, 3: FF.conv_transpose3d}
TORCHS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}

# name: input shape, output channels per group, kernel, stride, padding, output_padding, groups,
# dilation
PROBLEMS = {
    "unet": ((2, 16, 5, 6), 8, (2, 2), 2, 0, 0, 1, 1),
    "3x3": ((2, 5, 6, 7), 6, (3, 3), 1, 1, 0, 1, 1),
    "3x3_wide": ((2, 32, 14, 13), 32, (3, 3), 1, 1, 0, 1, 1),
    "strided": ((2, 6, 5, 7), 9, (4, 3), 2, 1, (0, 1), 1, 1),
    "taps_per_residue": ((2, 20, 5, 9), 7, (3, 4), (1, 2), (1, 3), 0, 2, 1),
    "taps_per_residue_odd": ((2, 6, 4, 17), 70, (6, 6), 3, (1, 2), (0, 1), 1, 1),
    "output_padding": ((1, 4, 5, 5), 6, (3, 3), 3, 1, 2, 1, 1),
    "no_padding_but_output_padding": ((1, 4, 5, 5), 6, (3, 3), 2, 0, 1, 1, 1),
    "dilated": ((1, 4, 6, 5), 6, (3, 2), (1, 2), (2, 1), 0, 1, (2, 3)),
    "stride_over_kernel": ((1, 3, 4, 5), 4, (2, 2), 3, 0, 0, 1, 1),
    "grouped": ((2, 8, 5, 6), 3, (3, 3), 2, 1, 1, 4, 1),
    "depthwise": ((2, 17, 5, 6), 1, (3, 3), 2, 1, 1, 17, 1),
    "1d": ((2, 6, 11), 8, (4,), 2, 1, 0, 1, 1),
    "1d_long": ((1, 4, 700), 6, (4,), 2, 1, 1, 1, 1),
    "3d": ((1, 4, 3, 4, 5), 6, (2, 3, 2), 2, (0, 1, 0), (0, 1, 0), 1, 1),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def make_arguments(problem, dtype, channels_last, extras=()):
    shape, columns, kernel, *conv = problem
    channels, dims = columns * conv[3], len(kernel)
    fan_in = shape[1] // conv[3] * torch.Size(kernel).numel()
    weight = testing.normal(shape[1], columns, *kernel, dtype=dtype) / fan_in**0.5
    arguments = {
        "input": in_layout(testing.normal(*shape, dtype=dtype), channels_last),
        "weight": weight,
        "bias": testing.normal(channels, 1, dtype=dtype).flatten(),
    }
    output = TORCHS[dims](arguments["input"].double(), weight.double(), None, *conv)
    for name in extras:
        shape = output.shape if name == "residual" else (channels,)
        arguments[name] = testing.normal(*shape, 1, dtype=dtype).squeeze(-1)
    return arguments


def torch_function(
    input, weight, bias=None, scale=None, shift=None, residual=None, *, conv, activation, pool
):
    dims = input.dim() - 2
    output = TORCHS[dims](input, weight, bias, *conv)
    output = output if scale is None else output * scale.view(-1, *(1,) * dims)
    output = output if shift is None else output + shift.view(-1, *(1,) * dims)
    output = output if residual is None else output + residual
    output = testing.torch_activation(activation, output)
    if pool is None:
        return output
    return {"max": F.max_pool2d, "avg": F.avg_pool2d}[pool[0]](output, *pool[1:])


def check(problem, arguments, backend, activation=None, pool=None, **options):
    conv = problem[3:]
    testing.compare(
        lambda input, weight, bias=None, **kw: OURS[input.dim() - 2](
            input, weight, bias, *conv, activation=activation, pool=pool, backend=backend, **kw
        ),
        lambda **kw: torch_function(**kw, conv=conv, activation=activation, pool=pool),
        arguments,
        **options,
    )


@problems
@layouts
@dtypes
def test_matches_torch(problem, channels_last, dtype, backend):
    check(problem, make_arguments(problem, dtype, channels_last), backend)


@pytest.mark.parametrize("pool", [None, ("max", 2, 2, 0), ("avg", 3, 2, 1)])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("name", ["unet", "strided", "taps_per_residue_odd", "3x3"])
@layouts
def test_epilogue(name, activation, pool, channels_last, backend):
    problem = PROBLEMS[name]
    extras = ("scale", "shift", "residual")
    arguments = make_arguments(problem, torch.float32, channels_last, extras)
    check(problem, arguments, backend, activation, pool)


@pytest.mark.parametrize("grad_layout", testing.GRADIENT_LAYOUTS)
def test_gradient_strides(grad_layout, backend):
    problem = PROBLEMS["strided"]
    arguments = make_arguments(problem, torch.float32, False)
    check(problem, arguments, backend, "relu", grad_layout=grad_layout)


LAYERS = {
    "1d": (nn.ConvTranspose1d, fnn.ConvTranspose1d, (2, 6, 9), (17,)),
    "2d": (nn.ConvTranspose2d, fnn.ConvTranspose2d, (2, 6, 5, 7), (9, 14)),
    "3d": (nn.ConvTranspose3d, fnn.ConvTranspose3d, (1, 6, 3, 4, 5), None),
}


@pytest.mark.parametrize(("theirs", "ours", "shape", "size"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_layer(theirs, ours, shape, size, frozen, backend):
    layer = theirs(6, 8, 3, stride=2, padding=1, output_padding=1, groups=2)
    fused = ours.from_torch(copy.deepcopy(layer), backend=backend)
    assert fused.state_dict().keys() == layer.state_dict().keys()
    if frozen:
        fmkernels.freeze(fused)
    input = torch.randn(shape)
    torch.testing.assert_close(fused(input), layer(input), rtol=1e-4, atol=1e-5)
    if size is not None:
        expected = layer(input, output_size=size)
        torch.testing.assert_close(fused(input, output_size=size), expected, rtol=1e-4, atol=1e-5)


def test_unbatched_and_empty(backend):
    input, weight = torch.randn(4, 5, 6), torch.randn(4, 3, 3, 3)
    torch.testing.assert_close(
        FF.conv_transpose2d(input, weight, stride=2, backend=backend),
        F.conv_transpose2d(input, weight, stride=2),
        rtol=1e-4,
        atol=1e-5,
    )
    empty = torch.randn(0, 4, 5, 6, requires_grad=True)
    output = FF.conv_transpose2d(empty, weight.requires_grad_(), stride=2, backend=backend)
    assert output.shape == (0, 3, 11, 13)
    output.sum().backward()
    assert empty.grad.shape == empty.shape and not weight.grad.any()


def test_compile(backend):
    torch._dynamo.reset()
    layer = fnn.ConvTranspose2d(4, 6, 2, 2, activation="relu", backend=backend)
    input = torch.randn(2, 4, 5, 6, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), layer(input))
    compiled(input).sum().backward()


BAD = {
    "channels": ({"weight": torch.zeros(3, 2, 3, 3)}, "weight must have the 4 channels"),
    "output_padding": ({"output_padding": 2}, r"output_padding\[0\] must be smaller"),
    "padding": ({"padding": 40}, "padding leaves an output of size"),
    "mode": ({"padding_mode": "reflect"}, "padding_mode must be one of 'zeros'"),
    "bias": ({"bias": torch.zeros(3)}, r"bias must have shape \(2,\)"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(change, message, backend):
    arguments = {"input": torch.zeros(1, 4, 5, 5), "weight": torch.zeros(4, 2, 3, 3)}
    with pytest.raises(ValueError, match=message):
        FF.conv_transpose2d(**(arguments | {"stride": 2, "backend": backend} | change))
