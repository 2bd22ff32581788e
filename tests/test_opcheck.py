"""torch.library.opcheck of the conv and linear ops: schema, fakes, registration."""

from __future__ import annotations

import pytest
import torch

from fmkernels import _native, testing
from fmkernels.ops._activations import opmath_dtype

ops = torch.ops.fmkernels
pytestmark = pytest.mark.skipif(
    not _native.HAS_NATIVE, reason="without the native library the ops have no kernel to check"
)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
# The size of a packed weight is known to the kernel alone, so no static graph can hold it.
PACK_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")


@dtypes
@layouts
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("pool", [None, "max"])
def test_conv(dtype, layout, activation, pool):
    input = testing.normal(2, 4, 8, 7, dtype=dtype, layout=layout)
    weight = testing.normal(6, 2, 3, 3, dtype=dtype)
    bias = testing.normal(6, 1, dtype=dtype).flatten()
    scale, shift = (testing.normal(6, 1, dtype=opmath_dtype(dtype)).flatten() for _ in range(2))
    window = (2, 2, 2, 2, 0, 0) if pool else ()
    options = ((1, 1), (1, 1, 1, 1), (1, 1), 2, False, "zeros", activation, pool, window)
    residual = testing.normal(2, 6, 8, 7, dtype=dtype, layout=layout)
    bare = (input, weight, None, None, None, None, None, *options)
    full = (input, weight, bias, scale, shift, residual, None, *options)
    torch.library.opcheck(ops.conv_forward.default, (*bare, False))
    torch.library.opcheck(ops.conv_forward.default, (*full, True))
    output, saved, argmax = ops.conv_forward(*full, True)
    grad = testing.normal(*output.shape, dtype=dtype, layout=layout)
    tensors = (grad, input, weight, bias, scale, output, saved, argmax)
    for needs in (
        (True,) * 6,
        (True, False, False, False, False, False),
        (False, True, True, False, False, True),
    ):
        torch.library.opcheck(ops.conv_backward.default, (*tensors, *options, *needs))


@dtypes
def test_conv_pack_weight(dtype):
    weight = testing.normal(6, 2, 3, 3, dtype=dtype)
    arguments = (weight, (1, 1), (1, 1, 1, 1), (1, 1), 2, False, "zeros")
    torch.library.opcheck(ops.conv_pack_weight.default, arguments, test_utils=PACK_TESTS)


@dtypes
@layouts
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pool2d(dtype, layout, ceil_mode):
    input = testing.normal(2, 5, 9, 8, dtype=dtype, layout=layout)
    options = ((3, 2), (2, 2), (1, 1), (1, 2))
    torch.library.opcheck(ops.max_pool_forward.default, (input, *options, ceil_mode))
    output, argmax = ops.max_pool_forward(input, *options, ceil_mode)
    grad = testing.normal(*output.shape, dtype=dtype, layout=layout)
    arguments = (grad, argmax, input.shape, *options)
    torch.library.opcheck(ops.max_pool_backward.default, arguments)


@dtypes
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_linear(dtype, activation):
    input, weight = testing.normal(2, 3, 7, dtype=dtype), testing.normal(5, 7, dtype=dtype)
    bias, residual = (
        testing.normal(5, 1, dtype=dtype).flatten(),
        testing.normal(2, 3, 5, dtype=dtype),
    )
    full = (input, weight, bias, residual, None, activation)
    torch.library.opcheck(
        ops.linear_forward.default, (input, weight, None, None, None, activation, False)
    )
    torch.library.opcheck(ops.linear_forward.default, (*full, True))
    output, saved = ops.linear_forward(*full, True)
    tensors = (testing.normal(2, 3, 5, dtype=dtype), input, weight, output, saved, activation)
    for needs in ((True,) * 4, (True, False, False, False), (False, True, True, False)):
        torch.library.opcheck(ops.linear_backward.default, (*tensors, *needs))


@dtypes
def test_linear_pack_weight(dtype):
    arguments = (testing.normal(5, 7, dtype=dtype),)
    torch.library.opcheck(ops.linear_pack_weight.default, arguments, test_utils=PACK_TESTS)
