"""Outputs of 8 MB and more, which the cpu backend may write past the caches."""

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

# Input, output channels, kernel, groups: pointwise, direct, Winograd, depthwise, and a number of
# channels that fills no whole vectors. Rows are no multiples of a tile.
PROBLEMS = {
    "pointwise": ((1, 16, 185, 183), 64, 1, 1),
    "pointwise_uneven": ((1, 16, 185, 183), 80, 1, 1),
    "direct": ((2, 16, 131, 130), 64, 3, 1),
    "winograd": ((1, 32, 185, 183), 64, 3, 1),
    "depthwise": ((1, 64, 185, 183), 64, 3, 64),
    "no_vectors": ((1, 40, 230, 229), 40, 3, 40),
}
EPILOGUES = ["none", "relu", "relu6", "residual", "pool"]


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_large_outputs(problem, epilogue):
    """Every number is written: whole numbers have exact sums, Winograd's bound is 1e-5 of the
    largest value, before a clamp."""
    shape, out_channels, kernel, groups = problem
    if epilogue == "pool" and groups == 1:
        out_channels *= 4  # a quarter of the pixels is left
    input = testing.integers(*shape, layout="channels_last")
    weight = testing.integers(out_channels, shape[1] // groups, kernel, kernel)
    scale, shift = testing.integers(2, out_channels)
    size = (shape[0], out_channels, *shape[2:])
    residual = testing.integers(*size, layout="channels_last") if epilogue == "residual" else None
    output = FF.conv2d(
        input,
        weight,
        padding=kernel // 2,
        groups=groups,
        scale=scale,
        shift=shift,
        residual=residual,
        activation=epilogue if epilogue.startswith("relu") else None,
        pool=("max", 2) if epilogue == "pool" else None,
        backend="cpu",
    )
    conv = F.conv2d(input.double(), weight.double(), padding=kernel // 2, groups=groups)
    expected = conv * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
    largest = expected.abs().max()
    if epilogue == "residual":
        expected = expected + residual.double()
    elif epilogue == "pool":
        expected = F.max_pool2d(expected, 2)
    elif epilogue != "none":
        expected = getattr(F, epilogue)(expected)
    if kernel == 3 and groups == 1 and shape[1] >= 32:
        assert (output.double() - expected).abs().max() <= 1e-5 * largest
    else:
        assert torch.equal(output.double(), expected)
