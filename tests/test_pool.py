"""max_pool2d against PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fmkernels
import fmkernels.functional as FF
from fmkernels import testing
from fmkernels.ops.conv.backends import MAX_POOL

BACKENDS = testing.available_backends(MAX_POOL, torch.zeros(1, 1, 1, 1), (2, 2))

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])

# name: input shape, (kernel_size, stride, padding, dilation, ceil_mode)
PROBLEMS = {
    "2x2": ((2, 5, 8, 10), (2, None, 0, 1, False)),
    "2x2_odd": ((2, 5, 9, 11), (2, None, 0, 1, False)),
    "2x2_ceil": ((2, 5, 9, 11), (2, None, 0, 1, True)),
    "3x3_resnet": ((2, 19, 13, 12), (3, 2, 1, 1, False)),
    "3x3_overlap": ((1, 33, 7, 9), (3, 1, 1, 1, False)),
    "3x3_ceil_padded": ((1, 3, 8, 8), (3, 2, 1, 1, True)),
    "rectangular": ((2, 4, 9, 7), ((3, 2), (1, 2), (1, 0), 1, False)),
    "dilated": ((2, 4, 14, 13), ((3, 2), 2, 1, (2, 3), False)),
    "gaps": ((2, 4, 14, 13), (2, 5, 0, 1, False)),
    "row": ((2, 3, 1, 17), ((1, 4), None, (0, 2), 1, True)),
    "global": ((2, 3, 7, 6), ((7, 6), None, 0, 1, False)),
    "area256": ((1, 2, 18, 17), (16, 1, 3, 1, False)),
}
problems = pytest.mark.parametrize(("shape", "options"), PROBLEMS.values(), ids=PROBLEMS.keys())


def skip_long_interpretation(backend, options, *variant):
    """Of each test one variant of 256 taps is interpreted, the others are not."""
    once = (torch.float32, "channels_last"), (torch.float32, "contiguous", "narrowed")
    if backend == "triton" and options[0] == 16 and variant not in once:
        pytest.skip(
            "Triton's interpreter needs up to half a minute for 256 taps: "
            f"{' and '.join('-'.join(map(str, chosen)) for chosen in once)} run instead"
        )


@problems
@layouts
@dtypes
def test_matches_torch_bit_by_bit(shape, options, layout, dtype, backend):
    skip_long_interpretation(backend, options, dtype, layout)
    # Integers tie: the first maximum must be the one that is chosen.
    input = testing.integers(*shape, dtype=dtype, layout=layout, low=-4, high=4)
    expected = F.max_pool2d(input, *options, return_indices=True)
    actual = FF.max_pool2d(input, *options, return_indices=True, backend=backend)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert actual[1].dtype is torch.int64
    if min(shape) > 1 and min(expected[0].shape) > 1:
        channels_last = layout == "channels_last"
        assert actual[0].is_contiguous(memory_format=torch.channels_last) == channels_last


@problems
@layouts
@dtypes
@pytest.mark.parametrize("grad_layout", ["contiguous", "expanded", "narrowed"])
def test_gradient(shape, options, layout, dtype, grad_layout, backend):
    skip_long_interpretation(backend, options, dtype, layout, grad_layout)
    input = testing.integers(*shape, dtype=dtype, layout=layout, low=-4, high=4)
    testing.compare(
        lambda input: FF.max_pool2d(input, *options, backend=backend),
        lambda input: F.max_pool2d(input, *options),
        {"input": input},
        grad_layout=grad_layout,
    )


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("grad_layout", testing.GRADIENT_LAYOUTS)
def test_any_strides(layout, grad_layout, backend):
    testing.compare(
        lambda input: FF.max_pool2d(input, 3, 2, 1, backend=backend),
        lambda input: F.max_pool2d(input, 3, 2, 1),
        {"input": testing.normal(2, 4, 9, 8, layout=layout)},
        grad_layout=grad_layout,
    )


@layouts
@dtypes
def test_special_values(layout, dtype, backend):
    input = testing.normal(2, 19, 8, 8, dtype=dtype, layout=layout)
    input[0, 1, 3, 3] = float("nan")
    input[0, 2] = -float("inf")
    input[1, :, 5, 5] = float("inf")
    for window in ((2, 2, 0), (3, 2, 1), (3, 1, 1)):
        expected, positions = F.max_pool2d(input, *window, return_indices=True)
        actual, found = FF.max_pool2d(input, *window, return_indices=True, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found, positions)


def test_gradcheck(backend):
    input = torch.randperm(2 * 3 * 6 * 7).to(torch.float64).view(2, 3, 6, 7).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: FF.max_pool2d(x, (3, 2), 2, 1, (1, 2), True, backend=backend), (input,)
    )


def test_unbatched_and_empty_batch(backend):
    input = torch.randn(4, 8, 9)
    actual = FF.max_pool2d(input, 2, return_indices=True, backend=backend)
    expected = F.max_pool2d(input, 2, return_indices=True)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    empty = torch.empty(0, 4, 8, 9, requires_grad=True)
    output = FF.max_pool2d(empty, 2, backend=backend)
    assert output.shape == (0, 4, 4, 4)
    output.sum().backward()
    assert empty.grad.shape == empty.shape


def test_indices_carry_no_gradient(backend):
    input = torch.randn(1, 2, 6, 6, requires_grad=True)
    output, indices = FF.max_pool2d(input, 2, return_indices=True, backend=backend)
    assert output.requires_grad and not indices.requires_grad


def test_large_window_is_left_to_torch(backend):
    input = torch.randn(1, 2, 20, 20)
    fmkernels._dispatch.clear_decisions()
    assert torch.equal(FF.max_pool2d(input, 17), F.max_pool2d(input, 17))
    (decision,) = fmkernels.last_decisions()
    assert decision.op == "max_pool2d" and "256 elements" in str(decision)
    if backend != "reference":
        with pytest.raises(fmkernels.UnsupportedError, match="256 elements"):
            FF.max_pool2d(input, 17, backend=backend)


@pytest.mark.parametrize("grad", [False, True])
def test_compile(grad, backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: FF.max_pool2d(x, 3, 2, 1, backend=backend), fullgraph=True, backend="aot_eager"
    )
    input = torch.randn(2, 3, 9, 9, requires_grad=grad)
    assert torch.equal(compiled(input), F.max_pool2d(input, 3, 2, 1))
    if grad:
        (actual,) = torch.autograd.grad(compiled(input).square().sum(), input)
        (expected,) = torch.autograd.grad(F.max_pool2d(input, 3, 2, 1).square().sum(), input)
        torch.testing.assert_close(actual, expected)


BAD = {
    "rank": ({"input": torch.zeros(3, 4)}, ValueError, "input must have 3 or 4 dimensions"),
    "dtype": (
        {"input": torch.zeros(1, 4, 4, dtype=torch.int64)},
        TypeError,
        "input must be float",
    ),
    "empty": ({"input": torch.zeros(1, 2, 0, 4)}, ValueError, "input may be empty in its batch"),
    "kernel": ({"kernel_size": 0}, ValueError, "kernel_size must be in"),
    "kernel_type": ({"kernel_size": 2.0}, TypeError, "kernel_size must be an int"),
    "stride": ({"stride": (1, -1)}, ValueError, r"stride\[1\] must be in"),
    "stride_length": ({"stride": (1, 1, 1)}, ValueError, "stride must have 2 elements"),
    "padding": ({"padding": 2}, ValueError, r"padding\[0\] must be at most half"),
    "dilation": ({"dilation": 2**40}, ValueError, "dilation must be in"),
    "too_small": ({"kernel_size": 9}, ValueError, "input is too small to pool"),
    "ceil_mode": ({"ceil_mode": 1}, TypeError, "ceil_mode must be a bool"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(change, error, message, backend):
    arguments = {"input": torch.zeros(1, 2, 6, 6), "kernel_size": 2, "backend": backend}
    with pytest.raises(error, match=message):
        FF.max_pool2d(**(arguments | change))


AVERAGES = {
    "2x2": ((2, 5, 8, 10), (2,)),
    "padded": ((2, 19, 9, 7), (3, 2, 1)),
    "uncounted": ((1, 5, 9, 8), ((3, 2), 2, 1, False, False)),
    "ceil": ((1, 5, 9, 11), (3, 2, 1, True)),
    "ceil_uncounted": ((1, 33, 9, 11), (3, 2, 1, True, False)),
    "divisor": ((1, 4, 7, 7), (3, 1, 0, False, True, 5)),
    "gaps": ((1, 4, 11, 11), (2, 4)),
    "global": ((2, 20, 7, 6), ((7, 6),)),
}


@pytest.mark.parametrize(("shape", "options"), AVERAGES.values(), ids=AVERAGES)
@layouts
@dtypes
@pytest.mark.parametrize("grad_layout", ["contiguous", "expanded"])
def test_average(shape, options, layout, dtype, grad_layout, backend):
    testing.compare(
        lambda input: FF.avg_pool2d(input, *options, backend=backend),
        lambda input: F.avg_pool2d(input, *options),
        {"input": testing.normal(*shape, dtype=dtype, layout=layout)},
        grad_layout=grad_layout,
    )


def test_average_of_bad_arguments(backend):
    input = torch.zeros(1, 2, 6, 6)
    with pytest.raises(ValueError, match="divisor_override must be in"):
        FF.avg_pool2d(input, 2, divisor_override=0, backend=backend)
    with pytest.raises(TypeError, match="count_include_pad must be a bool"):
        FF.avg_pool2d(input, 2, count_include_pad=1, backend=backend)
