"""Depthwise convolutions and groups of a few channels, which have kernels of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fmkernels.functional as FF
from fmkernels import _native, testing

pytestmark = pytest.mark.skipif(not _native.HAS_NATIVE, reason="needs the native kernels")

# (batch, channels, height, width), output channels, groups, kernel, stride, padding, dilation:
# groups that fill a vector and that do not, more and fewer channels than a vector, images narrower
# than a block of outputs and wider than a run of vectors, windows without a whole row inside.
PROBLEMS = {
    "depthwise": ((2, 40, 9, 30), 40, 40, 3, 1, 1, 1),
    "depthwise_strided": ((2, 33, 11, 21), 33, 33, 3, 2, 1, 1),
    "depthwise_wide": ((1, 16, 5, 150), 16, 16, 3, 1, 1, 1),
    "depthwise_wide_strided": ((1, 16, 5, 151), 16, 16, 3, 2, 1, 1),
    "depthwise_narrow": ((2, 16, 6, 2), 16, 16, 3, 1, 1, 1),
    "depthwise_5": ((1, 19, 12, 13), 19, 19, 5, 1, 2, 1),
    "depthwise_7": ((1, 32, 14, 14), 32, 32, 7, 1, 3, 1),
    "depthwise_7_strided": ((1, 32, 14, 15), 32, 32, 7, 2, 3, 1),
    "depthwise_no_padding": ((1, 24, 9, 12), 24, 24, 3, 1, 0, 1),
    "depthwise_much_padding": ((1, 8, 2, 3), 8, 8, 3, 1, 4, 1),
    "depthwise_dilated": ((1, 16, 13, 14), 16, 16, 3, 1, 2, 2),
    "depthwise_rectangular": ((1, 16, 13, 14), 16, 16, (1, 3), (2, 1), (0, 1), 1),
    "depthwise_even": ((1, 16, 9, 14), 16, 16, 4, 2, 1, 1),
    "depthwise_stride_3": ((1, 16, 13, 14), 16, 16, 3, 3, 1, 1),
    "groups_of_4": ((2, 64, 9, 21), 64, 16, 3, 1, 1, 1),
    "groups_of_4_strided": ((2, 24, 9, 20), 24, 6, 3, 2, 1, 1),
    "groups_of_8": ((1, 40, 7, 19), 40, 5, 3, 1, 1, 1),
    "groups_of_3": ((1, 21, 7, 12), 21, 7, 3, 1, 1, 1),
    "groups_2_to_4": ((1, 20, 7, 18), 40, 10, 3, 1, 1, 1),
    "groups_4_to_2": ((1, 40, 7, 18), 20, 10, 3, 1, 1, 1),
    "groups_of_4_wide": ((1, 8, 5, 151), 8, 2, 3, 1, 1, 1),
    "groups_3_to_5_wide_strided": ((1, 6, 6, 141), 10, 2, 3, 2, 1, 1),
    "groups_of_8_dilated": ((2, 16, 9, 70), 16, 2, 3, 1, 2, 2),
    "groups_pointwise": ((1, 32, 7, 18), 32, 8, 1, 1, 0, 1),
}


@pytest.mark.parametrize(
    "epilogue", [{}, {"activation": "relu6"}, {"activation": "gelu"}], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_forward_and_gradients(problem, layout, epilogue):
    """Small whole numbers have exact sums: nothing but the activation may round."""
    shape, out_channels, groups, kernel, *options = problem
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    stride, padding, dilation = options
    input = testing.integers(*shape, layout=layout)
    weight = testing.integers(out_channels, shape[1] // groups, *kernel)
    bias = testing.integers(out_channels, 1).flatten()
    ours = [t.clone().requires_grad_() for t in (input, weight, bias)]
    exact = [t.double().requires_grad_() for t in (input, weight, bias)]
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    output = FF.conv2d(*ours, **settings, backend="cpu", **epilogue)
    expected = F.conv2d(*exact, **settings)
    if epilogue:
        expected = getattr(F, epilogue["activation"])(expected)
    grad = testing.integers(*output.shape, layout=layout)
    output.backward(grad)
    expected.backward(grad.double())
    if epilogue.get("activation") == "gelu":
        torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
        return
    assert torch.equal(output.double(), expected)
    for actual, wanted in zip(ours, exact, strict=True):
        assert torch.equal(actual.grad.double(), wanted.grad)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_bfloat16(problem, layout):
    """Sums of small whole numbers are exact: results are rounded once."""
    shape, out_channels, groups, kernel, stride, padding, dilation = problem
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    input = testing.integers(*shape, layout=layout, dtype=torch.bfloat16)
    weight = testing.integers(out_channels, shape[1] // groups, *kernel, dtype=torch.bfloat16)
    ours = [t.clone().requires_grad_() for t in (input, weight)]
    exact = [t.double().requires_grad_() for t in (input, weight)]
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    output = FF.conv2d(*ours, **settings, backend="cpu")
    expected = F.conv2d(*exact, **settings)
    grad = testing.integers(*output.shape, layout=layout, dtype=torch.bfloat16)
    output.backward(grad)
    expected.backward(grad.double())
    assert torch.equal(output, expected.bfloat16())
    for actual, wanted in zip(ours, exact, strict=True):
        assert torch.equal(actual.grad, wanted.grad.bfloat16())


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, 0), (2, 0), (2, 3)])
@pytest.mark.parametrize("size", [(5, 7), (9, 8), (3, 3), (20, 30), (11, 28)], ids=str)
def test_depthwise_gradients(size, stride, padding, dtype):
    """Strips of columns that come out even and that do not, whole runs of channels and a rest."""
    input = testing.integers(2, 48, *size, dtype=dtype, layout="channels_last")
    weight = testing.integers(48, 1, 3, 3, dtype=dtype)
    bias = testing.integers(48, 1, dtype=dtype).flatten()
    ours = [t.clone().requires_grad_() for t in (input, weight, bias)]
    exact = [t.double().requires_grad_() for t in (input, weight, bias)]
    settings = {"stride": stride, "padding": padding, "groups": 48}
    output = FF.conv2d(*ours, **settings, backend="cpu")
    grad = testing.integers(*output.shape, dtype=dtype, layout="channels_last")
    output.backward(grad)
    F.conv2d(*exact, **settings).backward(grad.double())
    for actual, wanted in zip(ours, exact, strict=True):
        assert torch.equal(actual.grad, wanted.grad.to(dtype))


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
@pytest.mark.parametrize("activation", [None, "relu6", "gelu"])
@pytest.mark.parametrize("channels", [32, 40, 64])
def test_depthwise_epilogue(channels, activation, dtype):
    """Every part of it, over runs of channels that overlap and that do not."""
    input = testing.normal(2, channels, 7, 11, dtype=dtype, layout="channels_last")
    weight = testing.normal(channels, 1, 3, 3, dtype=dtype)
    scale, shift = (testing.normal(channels, 1, dtype=dtype).flatten() for _ in range(2))
    residual = testing.normal(2, channels, 7, 11, dtype=dtype, layout="channels_last")
    extra = {"scale": scale, "shift": shift, "activation": activation}
    exact = F.conv2d(input.double(), weight.double(), padding=1, groups=channels)
    exact = exact * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
    for more in (None, residual):
        output = FF.conv2d(
            input, weight, padding=1, groups=channels, residual=more, **extra, backend="cpu"
        )
        total = exact if more is None else exact + more.double()
        expected = testing.torch_activation(activation, total)
        assert (
            testing.max_error(output, expected) <= 4 * torch.finfo(dtype).eps * exact.abs().max()
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype, layout):
    input = testing.integers(2, 32, 9, 20, dtype=dtype, layout=layout)
    for groups in (32, 8):
        weight = testing.integers(32, 32 // groups, 3, 3, dtype=dtype)
        output = FF.conv2d(input, weight, padding=1, groups=groups, backend="cpu")
        expected = F.conv2d(input.double(), weight.double(), padding=1, groups=groups)
        assert torch.equal(output, expected.to(dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_stays_in_its_group(layout):
    input = testing.normal(1, 32, 12, 12, layout=layout)
    input[0, 5, 6, 6] = float("nan")
    weight = testing.normal(32, 4, 3, 3)
    nan = FF.conv2d(input, weight, padding=1, groups=8, backend="cpu").isnan()
    assert nan[0, 4:8, 5:8, 5:8].all()
    assert nan.sum() == 4 * 9


POINTWISE = {
    "one_panel": ((2, 20, 5, 7), 33),
    "panels": ((2, 32, 13, 17), 40),
    "odd": ((1, 21, 9, 9), 5),
    "one_pixel": ((3, 64, 1, 1), 7),
}


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
@pytest.mark.parametrize("activation", [None, "relu6", "gelu"])
@pytest.mark.parametrize("problem", POINTWISE.values(), ids=POINTWISE.keys())
def test_pointwise_planes(problem, activation, dtype):
    """1x1 convolutions of contiguous images, with every part of the epilogue."""
    shape, out_channels = problem
    input = testing.normal(*shape, dtype=dtype)
    weight = testing.normal(out_channels, shape[1], 1, 1, dtype=dtype, std=0.2)
    bias, scale, shift = (testing.normal(out_channels, 1, dtype=dtype).flatten() for _ in range(3))
    residual = testing.normal(shape[0], out_channels, *shape[2:], dtype=dtype)
    extra = {"scale": scale, "shift": shift, "residual": residual, "activation": activation}
    output = FF.conv2d(input, weight, bias, **extra, backend="cpu")
    exact = F.conv2d(input.double(), weight.double(), bias.double())
    exact = exact * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
    exact = testing.torch_activation(activation, exact + residual.double())
    assert testing.max_error(output, exact) <= 4 * torch.finfo(dtype).eps * exact.abs().max()
