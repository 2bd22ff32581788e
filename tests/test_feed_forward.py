"""The fused feed-forward block, plain and gated, against PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fmkernels.functional as FF
from fmkernels import testing
from fmkernels.ops import _activations, _dropout
from fmkernels.ops.feed_forward.autograd import pack_feed_forward_weight
from fmkernels.ops.feed_forward.backends import FEED_FORWARD

BACKENDS = testing.available_backends(FEED_FORWARD, torch.zeros(1))
pytestmark = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
forms = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])

# leading dimensions, in_features, hidden, out_features
PROBLEMS = {
    "vector": ((), 7, 9, 5),
    "tiny": ((3,), 1, 1, 1),
    "odd": ((17,), 33, 65, 19),
    "batched": ((2, 3, 5), 24, 40, 24),
    "deep": ((9,), 517, 130, 67),
    "hidden_of_one_panel": ((40,), 12, 37, 12),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def make_arguments(problem, dtype, *, gated, make=testing.normal, residual=True, bias=True):
    leading, features, hidden, out = problem

    def vector(size):
        return make(size, 1, dtype=dtype).squeeze(-1) if bias else None

    def scaled(rows, columns):
        weight = make(rows, columns, dtype=dtype)
        return weight / columns**0.5 if make is testing.normal else weight

    arguments = {
        "input": make(*leading, features, dtype=dtype),
        "weight1": scaled(hidden, features),
        "bias1": vector(hidden),
        "weight2": scaled(out, hidden),
        "bias2": vector(out),
    }
    if gated:
        arguments |= {"gate_weight": scaled(hidden, features), "gate_bias": vector(hidden)}
    if residual:
        arguments["residual"] = make(*leading, out, dtype=dtype)
    return arguments


def torch_feed_forward(
    input, weight1, bias1, weight2, bias2, gate_weight=None, gate_bias=None, residual=None,
    activation=None, factors=None,
):  # fmt: skip
    hidden = F.linear(input, weight1, bias1)
    if gate_weight is None:
        hidden = testing.torch_activation(activation, hidden)
    else:
        gate = F.linear(input, gate_weight, gate_bias)
        hidden = testing.torch_activation(activation, gate) * hidden
    if factors is not None:
        hidden = hidden * factors.to(hidden.dtype)
    output = F.linear(hidden, weight2, bias2)
    return output if residual is None else output + residual


def check(arguments, backend, activation, *, dropout_p=0.0, factors=None, **options):
    testing.compare(
        lambda **kw: FF.feed_forward(
            **kw, activation=activation, dropout_p=dropout_p, backend=backend
        ),
        lambda **kw: torch_feed_forward(**kw, activation=activation, factors=factors),
        arguments,
        **options,
    )


@problems
@dtypes
@forms
@pytest.mark.parametrize("bias", [False, True])
def test_matches_torch(problem, dtype, gated, bias, backend):
    if problem == PROBLEMS["tiny"] and dtype.itemsize == 2:
        pytest.skip("with a single number PyTorch's own error is a matter of luck")
    arguments = make_arguments(problem, dtype, gated=gated, bias=bias, residual=bias)
    check(arguments, backend, "silu")


@pytest.mark.parametrize("activation", _activations.CHOICES)
@forms
@dtypes
def test_activation(activation, gated, dtype, backend):
    # On integers no two roundings disagree about which side of a kink a value lies.
    make = testing.normal if dtype.itemsize > 2 else testing.integers
    arguments = make_arguments(PROBLEMS["hidden_of_one_panel"], dtype, gated=gated, make=make)
    check(arguments, backend, activation)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@forms
@dtypes
@pytest.mark.parametrize("dropout_p", [0.1, 1.0])
def test_dropout(activation, gated, dtype, dropout_p, backend, monkeypatch):
    seed = torch.tensor([-77])
    monkeypatch.setattr(_dropout, "new_seed", lambda device: seed)
    make = testing.normal if dtype.itemsize > 2 else testing.integers
    arguments = make_arguments(PROBLEMS["batched"], dtype, gated=gated, make=make)
    factors = _dropout.factors(seed, 30, 40, dropout_p, torch.float64).reshape(2, 3, 5, 40)
    check(arguments, backend, activation, dropout_p=dropout_p, factors=factors)


def test_dropout_draws_a_new_mask_each_time(backend):
    arguments = make_arguments(PROBLEMS["odd"], torch.float32, gated=False)
    first, second = (
        FF.feed_forward(**arguments, dropout_p=0.5, backend=backend) for _ in range(2)
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("grad_layout", testing.GRADIENT_LAYOUTS)
@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided", "offset"])
@forms
def test_any_strides(grad_layout, layout, gated, backend):
    arguments = {
        "input": testing.normal(6, 11, 20, layout=layout),
        "weight1": testing.normal(15, 20, layout=layout),
        "bias1": torch.randn(30)[::2],
        "weight2": testing.normal(9, 15, layout=layout),
        "bias2": torch.randn(18)[::2],
        "residual": testing.normal(6, 11, 9, layout=layout),
    }
    if gated:
        arguments["gate_weight"] = testing.normal(15, 20, layout=layout)
    check(arguments, backend, "gelu", grad_layout=grad_layout)


NAMES = ("input", "weight1", "bias1", "weight2", "bias2", "gate_weight", "gate_bias", "residual")


@pytest.mark.parametrize("needed", NAMES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_each_gradient_alone(needed, activation, backend):
    arguments = make_arguments(PROBLEMS["odd"], torch.float32, gated=True)
    if needed in ("weight1", "bias1"):  # both forms share them
        del arguments["gate_weight"], arguments["gate_bias"]
    fixed = {name: value for name, value in arguments.items() if name != needed}
    testing.compare(
        lambda **kw: FF.feed_forward(**kw, **fixed, activation=activation, backend=backend),
        lambda **kw: torch_feed_forward(
            **kw,
            **{name: value.to(kw[needed].dtype) for name, value in fixed.items()},
            activation=activation,
        ),
        {needed: arguments[needed]},
    )


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
@forms
def test_empty_batch(shape, gated, backend):
    arguments = make_arguments(((*shape,), 7, 6, 5), torch.float32, gated=gated)
    results = testing.run(lambda **kw: FF.feed_forward(**kw, backend=backend), arguments)
    assert results["output"].shape == (*shape, 5)
    for name in ("weight1", "bias1", "weight2", "bias2"):
        assert torch.equal(results[f"grad_{name}"], torch.zeros_like(arguments[name])), name


@forms
@pytest.mark.parametrize("activation", [None, "relu", "gelu_tanh"])
def test_gradcheck(gated, activation, backend):
    arguments = make_arguments(((2, 3), 4, 5, 3), torch.float64, gated=gated)
    names = list(arguments)
    assert torch.autograd.gradcheck(
        lambda *values: FF.feed_forward(
            **dict(zip(names, values, strict=True)), activation=activation, backend=backend
        ),
        [t.requires_grad_() for t in arguments.values()],
    )


@forms
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_spread_as_in_torch(gated, value, backend):
    arguments = make_arguments(PROBLEMS["odd"], torch.float32, gated=gated)
    arguments["input"][3, 5] = value
    check(arguments, backend, "relu", grad_layout=None)


@dtypes
@forms
def test_same_bits_twice(dtype, gated, backend):
    arguments = make_arguments(PROBLEMS["deep"], dtype, gated=gated)
    first, second = (
        testing.run(lambda **kw: FF.feed_forward(**kw, backend=backend), arguments)
        for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@dtypes
@forms
def test_packed_weights_change_no_bit(dtype, gated, backend):
    arguments = make_arguments(PROBLEMS["odd"], dtype, gated=gated)
    packed = (
        pack_feed_forward_weight(arguments["weight1"], arguments.get("gate_weight"), backend),
        pack_feed_forward_weight(arguments["weight2"], None, backend),
    )
    plain = FF.feed_forward(**arguments, backend=backend)
    assert torch.equal(FF.feed_forward(**arguments, packed_weights=packed, backend=backend), plain)


@forms
def test_autocast(gated, backend):
    arguments = make_arguments(PROBLEMS["odd"], torch.float32, gated=gated)
    leaves = {name: t.clone().requires_grad_() for name, t in arguments.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = FF.feed_forward(**leaves, activation="gelu", backend=backend)
    assert output.dtype is torch.bfloat16
    output.float().square().sum().backward()
    exact = torch_feed_forward(
        **{name: t.double() for name, t in arguments.items()}, activation="gelu"
    )
    torch.testing.assert_close(output.double(), exact, rtol=2**-5, atol=2**-5)
    assert all(leaf.grad.dtype is torch.float32 for leaf in leaves.values())


@forms
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compile(gated, grad, dropout_p, backend):
    arguments = make_arguments(((2, 3), 8, 12, 8), torch.float32, gated=gated)
    leaves = [t.requires_grad_(grad) for t in arguments.values()]

    def function(*values):
        return FF.feed_forward(
            **dict(zip(arguments, values, strict=True)), dropout_p=dropout_p, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    expected = function(*leaves)
    torch.manual_seed(2)
    actual = compiled(*leaves)
    torch.testing.assert_close(actual, expected)
    if grad:
        grads = [torch.autograd.grad(r.square().sum(), leaves) for r in (expected, actual)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"weight1": None}, TypeError, "weight1 must be a Tensor"),
        ({"weight1": torch.ones(5)}, ValueError, "weight1 must have 2 dimensions"),
        ({"input": torch.ones(3, 9)}, ValueError, "input must have in_features"),
        ({"weight2": torch.ones(4, 7)}, ValueError, "weight2 must have shape"),
        ({"bias1": torch.ones(4)}, ValueError, "bias1 must have shape"),
        ({"bias2": torch.ones(3)}, ValueError, "bias2 must have shape"),
        ({"gate_weight": torch.ones(4, 5)}, ValueError, "gate_weight must have shape"),
        ({"gate_bias": torch.ones(6)}, ValueError, "gate_bias must be None"),
        ({"residual": torch.ones(4)}, ValueError, "residual must have shape"),
        ({"weight2": torch.ones(4, 6).double()}, TypeError, "weight2 must have the dtype"),
        ({"activation": "swish"}, ValueError, "activation must be one of"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be in"),
    ],
)
def test_bad_input(changed, error, match, backend):
    arguments = make_arguments(((3,), 5, 6, 4), torch.float32, gated=False)
    with pytest.raises(error, match=match):
        FF.feed_forward(**(arguments | changed), backend=backend)
