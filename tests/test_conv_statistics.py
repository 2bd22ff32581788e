"""The statistics of a batch norm, gathered by the convolution in front of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fmkernels.nn as fnn
from fmkernels import _native, testing
from fmkernels.ops._activations import opmath_dtype

ops = torch.ops.fmkernels
pytestmark = pytest.mark.skipif(
    not _native.HAS_NATIVE,
    reason=f"no other backend gathers statistics; no native library: {_native.NATIVE_ERROR}",
)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)

# Input, weight, and stride, padding, dilation, groups, padding mode: one per way of computing.
FORMS = {
    "direct": ((3, 5, 9, 10), (8, 5, 3, 3), ((1, 1), (1,) * 4, (1, 1), 1, "zeros")),
    "strided": ((2, 32, 19, 18), (70, 32, 3, 3), ((2, 2), (1,) * 4, (1, 1), 1, "zeros")),
    "reflected": ((2, 5, 9, 10), (33, 5, 3, 3), ((1, 1), (1,) * 4, (1, 1), 1, "reflect")),
    "winograd": ((2, 32, 18, 21), (72, 32, 3, 3), ((1, 1), (1,) * 4, (1, 1), 1, "zeros")),
    "small winograd": ((9, 32, 6, 7), (33, 32, 3, 3), ((1, 1), (1,) * 4, (1, 1), 1, "zeros")),
    "pointwise": ((3, 48, 17, 19), (70, 48, 1, 1), ((1, 1), (0,) * 4, (1, 1), 1, "zeros")),
    "long sums": ((2, 1500, 5, 5), (17, 1500, 1, 1), ((2, 2), (0,) * 4, (1, 1), 1, "zeros")),
    "grouped": ((2, 48, 9, 8), (60, 24, 3, 3), ((1, 1), (1,) * 4, (1, 1), 2, "zeros")),
    "small groups": ((3, 32, 9, 14), (32, 4, 3, 3), ((1, 1), (1,) * 4, (1, 1), 8, "zeros")),
    "depthwise": ((3, 40, 11, 14), (40, 1, 3, 3), ((1, 1), (1,) * 4, (1, 1), 40, "zeros")),
    "strided depthwise": ((3, 40, 11, 14), (40, 1, 3, 3), ((2, 2), (1,) * 4, (1, 1), 40, "zeros")),
    "wide depthwise": ((2, 21, 9, 8), (21, 1, 9, 9), ((1, 1), (4,) * 4, (1, 1), 21, "zeros")),
    "one axis": ((3, 4, 37), (9, 4, 3), ((1,), (1, 1), (1,), 1, "zeros")),
    "one long axis": ((2, 4, 1700), (9, 4, 3), ((1,), (1, 1), (1,), 1, "zeros")),
    "three axes": ((2, 4, 5, 6, 7), (9, 4, 3, 3, 3), ((1,) * 3, (1,) * 6, (1,) * 3, 1, "zeros")),
    "one pixel": ((2, 8, 1, 1), (9, 8, 1, 1), ((1, 1), (0,) * 4, (1, 1), 1, "zeros")),
    "one value": ((1, 8, 3, 3), (9, 8, 3, 3), ((1, 1), (0,) * 4, (1, 1), 1, "zeros")),
    "nothing": ((0, 8, 3, 3), (9, 8, 3, 3), ((1, 1), (0,) * 4, (1, 1), 1, "zeros")),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def operands(form, dtype, layout, mean=0.0):
    """input, weight and bias whose outputs lie around ``mean`` with a deviation of about 1."""
    shape, weight, options = form
    fan_in = weight[1] * torch.Size(weight[2:]).numel()
    input = testing.normal(*shape, dtype=dtype)
    if layout == "channels_last":  # of one axis and of three, too
        input = input.movedim(1, -1).contiguous().movedim(-1, 1)
    weight = testing.normal(*weight, dtype=dtype, std=fan_in**-0.5)
    bias = mean + testing.normal(weight.shape[0], 1, dtype=dtype).flatten()
    return (input, weight, bias, None, *options)


def check_statistics(output, mean, variance):
    """Against float64, of the values as they are stored."""
    values = output.double().transpose(0, 1).flatten(1)
    exact_mean = values.mean(1)
    deviations = values - exact_mean.unsqueeze(1)
    correction = deviations.mean(1)  # of the mean's rounding
    exact_mean = exact_mean + correction
    exact_variance = (deviations - correction.unsqueeze(1)).square().mean(1)
    eps = torch.finfo(mean.dtype).eps
    # Up to 64 runs of 8 or 16 values, taken relative to one of them, are joined in mean's dtype,
    # each to half an eps; the result is rounded once.
    joined = 32 * eps * (values.amax(1) - values.amin(1))
    assert ((mean.double() - exact_mean).abs() <= eps * exact_mean.abs() + joined).all()
    # Squares of deviations from a mean that is off by so much, and their own roundings.
    error = (variance.double() - exact_variance).abs()
    assert (error <= 16 * eps * exact_variance + joined**2).all()


@forms
@dtypes
@layouts
def test_statistics_are_those_of_the_output(form, dtype, layout):
    arguments = operands(form, dtype, layout)
    output, mean, variance = ops.conv_statistics(*arguments)
    input, weight, bias, _, stride, padding, dilation, groups, mode = arguments
    options = (stride, padding, dilation, groups, False, mode, None, None, ())
    plain = ops.conv_forward(input, weight, bias, None, None, None, None, *options, False)[0]
    assert torch.equal(output, plain)
    assert output.stride() == plain.stride()
    assert mean.dtype == variance.dtype == opmath_dtype(dtype)
    if output.numel():
        check_statistics(output, mean, variance)
    else:
        assert variance.isnan().all()


@forms
@layouts
@pytest.mark.parametrize("mean", [1000.0, -30.0])
def test_mean_far_from_zero(form, layout, mean):
    """Nothing of the variance drowns in the mean."""
    output, *statistics = ops.conv_statistics(*operands(form, torch.float32, layout, mean))
    if output.numel():
        check_statistics(output, *statistics)


@forms
@layouts
def test_threads_gather_for_themselves(form, layout):
    arguments = operands(form, torch.float32, layout, 3.0)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            output, *statistics = ops.conv_statistics(*arguments)
            if output.numel():
                check_statistics(output, *statistics)
            again = ops.conv_statistics(*arguments)
            assert (
                all(torch.equal(a, b) for a, b in zip((output, *statistics), again, strict=True))
                or not output.numel()
            )
    finally:
        torch.set_num_threads(before)


@layouts
def test_large_output_is_stored_and_gathered(layout):
    """More than is stored past the caches without statistics."""
    form = ((2, 32, 200, 200), (64, 32, 1, 1), ((1, 1), (0,) * 4, (1, 1), 1, "zeros"))
    output, *statistics = ops.conv_statistics(*operands(form, torch.float32, layout))
    check_statistics(output, *statistics)


@layouts
def test_infinity_and_nan_reach_their_channel_alone(layout):
    form = FORMS["pointwise"]
    input, weight, bias, *rest = operands(form, torch.float32, layout)
    bias[3], bias[5] = torch.inf, torch.nan
    _, mean, variance = ops.conv_statistics(input, weight, bias, *rest)
    others = [c for c in range(70) if c not in (3, 5)]
    assert not mean[3].isfinite() and mean[5].isnan()
    assert variance[[3, 5]].isnan().all()
    assert mean[others].isfinite().all() and variance[others].isfinite().all()


@layouts
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bias", [1000.0, 0.0])
def test_running_statistics_are_torchs(layout, momentum, bias):
    conv, norm = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16, momentum=momentum)
    nn.init.constant_(conv.bias, bias)
    block = fnn.ConvBlock2d.from_torch(copy.deepcopy(conv), copy.deepcopy(norm), backend="cpu")
    exact = nn.Sequential(conv, norm).double()
    for step in range(3):
        input = testing.normal(3, 8, 6 + step, 7, layout=layout)
        block(input)
        exact(input.double())
    mean, variance = exact[1].running_mean, exact[1].running_var
    torch.testing.assert_close(block.norm.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    # The convolution rounds its outputs around 1000 to 6e-5.
    torch.testing.assert_close(block.norm.running_var.double(), variance, rtol=1e-3, atol=1e-5)
    assert block.norm.num_batches_tracked == 3


@layouts
def test_empty_batch_is_as_in_torch(layout):
    conv, norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    block = fnn.ConvBlock2d.from_torch(copy.deepcopy(conv), copy.deepcopy(norm), backend="cpu")
    input = testing.normal(0, 4, 5, 5, layout=layout)
    assert block(input).shape == norm(conv(input)).shape
    with pytest.raises(ValueError, match="more than one value per channel"):
        block(testing.normal(1, 4, 3, 3, layout=layout))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(conv(testing.normal(1, 4, 3, 3, layout=layout)))


def test_block_without_batch_is_refused():
    block = fnn.ConvBlock2d(4, 6, 3, norm="batch", backend="cpu")
    with pytest.raises(ValueError, match="input must have a batch dimension"):
        block(torch.randn(4, 5, 5))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_known_statistics_are_used(layout):
    input = testing.normal(2, 6, 5, 7, layout=layout)
    options = (None, None, None, 0, 1e-5, "relu", None, ())
    output, mean, variance, _ = ops.channel_norm_forward(input, *options, False)
    again = ops.channel_norm_forward(input, *options, False, mean, variance)
    assert torch.equal(again[0], output)
    other = ops.channel_norm_forward(input, *options, False, mean + 1, variance)
    assert torch.equal(other[1], mean + 1) and not torch.equal(other[0], output)
    with pytest.raises(RuntimeError, match="mean: expected with variance"):
        ops.channel_norm_forward(input, *options, False, mean)
    with pytest.raises(RuntimeError, match="variance"):
        ops.channel_norm_forward(input, *options, False, mean, variance[:3])


def test_bad_operands_of_the_op_are_named():
    input, weight, bias, packed, *options = operands(FORMS["direct"], torch.float32, "contiguous")
    with pytest.raises(RuntimeError, match="input: expected 5 channels"):
        ops.conv_statistics(input[:, :4].contiguous(), weight, bias, packed, *options)
    with pytest.raises(RuntimeError, match="bias"):
        ops.conv_statistics(input, weight, bias[:3], packed, *options)
