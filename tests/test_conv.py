"""conv1d, conv2d and their layers against PyTorch."""

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
from fmkernels.ops import _activations
from fmkernels.ops.conv.autograd import pack_conv_weight
from fmkernels.ops.conv.backends import CONV
from fmkernels.ops.conv.geometry import ConvOptions

PROBE = torch.zeros(1, 1, 1, 1)
PLAIN = ConvOptions((1, 1), (1, 1, 1, 1), (1, 1))
BACKENDS = testing.available_backends(CONV, PROBE, PROBE, PLAIN)
ACTIVATIONS = _activations.NAMES

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])

# name: input shape, output channels, kernel, stride, padding, dilation, groups
PROBLEMS = {
    "plain3x3": ((2, 5, 9, 11), 7, (3, 3), 1, 1, 1, 1),
    "wide": ((2, 32, 14, 15), 40, (3, 3), 1, 1, 1, 1),
    "one_channel": ((3, 1, 10, 9), 6, (5, 5), 1, 0, 1, 1),
    "pointwise": ((2, 19, 7, 6), 33, (1, 1), 1, 0, 1, 1),
    "pointwise_many_images": ((9, 32, 5, 3), 40, (1, 1), 1, 0, 1, 1),
    "pointwise_padded": ((2, 16, 6, 7), 24, (1, 1), 1, (1, 0), 1, 1),
    "pointwise_grouped": ((2, 32, 6, 7), 48, (1, 1), 1, 0, 1, 2),
    "pointwise_strided": ((2, 16, 9, 8), 16, (1, 1), 2, 0, 1, 1),
    "strided": ((2, 6, 13, 10), 8, (3, 3), 2, 1, 1, 1),
    "rectangular": ((1, 4, 12, 9), 5, (1, 7), (2, 1), (0, 3), 1, 1),
    "dilated": ((2, 4, 15, 14), 6, (3, 3), 1, (2, 3), (2, 3), 1),
    "stride_over_kernel": ((1, 3, 11, 11), 4, (2, 2), 3, 1, 1, 1),
    "padding_over_kernel": ((1, 3, 4, 5), 4, (3, 3), 1, 4, 1, 1),
    "grouped": ((2, 8, 9, 9), 12, (3, 3), 1, 1, 1, 4),
    # As many output channels in all as one panel of the kernels holds, but one in each group.
    "groups_of_one_output": ((2, 32, 9, 8), 16, (3, 3), 1, 1, 1, 16),
    "depthwise": ((2, 17, 10, 9), 17, (3, 3), 1, 1, 1, 17),
    "depthwise_multiplier": ((1, 6, 9, 8), 12, (5, 5), 2, 2, 1, 6),
    "whole_image": ((3, 4, 6, 5), 9, (6, 5), 1, 0, 1, 1),
    "kernel7_stem": ((1, 3, 33, 31), 16, (7, 7), 2, 3, 1, 1),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def make_arguments(problem, dtype, layout="contiguous", make=testing.normal):
    shape, out_channels, kernel, _, _, _, groups = problem
    fan_in = shape[1] // groups * kernel[0] * kernel[1]
    arguments = {
        "input": make(*shape, dtype=dtype, layout=layout),
        "weight": make(out_channels, shape[1] // groups, *kernel, dtype=dtype),
        "bias": make(out_channels, 1, dtype=dtype).flatten(),
    }
    if make is testing.normal:
        arguments["weight"] = arguments["weight"] / fan_in**0.5
    return arguments


def torch_conv2d(
    input,
    weight,
    bias=None,
    scale=None,
    shift=None,
    residual=None,
    *,
    conv=(),
    activation=None,
    pool=None,
):
    """The epilogue's definition, op by op."""
    output = F.conv2d(input, weight, bias, *conv)
    if scale is not None:
        output = output * scale.view(-1, 1, 1)
    if shift is not None:
        output = output + shift.view(-1, 1, 1)
    if residual is not None:
        output = output + residual
    output = testing.torch_activation(activation, output)
    if pool is not None:
        pooling = {"max": F.max_pool2d, "avg": F.avg_pool2d}[pool[0]]
        output = pooling(output, *pool[1:])
    return output


def check(
    arguments, conv, backend, *, grad_layout="contiguous", integer_gradients=False, **options
):
    testing.compare(
        lambda input, weight, bias=None, **kw: FF.conv2d(
            input, weight, bias, *conv, backend=backend, **options, **kw
        ),
        lambda **kw: torch_conv2d(**kw, conv=conv, **options),
        arguments,
        grad_layout=grad_layout,
        integer_gradients=integer_gradients,
    )


@problems
@layouts
@dtypes
def test_matches_torch(problem, layout, dtype, backend):
    check(make_arguments(problem, dtype, layout), problem[3:], backend)


@problems
@layouts
def test_integers_are_exact(problem, layout, backend):
    """Without Winograd, whose transforms are not made of integers."""
    arguments = make_arguments(problem, torch.float32, layout, make=testing.integers)
    with fmkernels.precision("exact"):
        output = FF.conv2d(**arguments, **conv_options(problem), backend=backend)
    assert torch.equal(output, F.conv2d(**arguments, **conv_options(problem)))


def conv_options(problem):
    return dict(zip(("stride", "padding", "dilation", "groups"), problem[3:], strict=True))


@pytest.mark.parametrize("problem", [PROBLEMS["plain3x3"], PROBLEMS["wide"], PROBLEMS["grouped"]])
@layouts
def test_output_keeps_the_memory_format(problem, layout, backend):
    arguments = make_arguments(problem, torch.float32, layout)
    arguments["input"].requires_grad_()
    output = FF.conv2d(**arguments, **conv_options(problem), backend=backend)
    channels_last = layout == "channels_last"
    assert output.is_contiguous(memory_format=torch.channels_last) == channels_last
    output.sum().backward()
    grad = arguments["input"].grad
    assert grad.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("activation", ACTIVATIONS)
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.dtype_name)
def test_activation(activation, layout, dtype, backend):
    problem = PROBLEMS["plain3x3"]
    # On integers no two roundings disagree about which side of a kink a value lies.
    make = testing.integers if dtype is torch.bfloat16 else testing.normal
    arguments = make_arguments(problem, dtype, layout, make)
    check(arguments, problem[3:], backend, activation=activation)


POOLS = {
    "max2": ("max", 2, 2, 0),
    "max3": ("max", 3, 2, 1),
    "max3_overlap": ("max", 3, 1, 1),
    "max2_padded": ("max", (2, 2), (2, 1), (1, 0)),
    "max3x2": ("max", (3, 2), 2, (1, 0)),
    "max5": ("max", 5, 3, 2),
    "avg2": ("avg", 2, 2, 0),
    "avg3": ("avg", 3, 2, 1),
    "avg4": ("avg", 4, 3, 1),
}
EXTRAS = {
    "none": (),
    "scale_shift": ("scale", "shift"),
    "residual": ("residual",),
    "all": ("scale", "shift", "residual"),
}


def add_extras(arguments, names, conv, make=testing.normal):
    like = arguments["input"]
    output = F.conv2d(arguments["input"], arguments["weight"], None, *conv)
    for name in names:
        if name == "residual":
            extra = testing.in_layout(make(*output.shape, dtype=like.dtype), "transposed")
        else:
            extra = make(output.shape[1], 1, dtype=like.dtype).flatten()
        arguments[name] = extra


@pytest.mark.parametrize("pool", [None, *POOLS.values()], ids=["nopool", *POOLS])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@layouts
def test_epilogue(pool, activation, extras, layout, backend):
    problem = PROBLEMS["plain3x3"]
    arguments = make_arguments(problem, torch.float32, layout)
    add_extras(arguments, extras, problem[3:])
    check(arguments, problem[3:], backend, activation=activation, pool=pool)


@pytest.mark.parametrize("padding", [1, 0])
@pytest.mark.parametrize("window", [(2, 2, 2, 2, 0, 0), (1, 1, 3, 3, 0, 0)], ids=["last", "gaps"])
@pytest.mark.parametrize("kernel", [3, 2])
@layouts
def test_mask_of_an_average_pool(padding, window, kernel, layout, backend):
    """It holds whether relu let a value through, also where no window covers the value, or 0."""
    input = testing.integers(2, 4, 9, 10, layout=layout)
    weight = testing.integers(5, 4, kernel, kernel)
    options = ((1, 1), (padding,) * 4, (1, 1), 1, False, "zeros", "relu", "avg", window)
    *_, mask = CONV[backend].forward(input, weight, *(None,) * 5, *options, True)
    expected = F.conv2d(input, weight, padding=padding) > 0
    under = torch.zeros(expected.shape[2], dtype=torch.bool)
    for first in range(0, len(under) - window[0] + 1, window[2]):
        under[first : first + window[0]] = True
    assert torch.equal(mask[:, :, under], expected[:, :, under].byte())
    left_out = mask[:, :, ~under]
    assert ((left_out == 0) | (left_out == expected[:, :, ~under])).all()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
@pytest.mark.parametrize("pool", [POOLS["max2"], POOLS["max3"]], ids=["max2", "max3"])
@layouts
def test_fused_pool_without_rounding(dtype, pool, layout, backend):
    """Integers tie often: the first maximum must get the gradient, in every dtype."""
    problem = PROBLEMS["plain3x3"]
    arguments = make_arguments(problem, dtype, layout, testing.integers)
    options = {"activation": "relu", "pool": pool, "integer_gradients": True}
    check(arguments, problem[3:], backend, **options)


@pytest.mark.parametrize("frozen_scale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.dtype_name)
def test_scale_without_gradient_is_fused(frozen_scale, dtype, backend):
    problem = PROBLEMS["wide"]
    arguments = make_arguments(problem, dtype)
    add_extras(arguments, ("scale", "shift", "residual"), problem[3:])
    scale = arguments.pop("scale")
    options = {"activation": "gelu", "pool": ("max", 2, 2, 0)}
    if dtype is torch.bfloat16:
        options = {"activation": None}
    testing.compare(
        lambda input, weight, bias, **kw: FF.conv2d(
            input, weight, bias, 1, 1, scale=scale, backend=backend, **options, **kw
        ),
        lambda **kw: torch_conv2d(
            **kw, scale=scale.to(kw["input"].dtype), conv=problem[3:], **options
        ),
        arguments,
        grad_layout=None if frozen_scale else "contiguous",
    )


@pytest.mark.parametrize("grad_layout", testing.GRADIENT_LAYOUTS)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("pool", [None, ("max", 2, 2, 0)], ids=["nopool", "max2"])
def test_any_strides(grad_layout, layout, pool, backend):
    problem = PROBLEMS["plain3x3"]
    arguments = make_arguments(problem, torch.float32, layout)
    arguments["weight"] = testing.in_layout(arguments["weight"], "strided")
    arguments["bias"] = arguments["bias"].repeat_interleave(2)[::2]
    options = {"activation": "relu", "pool": pool, "grad_layout": grad_layout}
    check(arguments, problem[3:], backend, **options)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5)])
@pytest.mark.parametrize("dilation", [1, 3])
def test_named_padding(padding, kernel, dilation, backend):
    problem = ((2, 3, 11, 13), 4, kernel, 1, padding, dilation, 1)
    check(make_arguments(problem, torch.float32), problem[3:], backend)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, (1, 2), "same"])
def test_padding_mode(mode, padding, backend):
    torch_layer = nn.Conv2d(3, 4, (4, 3), padding=padding, padding_mode=mode)
    input = torch.randn(2, 3, 9, 8)
    output = FF.conv2d(
        input,
        torch_layer.weight,
        torch_layer.bias,
        padding=padding,
        padding_mode=mode,
        backend=backend,
    )
    torch.testing.assert_close(output, torch_layer(input))


def test_unbatched(backend):
    problem = PROBLEMS["plain3x3"]
    arguments = make_arguments(problem, torch.float32)
    arguments["input"] = arguments["input"][0]
    arguments["residual"] = torch.randn(7, 9, 11)
    check(arguments, problem[3:], backend, activation="relu")


@layouts
@pytest.mark.parametrize("pool", [None, ("max", 2, 2, 0), ("max", 3, 1, 1)])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_empty_batch(layout, pool, activation, backend):
    input = torch.empty(0, 3, 8, 8).contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    input.requires_grad_()
    weight, bias = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    options = {"activation": activation, "pool": pool, "backend": backend}
    output = FF.conv2d(input, weight, bias, **options)
    assert output.shape == torch_conv2d(input, weight, bias, pool=pool).shape
    output.sum().backward()
    assert input.grad.shape == input.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


NEEDS = ["input", "weight", "bias", "shift", "residual"]


@pytest.mark.parametrize("needed", NEEDS)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("pool", [None, ("max", 2, 2, 0)], ids=["nopool", "max2"])
def test_each_gradient_alone(needed, activation, pool, backend):
    problem = PROBLEMS["plain3x3"]
    arguments = make_arguments(problem, torch.float32)
    add_extras(arguments, ("shift", "residual"), problem[3:])
    fixed = {name: value for name, value in arguments.items() if name != needed}
    testing.compare(
        lambda **kw: FF.conv2d(
            **kw, **fixed, padding=1, activation=activation, pool=pool, backend=backend
        ),
        lambda **kw: torch_conv2d(
            **kw,
            **{name: value.to(kw[needed].dtype) for name, value in fixed.items()},
            conv=problem[3:],
            activation=activation,
            pool=pool,
        ),
        {needed: arguments[needed]},
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu_tanh", "mish"])
@pytest.mark.parametrize("pool", [None, ("max", 2, 2, 0)], ids=["nopool", "max2"])
def test_gradcheck(layout, activation, pool, backend):
    shape, dtype = (2, 4, 5, 6), torch.float64
    input = testing.normal(*shape, dtype=dtype, layout=layout).requires_grad_()
    weight = torch.randn(6, 2, 3, 2, dtype=dtype, requires_grad=True)
    vectors = torch.randn(2, 6, dtype=dtype).requires_grad_().unbind()
    residual = torch.randn(2, 6, 3, 6, dtype=dtype, requires_grad=True)

    def function(input, weight, bias, shift, residual):
        return FF.conv2d(
            input,
            weight,
            bias,
            (2, 1),
            (1, 1),
            (1, 2),
            2,
            shift=shift,
            residual=residual,
            activation=activation,
            pool=pool,
            backend=backend,
        )

    assert torch.autograd.gradcheck(function, (input, weight, *vectors, residual))


def test_second_derivative_is_refused(backend):
    input = torch.randn(1, 2, 4, 4, requires_grad=True)
    output = FF.conv2d(input, torch.randn(2, 2, 3, 3), backend=backend).square().sum()
    (grad,) = torch.autograd.grad(output, input, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_forward_mode_is_refused(backend):
    input = torch.randn(1, 2, 4, 4)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="jvp|forward"),
    ):
        dual = torch.autograd.forward_ad.make_dual(input, torch.ones_like(input))
        FF.conv2d(dual, torch.randn(2, 2, 3, 3), backend=backend)


@dtypes
@layouts
def test_same_bits_twice(dtype, layout, backend):
    problem = PROBLEMS["wide"]
    arguments = make_arguments(problem, dtype, layout)

    def once():
        function = lambda **kw: FF.conv2d(  # noqa: E731
            **kw, padding=1, activation="relu", pool=("max", 2, 2, 0), backend=backend
        )
        return testing.run(function, arguments)

    first, second = once(), once()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "sigmoid", "hardswish"])
@layouts
def test_special_values_spread_as_in_torch(value, activation, layout, backend):
    problem = PROBLEMS["plain3x3"]
    arguments = make_arguments(problem, torch.float32, layout)
    arguments["input"][0, 1, 4, 5] = value
    for pool in (None, ("max", 2, 2, 0)):
        check(arguments, problem[3:], backend, activation=activation, pool=pool, grad_layout=None)


def test_autocast(backend):
    problem = PROBLEMS["plain3x3"]
    arguments = make_arguments(problem, torch.float32)
    results = []
    for function in (lambda *a: FF.conv2d(*a, backend=backend), F.conv2d):
        leaves = [t.clone().requires_grad_() for t in arguments.values()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = function(*leaves, 1, 1)
        assert output.dtype is torch.bfloat16
        output.float().sum().backward()
        assert all(leaf.grad.dtype is torch.float32 for leaf in leaves)
        results.append([output.float(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=2**-6, atol=2**-6 * theirs.abs().max().item()
        )


def test_autocast_leaves_float64_alone(backend):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        double = torch.randn(1, 2, 4, 4, dtype=torch.float64)
        output = FF.conv2d(double, double[:, :, :3, :3], backend=backend)
    assert output.dtype is torch.float64


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.dtype_name)
def test_packed_weight_changes_no_bit(groups, dtype, backend):
    input = testing.normal(2, 16, 9, 9, dtype=dtype)
    weight = testing.normal(32, 16 // groups, 3, 3, dtype=dtype)
    packed = pack_conv_weight(weight, PLAIN._replace(groups=groups), backend)
    options = {"padding": 1, "groups": groups, "activation": "relu", "backend": backend}
    plain = FF.conv2d(input, weight, **options)
    assert torch.equal(FF.conv2d(input, weight, packed_weight=packed, **options), plain)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 3}, {"dilation": 2, "groups": 3}]
)
def test_conv1d(dtype, options, backend):
    groups = options.get("groups", 1)
    arguments = {
        "input": testing.normal(2, 6, 23, dtype=dtype),
        "weight": testing.normal(9, 6 // groups, 5, dtype=dtype, std=0.3),
        "bias": testing.normal(9, 1, dtype=dtype).flatten(),
    }
    testing.compare(
        lambda **kw: FF.conv1d(**kw, **options, backend=backend),
        lambda **kw: F.conv1d(**kw, **options),
        arguments,
        grad_layout="narrowed",
    )


def test_conv1d_epilogue(backend):
    arguments = {
        "input": torch.randn(2, 6, 23),
        "weight": torch.randn(8, 6, 4) / 5,
        "residual": torch.randn(2, 8, 23),
    }
    testing.compare(
        lambda input, weight, residual: FF.conv1d(
            input,
            weight,
            padding="same",
            residual=residual,
            activation="silu",
            pool=("max", 3, 2, 1),
            backend=backend,
        ),
        lambda input, weight, residual: F.max_pool1d(
            F.silu(F.conv1d(input, weight, padding="same") + residual), 3, 2, 1
        ),
        arguments,
    )
    unbatched = FF.conv1d(arguments["input"][0], arguments["weight"], backend=backend)
    torch.testing.assert_close(unbatched, F.conv1d(arguments["input"][0], arguments["weight"]))


# --- layers ---

LAYERS = {
    "Conv2d": (nn.Conv2d, fnn.Conv2d, (6, 8, 3), {"padding": 1, "stride": 2}, (2, 6, 11, 9)),
    "Conv2d_same": (nn.Conv2d, fnn.Conv2d, (6, 8, (4, 3)), {"padding": "same"}, (2, 6, 11, 9)),
    "Conv2d_circular": (
        nn.Conv2d,
        fnn.Conv2d,
        (6, 8, 3),
        {"padding": 2, "padding_mode": "circular", "groups": 2, "bias": False},
        (2, 6, 11, 9),
    ),
    "Conv1d": (nn.Conv1d, fnn.Conv1d, (6, 8, 5), {"padding": 2, "dilation": 2}, (2, 6, 21)),
}
layers = pytest.mark.parametrize(
    ("torch_class", "our_class", "args", "kwargs", "shape"), LAYERS.values(), ids=LAYERS.keys()
)


@layers
def test_layer_is_a_drop_in(torch_class, our_class, args, kwargs, shape, backend):
    torch.manual_seed(1)
    theirs = torch_class(*args, **kwargs)
    torch.manual_seed(1)
    ours = our_class(*args, **kwargs, backend=backend)
    assert isinstance(ours, torch_class)
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    input = torch.randn(shape)
    torch.testing.assert_close(ours(input), theirs(input))


@layers
def test_from_torch_shares_parameters(torch_class, our_class, args, kwargs, shape, backend):
    theirs = torch_class(*args, **kwargs).eval()
    ours = our_class.from_torch(theirs, activation="relu", backend=backend)
    assert ours.weight is theirs.weight and ours.bias is theirs.bias
    assert not ours.training
    input = torch.randn(shape)
    torch.testing.assert_close(ours(input), theirs(input).relu())


def test_from_torch_takes_a_parametrized_module_over(backend):
    module = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    ours = fnn.Conv2d.from_torch(module, backend=backend)
    assert ours.state_dict().keys() == module.state_dict().keys()
    input = torch.randn(2, 2, 5, 5)
    gradients = []
    for layer in (module, ours):
        output = layer(input)
        gradients.append(torch.autograd.grad(output.square().sum(), list(layer.parameters())))
    torch.testing.assert_close(ours(input), module(input), rtol=1e-5, atol=1e-6)
    for got, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@layers
def test_layer_training_step(torch_class, our_class, args, kwargs, shape, backend):
    theirs = torch_class(*args, **kwargs)
    ours = our_class.from_torch(copy.deepcopy(theirs), backend=backend)
    input = torch.randn(shape)
    for layer in (theirs, ours):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(input).square().mean().backward()
            optimizer.step()
    for ours_now, theirs_now in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_now, theirs_now)


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("pool", [None, ("max", 2, 2, 0), ("max", 3, 2, 1)])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@layouts
def test_conv_block(norm, pool, activation, layout, backend):
    torch.manual_seed(1)
    options = {"padding": 1, "bias": norm is None}
    block = fnn.ConvBlock2d(
        5, 8, 3, **options, norm=norm, activation=activation, pool=pool, backend=backend
    )
    if norm:
        block.norm.eps = 0.1
        nn.init.normal_(block.norm.weight)
        nn.init.normal_(block.norm.bias)
    conv, bn = copy.deepcopy(block.conv), copy.deepcopy(block.norm)

    def parts(input):
        output = conv(input)
        output = output if bn is None else bn(output)
        output = testing.torch_activation(activation, output)
        return output if pool is None else F.max_pool2d(output, *pool[1:])

    parameters = [*conv.parameters(), *([] if bn is None else bn.parameters())]
    for _ in range(2):  # training: gradients and running statistics
        input = testing.normal(4, 5, 10, 9, layout=layout)
        ours, theirs = block(input), parts(input)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        block.zero_grad()
        ours.square().sum().backward()
        for parameter in parameters:
            parameter.grad = None
        theirs.square().sum().backward()
        for ours_p, theirs_p in zip(block.parameters(), parameters, strict=True):
            torch.testing.assert_close(ours_p.grad, theirs_p.grad, rtol=1e-4, atol=1e-3)
    if norm:
        bn.eval()
        for name, buffer in bn.named_buffers():
            torch.testing.assert_close(dict(block.norm.named_buffers())[name], buffer)
    block.eval()
    torch.testing.assert_close(block(input), parts(input), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        unfrozen = block(input)
        torch.testing.assert_close(unfrozen, parts(input), rtol=1e-5, atol=1e-5)
        block._pack()
        assert torch.equal(block(input), unfrozen)
        if norm:  # a frozen block notices new statistics
            for layer in (block.norm, bn):
                layer.running_mean.add_(1)
            torch.testing.assert_close(block(input), parts(input), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen_under", ["fast", "exact"])
@pytest.mark.parametrize("called_under", ["fast", "exact"])
def test_frozen_layer_serves_both_precisions(frozen_under, called_under, backend, monkeypatch):
    monkeypatch.setenv("FMKERNELS_CHECK_FROZEN", "1")
    layer = fnn.Conv2d(32, 32, 3, padding=1, backend=backend)
    input = torch.randn(2, 32, 28, 28)
    with fmkernels.precision(frozen_under):
        layer._pack()
    with fmkernels.precision(called_under), torch.no_grad():
        expected = F.conv2d(input, layer.weight, layer.bias, padding=1)
        torch.testing.assert_close(layer(input), expected, rtol=1e-4, atol=1e-4)
        layer.weight.mul_(2)
        expected = F.conv2d(input, layer.weight, layer.bias, padding=1)
        torch.testing.assert_close(layer(input), expected, rtol=1e-4, atol=1e-4)
        layer(input)


def test_conv_block_trains_its_norm_in_eval_mode(backend):
    block = fnn.ConvBlock2d(3, 4, 3, norm="batch", activation="relu", backend=backend).eval()
    block._pack()
    block(torch.randn(2, 3, 6, 6)).sum().backward()
    assert block.norm.weight.grad.abs().sum() > 0
    assert block.norm.bias.grad.abs().sum() > 0


def test_conv_block_from_torch_holds_the_modules(backend):
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    block = fnn.ConvBlock2d.from_torch(conv, norm, activation="relu", backend=backend)
    assert block.conv is conv and block.norm is norm and block.training
    with pytest.raises(ValueError, match="norm must have conv's 4 channels"):
        fnn.ConvBlock2d.from_torch(conv, nn.BatchNorm2d(5))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("make", ["conv2d", "conv1d", "same", "block", "block_bn", "depthwise"])
def test_compile(grad, make, backend):
    layer, shape = {
        "conv2d": (fnn.Conv2d(4, 6, 3, activation="gelu", pool=("max", 2, 2, 0)), (2, 4, 9, 8)),
        "conv1d": (fnn.Conv1d(4, 6, 3, activation="relu"), (2, 4, 9)),
        "same": (fnn.Conv2d(4, 6, 4, padding="same"), (2, 4, 9, 8)),
        "block": (
            fnn.ConvBlock2d(4, 6, 3, activation="relu", pool=("max", 3, 2, 1)),
            (2, 4, 9, 8),
        ),
        "block_bn": (
            fnn.ConvBlock2d(4, 6, 3, norm="batch", activation="relu").eval(),
            (2, 4, 9, 8),
        ),
        "depthwise": (fnn.Conv2d(4, 4, 3, groups=4), (2, 4, 9, 8)),
    }[make]
    layer.backend = backend
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    input = torch.randn(shape, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        expected, actual = layer(input), compiled(input)
    torch.testing.assert_close(actual, expected)
    if grad:
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), input)
        (actual_grad,) = torch.autograd.grad(actual.square().sum(), input)
        torch.testing.assert_close(actual_grad, expected_grad)


def test_output_may_be_overwritten_in_place(backend):
    """The pooled output of a relu is not needed again, as in torch, whose pool keeps its input."""
    layer = fnn.Conv2d(3, 8, 3, activation="relu", pool=("max", 2, 2, 0), backend=backend)
    output = layer(torch.randn(2, 3, 10, 10))
    output += 1
    output.sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
@pytest.mark.parametrize("channels", [(40, 36), (48, 112), (33, 20)], ids=str)
def test_many_dense_pixels(backend, channels, dtype, activation):
    """1x1 over whole channels_last images is a product of matrices, with all that follows."""
    inputs, outputs = channels
    arguments = {
        "input": testing.normal(2, inputs, 27, 29, dtype=dtype, layout="channels_last"),
        "weight": testing.normal(outputs, inputs, 1, 1, dtype=dtype, std=inputs**-0.5),
        "bias": testing.normal(outputs, dtype=dtype),
        "residual": testing.normal(2, outputs, 27, 29, dtype=dtype, layout="channels_last"),
    }

    def ours(input, weight, bias, residual):
        return FF.conv2d(
            input, weight, bias, residual=residual, activation=activation, backend=backend
        )

    def theirs(input, weight, bias, residual):
        return testing.torch_activation(activation, F.conv2d(input, weight, bias) + residual)

    # A rounding may cross relu's corner, and moves a gradient then: its forward is compared alone.
    layout = None if activation == "relu" else "contiguous"
    testing.compare(ours, theirs, arguments, grad_layout=layout)
