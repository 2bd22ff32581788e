"""The gradient of a convolution's weight on the CPU: how its work is cut among threads, the pairs
of rows that bf16 is multiplied in, and pixels under no window, which do not reach it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fmkernels.functional as FF
from fmkernels import _native, testing

pytestmark = pytest.mark.skipif(
    not _native.HAS_NATIVE,
    reason=f"tests native kernels alone, and there is no native library: {_native.NATIVE_ERROR}",
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def gradients(convolve, input, weight, bias, grad):
    """Of weight and bias."""
    weight, bias = (t.detach().clone().requires_grad_() for t in (weight, bias))
    convolve(input, weight, bias).backward(grad)
    return weight.grad, bias.grad


def check(input, weight, bias, **options):
    def ours(*tensors):
        return FF.conv2d(*tensors, backend="cpu", **options)

    def theirs(*tensors):
        return F.conv2d(*tensors, **options)

    grad = testing.normal(*theirs(input, weight, bias).shape, dtype=input.dtype)
    actual = gradients(ours, input, weight, bias, grad)
    torchs = gradients(theirs, input, weight, bias, grad)
    exact = gradients(theirs, *(t.double() for t in (input, weight, bias, grad)))
    for name, one, torch_one, exact_one in zip(
        ("weight", "bias"), actual, torchs, exact, strict=True
    ):
        testing.assert_within_policy(name, one, torch_one, exact_one)


# (batch, channels, height, width), output channels, options. Threads share out panels of the
# result where there are few pixels, else pixels; the panels come out even for some of the threads,
# or not. One row and odd numbers of rows leave the last row of a pair alone; strides skip rows.
PROBLEMS = [
    ((1, 40, 7, 9), 128, {"padding": 1}),
    ((1, 24, 5, 6), 200, {"padding": 1, "stride": 2}),
    ((3, 32, 9, 7), 64, {}),
    ((5, 16, 1, 30), 64, {"padding": (1, 1)}),
    ((2, 20, 31, 33), 40, {"stride": 2, "padding": 1}),
    ((1, 33, 11, 12), 65, {"dilation": 2, "padding": 3}),
    ((3, 24, 10, 10), 48, {"groups": 2, "padding": 1}),
    ((7, 3, 20, 21), 32, {"stride": 2}),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=testing.dtype_name)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_shares_and_pairs(problem, dtype, layout, threads):
    size, out_channels, options = problem
    input = testing.normal(*size, dtype=dtype).contiguous(memory_format=layout)
    channels = size[1] // options.get("groups", 1)
    weight = testing.normal(out_channels, channels, 3, 3, dtype=dtype, std=(9 * channels) ** -0.5)
    if size[2] == 1:
        weight = weight[:, :, :1].contiguous()
        options = {**options, "padding": (0, 1)}
    check(input, weight, testing.normal(out_channels, dtype=dtype), **options)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=testing.dtype_name)
@pytest.mark.parametrize("out_channels", [64, 96, 128, 256])
def test_winograd_shares(out_channels, dtype, layout, threads):
    """3x3 of stride 1 and many tiles: by panels of the result, or by tiles."""
    input = testing.normal(3, 32, 17, 18, dtype=dtype).contiguous(memory_format=layout)
    weight = testing.normal(out_channels, 32, 3, 3, dtype=dtype, std=1 / 17)
    bias = testing.normal(out_channels, dtype=dtype)
    grad = testing.normal(3, out_channels, 17, 18, dtype=dtype).contiguous(memory_format=layout)

    def ours(*tensors):
        return FF.conv2d(*tensors, padding=1, backend="cpu")

    actual = gradients(ours, input, weight, bias, grad)
    exact = gradients(
        lambda *tensors: F.conv2d(*tensors, padding=1),
        *(t.double() for t in (input, weight, bias, grad)),
    )
    for one, exact_one in zip(actual, exact, strict=True):
        bound = 1e-5 + torch.finfo(dtype).eps
        assert (one - exact_one).abs().max() <= bound * exact_one.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=testing.dtype_name)
@pytest.mark.parametrize(("batch", "height"), [(1, 8), (2, 8), (3, 6), (1, 2)])
def test_pixels_under_no_window_do_not_count(batch, height, dtype, layout):
    """With stride 2 the last row and column of an even image are read by no output: NaN there must
    not reach the gradient of the weight, whatever lies beside it in a word or a vector."""
    input = testing.normal(batch, 16, height, height, dtype=dtype)
    input[:, :, -1] = input[:, :, :, -1] = float("nan")
    input = input.contiguous(memory_format=layout)
    weight = testing.normal(64, 16, 1, 1, dtype=dtype)
    bias = testing.normal(64, dtype=dtype)
    grad = testing.normal(batch, 64, height // 2, height // 2, dtype=dtype)
    results = gradients(
        lambda *tensors: FF.conv2d(*tensors, stride=2, backend="cpu"), input, weight, bias, grad
    )
    assert all(result.isfinite().all() for result in results)
