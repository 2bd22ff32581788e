"""Whatever conv, linear and pooling are given: PyTorch's result, or an error with a name in it.

The fuzzers run in this process: a kernel that crashes on an input ends the run.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fmkernels.functional as FF
from fmkernels import testing
from fmkernels.ops import _activations

HUGE = (2**31 - 1, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**30)


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


CONV2D = {
    "input_type": ({"input": [1.0]}, TypeError, "input must be a Tensor"),
    "input_dtype": (
        {"input": zeros(1, 4, 6, 6, dtype=torch.int32)},
        TypeError,
        "input must be fl",
    ),
    "input_complex": (
        {"input": zeros(1, 4, 6, 6, dtype=torch.cfloat)},
        TypeError,
        "input must be",
    ),
    "input_sparse": ({"input": zeros(1, 4, 6, 6).to_sparse()}, TypeError, "input must be a dense"),
    "input_rank": ({"input": zeros(4, 6)}, ValueError, "input must have 3 or 4 dimensions"),
    "input_empty": ({"input": zeros(1, 4, 0, 6)}, ValueError, "input may be empty in its batch"),
    "channels": ({"input": zeros(1, 5, 6, 6)}, ValueError, "weight must have 5 in its second"),
    "weight_rank": ({"weight": zeros(4, 4, 3)}, ValueError, "weight must have 4 dimensions"),
    "weight_empty": ({"weight": zeros(0, 4, 3, 3)}, ValueError, "weight must not be empty"),
    "weight_no_kernel": ({"weight": zeros(8, 4, 0, 3)}, ValueError, "weight must not be empty"),
    "weight_dtype": (
        {"weight": zeros(8, 4, 3, 3).double()},
        TypeError,
        "weight must have the dtype",
    ),
    "weight_device": (
        {"weight": zeros(8, 4, 3, 3, device="meta")},
        RuntimeError,
        "weight must be on the device of input",
    ),
    "kernel_too_large": (
        {"weight": zeros(8, 4, 7, 3)},
        ValueError,
        "weight is too large for input",
    ),
    "bias_shape": ({"bias": zeros(4)}, ValueError, r"bias must have shape \(8,\)"),
    "bias_dtype": ({"bias": zeros(8).half()}, TypeError, "bias must have the dtype of input"),
    "scale_shape": ({"scale": zeros(8, 1, 1)}, ValueError, r"scale must have shape \(8,\)"),
    "shift_shape": ({"shift": zeros(())}, ValueError, r"shift must have shape \(8,\)"),
    "residual": (
        {"residual": zeros(1, 8, 1, 1)},
        ValueError,
        r"residual must have shape \(1, 8, 4",
    ),
    "stride_zero": ({"stride": 0}, ValueError, "stride must be in"),
    "stride_negative": ({"stride": (1, -2)}, ValueError, r"stride\[1\] must be in"),
    "stride_type": ({"stride": 1.5}, TypeError, "stride must be an int"),
    "stride_bool": ({"stride": True}, TypeError, "stride must be an int"),
    "stride_length": ({"stride": (1, 1, 1)}, ValueError, "stride must have 2 elements"),
    "padding_negative": ({"padding": -1}, ValueError, "padding must be in"),
    "padding_huge": ({"padding": 2**62}, ValueError, "padding must be in"),
    "padding_name": ({"padding": "full"}, ValueError, "padding must be one of 'same', 'valid'"),
    "padding_same": (
        {"padding": "same", "stride": 2},
        ValueError,
        "padding 'same' needs a stride",
    ),
    "dilation_zero": ({"dilation": 0}, ValueError, "dilation must be in"),
    "dilation_huge": ({"dilation": 2**63}, ValueError, "dilation must be in"),
    "dilation_wide": ({"dilation": 2**31 - 1}, ValueError, "weight is too large for input"),
    "groups_zero": ({"groups": 0}, ValueError, "groups must be in"),
    "groups_uneven": ({"groups": 3}, ValueError, "groups must divide the 4 channels"),
    "groups_type": ({"groups": None}, TypeError, "groups must be an int"),
    "padding_mode": ({"padding_mode": "mirror"}, ValueError, "padding_mode must be one of"),
    "reflect": (
        {"padding_mode": "reflect", "padding": 6},
        ValueError,
        r"padding\[0\] must be at mo",
    ),
    "activation": ({"activation": "swish"}, ValueError, "activation must be one of None, 'relu'"),
    "activation_type": ({"activation": torch.relu}, ValueError, "activation must be one of"),
    "pool_type": ({"pool": "max"}, TypeError, "pool must be None or a tuple"),
    "pool_kind": ({"pool": ("min", 2)}, ValueError, r"pool\[0\] must be one of 'max', 'avg'"),
    "pool_window": ({"pool": ("max", 0)}, ValueError, "pool: kernel_size must be in"),
    "pool_padding": (
        {"pool": ("max", 2, 2, 2)},
        ValueError,
        r"pool: padding\[0\] must be at most",
    ),
    "pool_large": ({"pool": ("max", 5)}, ValueError, "pool: the conv's output is too small"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of"),
    "packed_type": ({"packed_weight": zeros(8)}, TypeError, "packed_weight must be a 1-D uint8"),
}


@pytest.mark.parametrize(("change", "error", "message"), CONV2D.values(), ids=CONV2D.keys())
def test_conv2d_names_the_argument(change, error, message):
    arguments = {"input": zeros(1, 4, 6, 6), "weight": zeros(8, 4, 3, 3)}
    with pytest.raises(error, match=message):
        FF.conv2d(**(arguments | change))


CONV1D = {
    "input_rank": ({"input": zeros(1, 4, 6, 6)}, ValueError, "input must have 2 or 3 dimensions"),
    "weight_rank": ({"weight": zeros(8, 4, 3, 3)}, ValueError, "weight must have 3 dimensions"),
    "stride": ({"stride": (1, 1)}, ValueError, "stride must have 1 elements"),
    "kernel": ({"dilation": 9}, ValueError, "weight is too large for input"),
    "residual": (
        {"residual": zeros(1, 8, 7)},
        ValueError,
        r"residual must have shape \(1, 8, 4\)",
    ),
    "pool": ({"pool": ("max", (2, 2))}, ValueError, "pool: kernel_size must have 1 elements"),
}


@pytest.mark.parametrize(("change", "error", "message"), CONV1D.values(), ids=CONV1D.keys())
def test_conv1d_names_the_argument(change, error, message):
    arguments = {"input": zeros(1, 4, 6), "weight": zeros(8, 4, 3)}
    with pytest.raises(error, match=message):
        FF.conv1d(**(arguments | change))


LINEAR = {
    "input_type": ({"input": None}, TypeError, "input must be a Tensor"),
    "input_dtype": ({"input": zeros(2, 3, dtype=torch.bool)}, TypeError, "input must be float32"),
    "input_scalar": ({"input": zeros(())}, ValueError, "input must have in_features = 3"),
    "features": ({"input": zeros(2, 4)}, ValueError, "input must have in_features = 3"),
    "weight_rank": ({"weight": zeros(3)}, ValueError, "weight must have 2 dimensions"),
    "weight_empty": ({"weight": zeros(0, 3)}, ValueError, "weight must not be empty"),
    "weight_dtype": (
        {"weight": zeros(5, 3).half()},
        TypeError,
        "weight must have the dtype of inp",
    ),
    "bias_shape": ({"bias": zeros(1)}, ValueError, r"bias must have shape \(5,\)"),
    "bias_device": ({"bias": zeros(5, device="meta")}, RuntimeError, "bias must be on the device"),
    "residual": ({"residual": zeros(5)}, ValueError, r"residual must have shape \(2, 5\)"),
    "activation": ({"activation": "GELU"}, ValueError, "activation must be one of"),
    "packed": ({"packed_weight": zeros(2, 2)}, TypeError, "packed_weight must be a 1-D uint8"),
}


@pytest.mark.parametrize(("change", "error", "message"), LINEAR.values(), ids=LINEAR.keys())
def test_linear_names_the_argument(change, error, message):
    arguments = {"input": zeros(2, 3), "weight": zeros(5, 3)}
    with pytest.raises(error, match=message):
        FF.linear(**(arguments | change))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 1000, 10**6])
def test_garbage_for_a_packed_weight_is_refused_or_ignored(size):
    garbage = torch.full((size,), 255, dtype=torch.uint8)
    input, weight = torch.randn(2, 3), torch.randn(5, 3)
    image, kernel = torch.randn(1, 4, 6, 6), torch.randn(8, 4, 3, 3)
    for call, expected in (
        (lambda: FF.linear(input, weight, packed_weight=garbage), F.linear(input, weight)),
        (lambda: FF.conv2d(image, kernel, packed_weight=garbage), F.conv2d(image, kernel)),
    ):
        try:
            output = call()
        except (ValueError, RuntimeError) as error:
            assert "pack" in str(error)
        else:
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


# --- fuzzing ---

NAMES = (
    "input", "weight", "bias", "stride", "padding", "dilation", "groups", "residual", "scale",
    "shift", "pool", "activation", "kernel_size",
)  # fmt: skip
sizes = st.integers(0, 9)
odd_integers = st.one_of(
    st.integers(-3, 4),
    st.integers(0, 2),
    st.sampled_from(HUGE),
    st.sampled_from([None, 1.0, True]),
)
integer_options = st.one_of(odd_integers, st.tuples(odd_integers, odd_integers), st.just(()))
dtypes = st.sampled_from([*testing.DTYPES[:2], torch.float64, torch.int64])
activations = st.sampled_from([*_activations.CHOICES, "swish"])


def shapes(rank):
    return st.one_of(
        st.lists(sizes, min_size=rank, max_size=rank).map(tuple),
        st.lists(st.integers(1, 6), min_size=rank, max_size=rank).map(tuple),
        st.lists(sizes, max_size=5).map(tuple),
    )


def named(error: Exception) -> bool:
    return any(name in str(error) for name in NAMES)


def call_or_refuse(function, *args, **kwargs):
    """The result; None if it was refused with an argument's name, or is too large to allocate."""
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        too_large = "alloc" in str(error) or "overflow" in str(error)
        assert named(error) or too_large, repr(error)
        return None


def run_backward(output, *leaves):
    if output is not None and output.requires_grad:
        output.sum().backward()
        for leaf in leaves:
            if leaf is not None and leaf.requires_grad:
                assert leaf.grad is None or leaf.grad.shape == leaf.shape


def make(shape, dtype, grad=False):
    tensor = (
        torch.zeros(shape, dtype=dtype) if dtype is torch.int64 else torch.randn(shape).to(dtype)
    )
    return tensor.requires_grad_(grad and tensor.is_floating_point())


def small_output(shape, padding):
    """Whether the output of a valid call stays small enough for a test."""
    largest = [p for p in (padding if isinstance(padding, tuple) else (padding,))]
    return all(not isinstance(p, int) or p < 100 or p > 2**31 for p in largest)


@settings(max_examples=400)
@given(
    st.data(),
    shapes(4),
    shapes(4),
    dtypes,
    dtypes,
    integer_options,
    integer_options,
    integer_options,
    odd_integers,
    activations,
    st.booleans(),
)
def test_fuzz_conv2d(
    data,
    input_shape,
    weight_shape,
    dtype,
    other,
    stride,
    padding,
    dilation,
    groups,
    activation,
    grad,
):
    if not small_output(input_shape, padding):
        padding = 0
    if data.draw(st.booleans()):  # mostly matching arguments reach the kernels
        weight_shape = (*weight_shape[:1], *input_shape[1:2], *weight_shape[2:])
        groups, other = 1, dtype
    input, weight = make(input_shape, dtype, grad), make(weight_shape, other, grad)
    pool = data.draw(
        st.one_of(
            st.none(), st.tuples(st.sampled_from(["max", "avg"]), odd_integers, odd_integers)
        )
    )
    bias = make(data.draw(st.sampled_from([weight_shape[:1], (3,)])), dtype, grad)
    options = (stride, padding, dilation, groups)
    output = call_or_refuse(
        FF.conv2d, input, weight, bias, *options, activation=activation, pool=pool
    )
    if output is not None and dtype is torch.float64:
        expected = testing.torch_activation(activation, F.conv2d(input, weight, bias, *options))
        if pool is None:
            torch.testing.assert_close(output, expected)
    run_backward(output, input, weight, bias)


@settings(max_examples=200)
@given(shapes(4), dtypes, *[integer_options] * 4, st.booleans(), st.booleans())
def test_fuzz_max_pool2d(shape, dtype, kernel_size, stride, padding, dilation, ceil_mode, grad):
    input = make(shape, dtype, grad)
    options = (kernel_size, stride, padding, dilation, ceil_mode)
    output = call_or_refuse(FF.max_pool2d, input, *options)
    if output is not None:
        assert torch.equal(output, F.max_pool2d(input, *options))
    run_backward(output, input)


@settings(max_examples=200)
@given(st.data(), shapes(3), shapes(2), dtypes, dtypes, activations, st.booleans())
def test_fuzz_linear(data, input_shape, weight_shape, dtype, other, activation, grad):
    if data.draw(st.booleans()):
        weight_shape, other = (*weight_shape[:1], *input_shape[-1:]), dtype
    input, weight = make(input_shape, dtype, grad), make(weight_shape, other, grad)
    bias = make(data.draw(st.sampled_from([weight_shape[:1], (3,)])), dtype, grad)
    output = call_or_refuse(FF.linear, input, weight, bias, activation=activation)
    if output is not None and dtype is torch.float64:
        expected = testing.torch_activation(activation, F.linear(input, weight, bias))
        torch.testing.assert_close(output, expected)
    run_backward(output, input, weight, bias)
