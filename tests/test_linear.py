"""linear and its layer against PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fmkernels.functional as FF
import fmkernels.nn as fnn
from fmkernels import testing
from fmkernels.ops import _activations
from fmkernels.ops.linear.autograd import pack_linear_weight
from fmkernels.ops.linear.backends import LINEAR

PROBE = torch.zeros(1, 1)
BACKENDS = testing.available_backends(LINEAR, PROBE, PROBE, None)

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)

# name: leading dimensions, in_features, out_features
PROBLEMS = {
    "vector": ((), 7, 5),
    "one_row": ((1,), 64, 64),
    "tiny": ((3,), 1, 1),
    "odd": ((17,), 33, 65),
    "batched": ((2, 3, 5), 24, 40),
    "deep": ((9,), 517, 19),
    "wide": ((130,), 31, 260),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def make_arguments(problem, dtype, make=testing.normal, residual=False):
    leading, in_features, out_features = problem
    arguments = {
        "input": make(*leading, in_features, 1, dtype=dtype).squeeze(-1),
        "weight": make(out_features, in_features, dtype=dtype),
        "bias": make(out_features, 1, dtype=dtype).squeeze(-1),
    }
    if make is testing.normal:
        arguments["weight"] = arguments["weight"] / in_features**0.5
    if residual:
        arguments["residual"] = make(*leading, out_features, 1, dtype=dtype).squeeze(-1)
    return arguments


def torch_linear(input, weight, bias=None, residual=None, activation=None):
    output = F.linear(input, weight, bias)
    output = output if residual is None else output + residual
    return testing.torch_activation(activation, output)


def check(arguments, backend, activation=None, **options):
    testing.compare(
        lambda **kw: FF.linear(**kw, activation=activation, backend=backend),
        lambda **kw: torch_linear(**kw, activation=activation),
        arguments,
        **options,
    )


@problems
@dtypes
@pytest.mark.parametrize("bias", [False, True])
def test_matches_torch(problem, dtype, bias, backend):
    arguments = make_arguments(problem, dtype)
    if not bias:
        arguments["bias"] = None
    check(arguments, backend)


@problems
@dtypes
def test_integers_are_exact(problem, dtype, backend):
    leading, in_features, _ = problem
    # Sums stay below 2**7, which every dtype holds exactly.
    arguments = make_arguments(problem, dtype, testing.integers)
    arguments["input"] = arguments["input"] * (torch.rand(in_features) < 24 / in_features)
    arguments["input"] = arguments["input"].to(dtype)
    output = FF.linear(**arguments, backend=backend)
    exact = F.linear(*(t.double() for t in arguments.values()))
    assert exact.abs().max() < 2**8
    assert torch.equal(output.double(), exact)


@pytest.mark.parametrize("activation", _activations.NAMES)
@pytest.mark.parametrize("residual", [False, True])
@dtypes
def test_activation(activation, residual, dtype, backend):
    # On integers no two roundings disagree about which side of a kink a value lies.
    make = testing.normal if dtype.itemsize > 2 else testing.integers
    arguments = make_arguments(PROBLEMS["odd"], dtype, make, residual)
    check(arguments, backend, activation)


@pytest.mark.parametrize("grad_layout", testing.GRADIENT_LAYOUTS)
@pytest.mark.parametrize("layout", [n for n in testing.LAYOUTS if n != "channels_last"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_any_strides(grad_layout, layout, activation, backend):
    arguments = {
        "input": testing.normal(6, 11, 20, layout=layout),
        "weight": testing.normal(15, 20, layout=layout),
        "bias": torch.randn(30)[::2],
        "residual": testing.normal(6, 11, 15, layout=layout),
    }
    check(arguments, backend, activation, grad_layout=grad_layout)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 40])
@pytest.mark.parametrize("columns", [64, 19, 256])
@dtypes
def test_transposed_weight(rows, columns, dtype, backend):
    """The weight of GPT-2's Conv1D: its gradient comes back with its strides."""
    arguments = make_arguments(((rows,), 48, columns), dtype)
    arguments["weight"] = testing.in_layout(arguments["weight"], "transposed")
    check(arguments, backend, "gelu" if dtype.itemsize > 2 else None)
    weight = arguments["weight"].requires_grad_()
    FF.linear(arguments["input"], weight, backend=backend).sum().backward()
    assert weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 10, 16, 17])
@pytest.mark.parametrize("residual", [False, True])
@dtypes
def test_few_rows(rows, residual, dtype, backend):
    """Products of a few rows read the weight where it lies; the input's gradient in more than one
    run of the reduction and more columns than a thread takes at a time."""
    arguments = make_arguments(((rows,), 531, 303), dtype, residual=residual)
    check(arguments, backend, "silu" if dtype.itemsize > 2 else None)


@pytest.mark.parametrize(("rows", "columns"), [(40, 517), (700, 517), (1400, 517), (40, 1100)])
@dtypes
def test_weight_gradient_over_many_wide_rows(rows, columns, dtype, backend):
    """A is copied tile by tile, in strips of rows and chunks of the reduction; the gradient's rows
    are more than one block."""
    arguments = make_arguments(((rows,), 130, columns), dtype, residual=False)
    check(arguments, backend)


def test_products_larger_than_the_caches(backend):
    """Several panels at a time, the reduction in chunks, more rows than one block."""
    arguments = make_arguments(((1100,), 1500, 260), torch.float32)
    check(arguments, backend)


@pytest.mark.parametrize("needed", ["input", "weight", "bias", "residual"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_each_gradient_alone(needed, activation, backend):
    arguments = make_arguments(PROBLEMS["odd"], torch.float32, residual=True)
    fixed = {name: value for name, value in arguments.items() if name != needed}
    testing.compare(
        lambda **kw: FF.linear(**kw, **fixed, activation=activation, backend=backend),
        lambda **kw: torch_linear(
            **kw,
            **{name: value.to(kw[needed].dtype) for name, value in fixed.items()},
            activation=activation,
        ),
        {needed: arguments[needed]},
    )


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_empty_batch(shape, activation, backend):
    input = torch.empty(*shape, 7, requires_grad=True)
    weight, bias = torch.randn(5, 7, requires_grad=True), torch.randn(5, requires_grad=True)
    output = FF.linear(input, weight, bias, activation=activation, backend=backend)
    assert output.shape == (*shape, 5)
    output.sum().backward()
    assert input.grad.shape == input.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("activation", _activations.CHOICES)
def test_gradcheck(activation, backend):
    arguments = make_arguments(((2, 3), 4, 5), torch.float64, residual=True).values()
    assert torch.autograd.gradcheck(
        lambda x, w, b, r: FF.linear(x, w, b, residual=r, activation=activation, backend=backend),
        [t.requires_grad_() for t in arguments],
    )


def test_unused_output_gets_no_gradient(backend):
    """An output that no loss reads must not break a graph that it shares inputs with."""
    input, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    used, _ = FF.linear(input, weight, backend=backend), FF.linear(input, weight, backend=backend)
    used.sum().backward()
    torch.testing.assert_close(input.grad, weight.sum(0).expand(3, 4))


def test_second_derivative_is_refused(backend):
    input = torch.randn(3, 4, requires_grad=True)
    output = FF.linear(input, torch.randn(5, 4), backend=backend).square().sum()
    (grad,) = torch.autograd.grad(output, input, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@dtypes
def test_same_bits_twice(dtype, backend):
    arguments = make_arguments(PROBLEMS["wide"], dtype, residual=True)
    first, second = (
        testing.run(lambda **kw: FF.linear(**kw, activation="gelu", backend=backend), arguments)
        for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", _activations.CHOICES)
def test_special_values_spread_as_in_torch(value, activation, backend):
    arguments = make_arguments(PROBLEMS["odd"], torch.float32)
    arguments["input"][3, 5] = value
    check(arguments, backend, activation, grad_layout=None)


def test_autocast(backend):
    arguments = make_arguments(PROBLEMS["odd"], torch.float32)
    results = []
    for function in (lambda *a: FF.linear(*a, backend=backend), F.linear):
        leaves = [t.clone().requires_grad_() for t in arguments.values()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = function(*leaves)
        assert output.dtype is torch.bfloat16
        output.float().square().sum().backward()
        assert all(leaf.grad.dtype is torch.float32 for leaf in leaves)
        results.append([output.float(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        atol = 2**-6 * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=atol)


@dtypes
def test_packed_weight_changes_no_bit(dtype, backend):
    arguments = make_arguments(PROBLEMS["wide"], dtype)
    packed = pack_linear_weight(arguments["weight"], backend)
    plain = FF.linear(**arguments, activation="relu", backend=backend)
    with_packed = FF.linear(**arguments, activation="relu", packed_weight=packed, backend=backend)
    assert torch.equal(with_packed, plain)


# --- layer ---


@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_a_drop_in(bias, backend):
    torch.manual_seed(1)
    theirs = nn.Linear(9, 6, bias)
    torch.manual_seed(1)
    ours = fnn.Linear(9, 6, bias, backend=backend)
    assert isinstance(ours, nn.Linear)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    input = torch.randn(3, 9)
    torch.testing.assert_close(ours(input), theirs(input))
    shared = fnn.Linear.from_torch(theirs.eval(), activation="gelu", backend=backend)
    assert shared.weight is theirs.weight and shared.bias is theirs.bias and not shared.training
    torch.testing.assert_close(shared(input), F.gelu(theirs(input)))


def test_layer_training_step(backend):
    theirs = nn.Linear(9, 6)
    ours = fnn.Linear.from_torch(copy.deepcopy(theirs), backend=backend)
    input = torch.randn(5, 9)
    for layer in (theirs, ours):
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(input).square().mean().backward()
            optimizer.step()
    for ours_now, theirs_now in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_now, theirs_now, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_compile(grad, activation, backend):
    layer = fnn.Linear(8, 6, activation=activation, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 3, 8, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        expected, actual = layer(input), compiled(input)
    torch.testing.assert_close(actual, expected)
    if grad:
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), input)
        (actual_grad,) = torch.autograd.grad(actual.square().sum(), input)
        torch.testing.assert_close(actual_grad, expected_grad)


# --- frozen layers ---


def test_frozen_layer_notices_an_update(backend):
    layer = fnn.Linear(8, 6, backend=backend)
    layer._pack()
    assert layer.is_frozen
    assert not any("packed" in key for key in layer.state_dict())
    input = torch.randn(3, 8)
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.testing.assert_close(layer(input), F.linear(input, layer.weight, layer.bias))
    layer.load_state_dict(nn.Linear(8, 6).state_dict())
    torch.testing.assert_close(layer(input), F.linear(input, layer.weight, layer.bias))
    layer.double()
    output = layer(input.double())
    torch.testing.assert_close(output, F.linear(input.double(), layer.weight, layer.bias))
    layer._unpack()
    assert not layer.is_frozen and layer._packed_weight is None


def test_frozen_layer_still_trains(backend):
    layer = fnn.Linear(8, 6, activation="relu", backend=backend)
    layer._pack()
    input = torch.randn(3, 8, requires_grad=True)
    layer(input).sum().backward()
    expected = torch.autograd.grad(F.linear(input, layer.weight, layer.bias).relu().sum(), input)
    torch.testing.assert_close(input.grad, expected[0])
    assert layer.weight.grad is not None


def test_check_frozen_catches_a_hidden_write(backend, monkeypatch):
    layer = fnn.Linear(8, 6, backend=backend)
    monkeypatch.setenv("FMKERNELS_CHECK_FROZEN", "1")
    layer._pack()
    layer(torch.randn(3, 8))
    layer.weight.data[0, 0] += 1
    if layer._packed_weight is None:  # nothing is packed, so nothing is stale
        layer(torch.randn(3, 8))
    else:
        with pytest.raises(RuntimeError, match="freeze it again"):
            layer(torch.randn(3, 8))


def test_frozen_copy_is_independent(backend):
    layer = fnn.Linear(8, 6, backend=backend)
    layer._pack()
    duplicate = copy.deepcopy(layer)
    with torch.no_grad():
        duplicate.weight.zero_()
    input = torch.randn(3, 8)
    torch.testing.assert_close(duplicate(input), layer.bias.expand(3, 6))
    torch.testing.assert_close(layer(input), F.linear(input, layer.weight, layer.bias))


def test_packing_in_inference_mode_outlives_it(backend):
    layer = fnn.Linear(8, 6, backend=backend)
    with torch.inference_mode():
        layer._pack()
        layer(torch.randn(3, 8))
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.weight.grad is not None


def test_inplace_operation_on_the_output(backend):
    """As in torch, an activation that keeps its input leaves its output free to be overwritten."""
    model = torch.nn.Sequential(
        fnn.Linear(6, 5, activation="hardswish", backend=backend),
        torch.nn.Dropout(0.5, inplace=True),
    )
    model(torch.randn(3, 6, requires_grad=True)).sum().backward()
