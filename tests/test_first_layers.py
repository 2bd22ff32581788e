"""Convolutions of images of few channels, which have kernels of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fmkernels.functional as FF
from fmkernels import _native, testing

pytestmark = pytest.mark.skipif(
    not _native.HAS_NATIVE, reason="the kernels under test are native, which are not built"
)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])

# (batch, channels, height, width), output channels, kernel, stride, padding, dilation: rows of
# outputs of less than a tile, of whole ones and of tiles that differ; output channels that fill
# vectors and panels and that do not; and what is not computed so: dilated rows, long reductions.
PROBLEMS = {
    "strided": ((2, 3, 17, 45), 20, 3, 2, 1, 1),
    "stem": ((1, 3, 30, 61), 40, 7, 2, 3, 1),
    "whole_vectors": ((2, 3, 9, 64), 64, 3, 2, 1, 1),
    "gray": ((3, 1, 9, 28), 33, 3, 1, 1, 1),
    "four_channels": ((1, 4, 13, 50), 9, 5, 1, 2, 1),
    "no_padding": ((1, 4, 15, 40), 16, 3, 2, 0, 1),
    "two_channels": ((1, 2, 7, 33), 12, (1, 7), (2, 1), (0, 3), 1),
    "patches": ((1, 3, 20, 44), 24, 4, 4, 0, 1),
    "stride_3": ((1, 2, 20, 41), 17, 5, 3, 1, 1),
    "dilated": ((1, 3, 14, 30), 16, 3, 1, 2, 2),
    "dilated_columns": ((1, 3, 9, 30), 16, 3, 1, (1, 2), (1, 2)),
    "dilated_rows": ((1, 3, 12, 30), 16, 3, 2, (2, 1), (2, 1)),
    "much_padding": ((1, 3, 4, 22), 16, 3, 1, 4, 1),
    "many_outputs": ((1, 3, 8, 20), 100, 3, 1, 1, 1),
    "long_reduction": ((1, 3, 25, 49), 16, 11, 4, 2, 1),
    "narrow": ((2, 3, 9, 5), 16, 3, 1, 1, 1),
    "few_outputs": ((1, 3, 9, 37), 5, 3, 1, 1, 1),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
POOLS = {
    "max_overlapping": ("max", 3, 2, 1),
    "max_apart": ("max", 2, 3, 0),
    "max_dense": ("max", 3, 1, 1),
    "max_rectangular": ("max", (1, 3), (1, 2), (0, 1)),
    "average": ("avg", 3, 2, 1),
}


def arguments(problem, layout, dtype=torch.float32):
    shape, out_channels, kernel, stride, padding, dilation = problem
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    tensors = {
        "input": testing.integers(*shape, layout=layout, dtype=dtype),
        "weight": testing.integers(out_channels, shape[1], *kernel, dtype=dtype),
        "bias": testing.integers(out_channels, 1, dtype=dtype).flatten(),
        "scale": testing.integers(out_channels, 1, dtype=dtype).flatten(),
        "shift": testing.integers(out_channels, 1, dtype=dtype).flatten(),
    }
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation}


def reference(tensors, options, activation=None, pool=None):
    output = F.conv2d(tensors["input"], tensors["weight"], tensors["bias"], **options)
    if "scale" in tensors:
        output = output * tensors["scale"].view(-1, 1, 1) + tensors["shift"].view(-1, 1, 1)
    if "residual" in tensors:
        output = output + tensors["residual"]
    output = testing.torch_activation(activation, output)
    if pool is None:
        return output
    kind, *window = pool
    return (F.max_pool2d if kind == "max" else F.avg_pool2d)(output, *window)


def check(tensors, options, layout, exact_sums=True, **epilogue):
    """Small whole numbers have exact sums: nothing but activations and averages may round."""
    double = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    expected = reference(double, options, **epilogue)
    with torch.no_grad():
        inferred = FF.conv2d(**tensors, **options, **epilogue, backend="cpu")
    ours = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    output = FF.conv2d(**ours, **options, **epilogue, backend="cpu")
    grad = testing.integers(*output.shape, layout=layout)
    output.backward(grad)
    expected.backward(grad.double())
    results = {"inferred": (inferred, expected), "output": (output, expected)}
    results |= {name: (ours[name].grad, double[name].grad) for name in ours}
    for name, (actual, wanted) in results.items():
        if exact_sums:
            assert torch.equal(actual.double(), wanted), name
        else:
            scale = wanted.abs().max().item() + 1
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "gelu"])
@layouts
@problems
def test_forward_and_gradients(problem, layout, activation):
    tensors, options = arguments(problem, layout)
    if activation == "gelu":
        shape = F.conv2d(tensors["input"], tensors["weight"], **options).shape
        tensors["residual"] = testing.integers(*shape, layout=layout)
    check(tensors, options, layout, exact_sums=activation != "gelu", activation=activation)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
@layouts
@pytest.mark.parametrize("name", ["strided", "stem", "gray", "two_channels", "much_padding"])
def test_pooled(name, layout, pool, activation):
    tensors, options = arguments(PROBLEMS[name], layout)
    # Among whole numbers maxima are often equal, and torch gives the gradient to one of them.
    tensors["input"] = tensors["input"] + testing.normal(*tensors["input"].shape, layout=layout)
    check(tensors, options, layout, exact_sums=False, activation=activation, pool=pool)


@layouts
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode, layout):
    for stride in (1, 2):
        input = testing.integers(2, 3, 11, 37, layout=layout)
        weight = testing.integers(24, 3, 5, 5)
        output = FF.conv2d(
            input, weight, stride=stride, padding=2, padding_mode=mode, backend="cpu"
        )
        padded = F.pad(input.double(), (2, 2, 2, 2), mode=mode)
        assert torch.equal(output.double(), F.conv2d(padded, weight.double(), stride=stride))


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype, layout):
    for name in ("strided", "gray", "four_channels", "patches"):
        tensors, options = arguments(PROBLEMS[name], layout, dtype)
        del tensors["scale"], tensors["shift"]
        for pool in (None, ("max", 3, 2, 1)):
            output = FF.conv2d(**tensors, **options, pool=pool, activation="relu", backend="cpu")
            double = {key: value.double() for key, value in tensors.items()}
            assert torch.equal(output, reference(double, options, "relu", pool).to(dtype))


@layouts
def test_three_axes(layout):
    layout = torch.channels_last_3d if layout == "channels_last" else torch.contiguous_format
    input = testing.integers(1, 3, 5, 9, 30).contiguous(memory_format=layout)
    weight = testing.integers(20, 3, 3, 3, 3)
    output = FF.conv3d(input, weight, stride=(1, 2, 2), padding=1, backend="cpu")
    expected = F.conv3d(input.double(), weight.double(), stride=(1, 2, 2), padding=1)
    assert torch.equal(output.double(), expected)


@pytest.mark.parametrize("pool", [None, ("max", 3, 2, 1)])
@layouts
def test_nan_stays_under_its_windows(layout, pool):
    input = testing.normal(1, 3, 20, 40, layout=layout)
    input[0, 1, 10, 20] = float("nan")
    weight = testing.normal(24, 3, 3, 3)
    nan = FF.conv2d(input, weight, padding=1, activation="relu", pool=pool, backend="cpu").isnan()
    expected = reference(
        {"input": input, "weight": weight, "bias": None}, {"padding": 1}, "relu", pool
    ).isnan()
    assert expected.sum() == 24 * 9 and torch.equal(nan, expected)


@layouts
def test_large_output(layout):
    """One that is stored past the caches."""
    input = testing.integers(3, 3, 226, 226, layout=layout)
    weight, bias = testing.integers(64, 3, 3, 3), testing.integers(64, 1).flatten()
    output = FF.conv2d(input, weight, bias, activation="relu6", backend="cpu")
    assert torch.equal(output, F.relu6(F.conv2d(input, weight, bias)))


@pytest.mark.parametrize("channels", [1, 3, 5, 7, 9, 11, 13, 15, 17])
def test_odd_numbers_of_channels_in_bfloat16(channels):
    """A pixel's last channel is alone in its pair: the next pixel's is none of its business."""
    weight = testing.integers(20, channels, 3, 3, dtype=torch.bfloat16)
    for width in (3, 16, 29):
        shape = (2, channels, 6, width)
        input = testing.integers(*shape, dtype=torch.bfloat16, layout="channels_last")
        input[0, 0, 2, width - 1] = float("nan")
        output = FF.conv2d(input, weight, padding=1, backend="cpu")
        expected = F.conv2d(input.double(), weight.double(), padding=1).bfloat16()
        torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
