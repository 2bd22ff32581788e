"""Winograd F(4x4, 3x3), which the cpu backend takes for 3x3 convolutions of 32 channels and more:
its error bound, its ragged edges, and the ways around it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fmkernels
import fmkernels.functional as FF
from fmkernels import _native

pytestmark = pytest.mark.skipif(not _native.HAS_NATIVE, reason="needs the native kernels")

# (batch, channels, height, width), output channels, padding: sizes that are and are not multiples
# of the 4x4 tile, fewer rows or columns than a tile, channels that fill the last panel or do not,
# a reduction long enough to be cut, blocks of several images and images of several blocks.
PROBLEMS = [
    ((2, 32, 16, 16), 64, 1),
    ((3, 48, 13, 11), 40, 1),
    ((40, 32, 3, 3), 33, 1),
    ((1, 32, 150, 5), 32, 2),
    ((1, 32, 5, 310), 32, 0),
    ((1, 416, 17, 17), 32, 1),
    ((2, 64, 56, 56), 64, 1),
    ((5, 32, 15, 18), 80, 1),
    ((2, 32, 29, 27), 32, 2),
]
EPILOGUES = [
    {},
    {"activation": "relu", "pool": ("max", 2, 2, 0)},
    {"activation": "gelu", "pool": ("max", 3, 2, 1)},
    {"activation": "relu", "pool": ("max", 3, 1, 1)},
    {"pool": ("max", 2, 7, 0)},  # a stride the fused form does not have: falls back to direct
]


def oracle(input, weight, bias, padding, activation=None, pool=None):
    output = F.conv2d(input, weight, bias, padding=padding)
    if activation:
        output = getattr(F, activation)(output)
    return F.max_pool2d(output, *pool[1:]) if pool else output


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_error_bound(problem, epilogue, memory_format):
    """1e-5 of the largest output, and of the largest entry of each gradient."""
    size, out_channels, padding = problem
    input = torch.randn(size).to(memory_format=memory_format)
    weight = torch.randn(out_channels, size[1], 3, 3) / (9 * size[1]) ** 0.5
    bias = torch.randn(out_channels)
    height = size[2] + 2 * padding - 2
    if epilogue.get("pool", ("max", 0))[1] > height:
        pytest.skip("the pooling window is larger than the image")
    ours = [t.clone().requires_grad_() for t in (input, weight, bias)]
    exact = [t.double().requires_grad_() for t in (input, weight, bias)]
    output = FF.conv2d(*ours, padding=padding, backend="cpu", **epilogue)
    expected = oracle(*exact, padding, **epilogue)
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
    # relu and max are not smooth: a rounding may move a gradient, so those are compared without.
    if epilogue.get("activation") == "relu" or "pool" in epilogue:
        return
    grad = torch.randn_like(output)
    output.backward(grad)
    expected.backward(grad.double())
    for actual, wanted in zip(ours, exact, strict=True):
        assert (actual.grad - wanted.grad).abs().max() <= 1e-5 * wanted.grad.abs().max()


# (batch, channels, depth, height, width), output channels; taps, padding, dilation of the depth:
# kernels of one and more planes, planes in the padding, more taps than planes, several images.
DEEP_PROBLEMS = [
    ((2, 32, 5, 13, 11), 40, 3, 1, 1),
    ((1, 48, 7, 10, 9), 33, 3, 0, 2),
    ((1, 32, 4, 16, 16), 32, 1, 0, 1),
    ((3, 32, 2, 6, 30), 32, 2, 1, 1),
    ((1, 64, 6, 17, 15), 64, 5, 2, 1),
    ((1, 32, 2, 20, 20), 48, 3, 1, 1),
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("problem", DEEP_PROBLEMS, ids=str)
def test_error_bound_of_three_axes(problem, transposed, memory_format):
    """Products of several planes are added up before they are transformed back."""
    size, out_channels, taps, padding, dilation = problem
    options = {"padding": (padding, 1, 1), "dilation": (dilation, 1, 1)}
    input = torch.randn(size).to(memory_format=memory_format)
    scale = (9 * taps * size[1]) ** -0.5
    weight = torch.randn(out_channels, size[1], taps, 3, 3) * scale
    weight = weight.transpose(0, 1).contiguous() if transposed else weight
    bias = torch.randn(out_channels)
    ours = [t.clone().requires_grad_() for t in (input, weight, bias)]
    exact = [t.double().requires_grad_() for t in (input, weight, bias)]
    run, oracle = (
        (FF.conv_transpose3d, F.conv_transpose3d) if transposed else (FF.conv3d, F.conv3d)
    )
    output, expected = run(*ours, backend="cpu", **options), oracle(*exact, **options)
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
    with fmkernels.precision("exact"), torch.no_grad():
        direct = run(*ours, backend="cpu", **options)
    assert not torch.equal(output, direct), "this convolution was meant to be a Winograd one"
    grad = torch.randn_like(output)
    output.backward(grad)
    expected.backward(grad.double())
    for actual, wanted in zip(ours, exact, strict=True):
        assert (actual.grad - wanted.grad).abs().max() <= 1e-5 * wanted.grad.abs().max()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_epilogue_of_three_axes(activation, memory_format):
    """Scale, shift, residual, activation and their gradients, in planes of their own images."""
    input = torch.randn(2, 32, 4, 9, 10).to(memory_format=memory_format)
    weight = torch.randn(40, 32, 3, 3, 3) / 30
    scale, shift = torch.rand(40) + 0.5, torch.randn(40)
    residual = torch.randn(2, 40, 4, 9, 10).to(memory_format=memory_format)
    ours = [t.clone().requires_grad_() for t in (input, weight, scale, shift, residual)]
    exact = [t.double().requires_grad_() for t in (input, weight, scale, shift, residual)]
    output = FF.conv3d(
        *ours[:2], padding=1, scale=ours[2], shift=ours[3], residual=ours[4],
        activation=activation, backend="cpu",
    )  # fmt: skip
    x, w, a, b, r = exact
    per_channel = (1, -1, 1, 1, 1)
    z = F.conv3d(x, w, padding=1) * a.view(per_channel) + b.view(per_channel) + r
    expected = getattr(F, activation)(z) if activation else z
    assert (output - expected).abs().max() <= 1e-5 * z.abs().max()
    if activation == "relu":  # not smooth: a rounding may move a gradient
        return
    grad = torch.randn_like(output)
    output.backward(grad)
    expected.backward(grad.double())
    for actual, wanted in zip(ours, exact, strict=True):
        assert (actual.grad - wanted.grad).abs().max() <= 1e-5 * wanted.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_storage(dtype):
    """Transforms and products are computed in float, so only the output's rounding is lost."""
    input = torch.randn(2, 64, 14, 14).to(dtype)
    weight = (torch.randn(64, 64, 3, 3) / 24).to(dtype)
    output = FF.conv2d(input, weight, padding=1, backend="cpu")
    expected = F.conv2d(input.double(), weight.double(), padding=1)
    rounding = (expected.to(dtype).double() - expected).abs().max()
    assert (output.double() - expected).abs().max() <= 1.1 * rounding


def test_exact_precision_is_direct():
    """precision("exact") also holds for a weight that was packed for Winograd."""
    input = torch.randint(-3, 4, (1, 64, 20, 20)).float()
    weight = torch.randint(-2, 3, (64, 64, 3, 3)).float()
    layer = fmkernels.nn.Conv2d(64, 64, 3, padding=1, bias=False, backend="cpu").eval()
    with torch.no_grad():
        layer.weight.copy_(weight)
    fmkernels.freeze(layer)
    expected = F.conv2d(input.double(), weight.double(), padding=1).float()
    with torch.no_grad():
        fast = layer(input)
        with fmkernels.precision("exact"):
            assert torch.equal(layer(input), expected)
    assert not torch.equal(fast, expected), "this convolution was meant to be a Winograd one"
    assert (fast - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_few_tiles_of_a_large_frozen_weight_are_direct():
    """Frozen for images of any size, a large weight serves small ones without Winograd."""
    layer = fmkernels.nn.Conv2d(288, 256, 3, padding=1, bias=False, backend="cpu").eval()
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-2, 3, layer.weight.shape))
    fmkernels.freeze(layer)
    for size, direct in ((5, True), (20, False)):
        input = torch.randint(-3, 4, (1, 288, size, size)).float()
        expected = F.conv2d(input.double(), layer.weight.double(), padding=1).float()
        with torch.no_grad():
            output = layer(input)
        assert torch.equal(output, expected) == direct
        assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_low_precision_gradients(memory_format):
    """The weight's gradient, too, loses no more than its rounding."""
    input = torch.randn(2, 64, 30, 26).bfloat16().to(memory_format=memory_format)
    weight = (torch.randn(48, 64, 3, 3) / 24).bfloat16()
    ours = [t.clone().requires_grad_() for t in (input, weight)]
    exact = [t.double().requires_grad_() for t in (input, weight)]
    output = FF.conv2d(*ours, padding=1, backend="cpu")
    grad = torch.randn_like(output)
    output.backward(grad)
    F.conv2d(*exact, padding=1).backward(grad.double())
    for actual, wanted in zip(ours, exact, strict=True):
        rounding = (wanted.grad.bfloat16().double() - wanted.grad).abs().max()
        assert (actual.grad.double() - wanted.grad).abs().max() <= 1.1 * rounding


def test_same_bits_every_time():
    input = torch.randn(3, 64, 27, 30, requires_grad=True)
    weight = torch.randn(64, 64, 3, 3, requires_grad=True)
    runs = []
    for _ in range(3):
        output = FF.conv2d(input, weight, padding=1, backend="cpu")
        runs.append(
            (output.detach(), *torch.autograd.grad(output.square().sum(), (input, weight)))
        )
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_packed_weight_of_another_form_is_refused():
    weight = torch.randn(32, 32, 3, 3)
    arguments = ([1, 1], [1, 1, 1, 1], [1, 1], 1, False, "zeros")
    packed = torch.ops.fmkernels.conv_pack_weight(weight, *arguments, False)
    input = torch.randn(1, 32, 8, 8)
    run = torch.ops.fmkernels.conv_forward
    strided = run(
        input,
        weight,
        None,
        None,
        None,
        None,
        packed,
        [2, 2],
        *arguments[1:],
        None,
        None,
        [],
        False,
        False,
    )[0]
    torch.testing.assert_close(
        strided, F.conv2d(input, weight, stride=2, padding=1), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(RuntimeError, match="packed_weight"):
        run(
            input,
            weight,
            None,
            None,
            None,
            None,
            packed[:-1].contiguous(),
            *arguments,
            None,
            None,
            [],
            False,
            False,
        )


def test_nan_stays_within_a_tile():
    """A NaN spreads over the tiles whose window holds it, as documented, and no further."""
    input = torch.randn(1, 32, 24, 24)
    input[0, 5, 10, 10] = float("nan")
    weight = torch.randn(32, 32, 3, 3)
    nan = FF.conv2d(input, weight, padding=1, backend="cpu").isnan()
    assert nan[:, :, 9:12, 9:12].all()
    assert not nan[:, :, :4].any() and not nan[:, :, 16:].any()
