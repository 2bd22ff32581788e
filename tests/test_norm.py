"""Layer and RMS normalisation, alone and of a sum, against PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fmkernels.functional as FF
from fmkernels import testing
from fmkernels.ops import _dropout
from fmkernels.ops.norm.backends import NORM

BACKENDS = testing.available_backends(NORM, torch.zeros(1))
pytestmark = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
kinds = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
EPS = 1e-5

# leading dimensions, normalized_shape
SHAPES = {
    "vector": ((), (7,)),
    "single": ((3,), (1,)),
    "odd": ((17,), (33,)),
    "wide": ((5, 3), (517,)),
    "widest": ((3, 7), (6000,)),
    "many_rows": ((700,), (40,)),
    "two_dimensions": ((4, 2), (3, 20)),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def make_arguments(shape, dtype, *, affine=True, residual=False, rms=False):
    leading, normalized = shape
    size = (*leading, *normalized)
    arguments = {"input": testing.normal(*size, dtype=dtype) * 2 + 1}
    if residual:
        arguments["residual"] = testing.normal(*size, dtype=dtype)
    if residual and dtype.itemsize == 2:
        # Sums that need no rounding: a single one of its errors outweighs all others.
        for name, low, high in (("input", -32, 48), ("residual", -32, 32)):
            arguments[name] = testing.integers(*size, dtype=dtype, low=low, high=high) / 16
    if affine:
        arguments["weight"] = testing.normal(*normalized, dtype=dtype)
        if not rms:
            arguments["bias"] = testing.normal(*normalized, dtype=dtype)
    return arguments


def ours(rms, normalized, backend, **options):
    def function(input, weight=None, bias=None, residual=None):
        parameters = (weight, EPS) if rms else (weight, bias, EPS)
        if residual is None:
            norm = FF.rms_norm if rms else FF.layer_norm
            return norm(input, normalized, *parameters, backend=backend)
        norm = FF.add_rms_norm if rms else FF.add_layer_norm
        return norm(input, residual, normalized, *parameters, backend=backend, **options)

    return function


def torchs(rms, normalized, return_sum=False, factors=None):
    def function(input, weight=None, bias=None, residual=None):
        total = input if factors is None else input * factors.to(input.dtype)
        total = total if residual is None else total + residual
        if rms:
            output = F.rms_norm(total, normalized, weight, EPS)
        else:
            output = F.layer_norm(total, normalized, weight, bias, EPS)
        return (output, total) if return_sum else output

    return function


def check(arguments, shape, rms, backend, **options):
    testing.compare(ours(rms, shape[1], backend), torchs(rms, shape[1]), arguments, **options)


@shapes
@dtypes
@kinds
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_matches_torch(shape, dtype, rms, affine, residual, backend):
    arguments = make_arguments(shape, dtype, affine=affine, residual=residual, rms=rms)
    # The gradient of a single normalised element is zero but for eps: only rounding is left of it.
    grad_layout = None if shape == SHAPES["single"] else "contiguous"
    check(arguments, shape, rms, backend, grad_layout=grad_layout)


@pytest.mark.parametrize("grad_layout", testing.GRADIENT_LAYOUTS)
@pytest.mark.parametrize("layout", [n for n in testing.LAYOUTS if n != "channels_last"])
@kinds
def test_any_strides(grad_layout, layout, rms, backend):
    arguments = {
        "input": testing.normal(6, 11, 20, layout=layout),
        "residual": testing.normal(6, 11, 20, layout=layout),
        "weight": torch.randn(40)[::2],
    }
    check(arguments, ((6, 11), (20,)), rms, backend, grad_layout=grad_layout)


@pytest.mark.parametrize("needed", ["input", "residual", "weight", "bias"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_each_gradient_alone(needed, dropout_p, backend, monkeypatch):
    shape = SHAPES["odd"]
    seed = torch.tensor([-5])
    monkeypatch.setattr(_dropout, "new_seed", lambda device: seed)
    arguments = make_arguments(shape, torch.float32, residual=True)
    fixed = {name: value for name, value in arguments.items() if name != needed}
    factors = _dropout.factors(seed, 17, 33, dropout_p, torch.float64)
    theirs = torchs(False, shape[1], factors=factors)
    testing.compare(
        lambda **kw: ours(False, shape[1], backend, dropout_p=dropout_p)(**kw, **fixed),
        lambda **kw: theirs(
            **kw, **{name: value.to(kw[needed].dtype) for name, value in fixed.items()}
        ),
        {needed: arguments[needed]},
    )


@dtypes
@kinds
@pytest.mark.parametrize("dropout_p", [0.0, 0.4, 1.0])
def test_returned_sum_and_dropout(dtype, rms, dropout_p, backend, monkeypatch):
    shape = ((3, 9), (37,))
    seed = torch.tensor([0x123456789ABCDEF])
    monkeypatch.setattr(_dropout, "new_seed", lambda device: seed)
    factors = _dropout.factors(seed, 27, 37, dropout_p, torch.float64).reshape(3, 9, 37)
    testing.compare(
        ours(rms, shape[1], backend, dropout_p=dropout_p, return_sum=True),
        torchs(rms, shape[1], True, factors if dropout_p else None),
        make_arguments(shape, dtype, residual=True, rms=rms),
    )


def test_dropout_follows_the_generator(backend):
    input, residual = torch.ones(50, 40), torch.zeros(50, 40)

    def draw():
        return FF.add_layer_norm(
            input, residual, 40, dropout_p=0.25, return_sum=True, backend=backend
        )[1]

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    assert torch.equal(first.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert abs((first == 0).double().mean().item() - 0.25) < 0.04


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
@kinds
def test_empty_batch(shape, rms, backend):
    arguments = make_arguments((shape[:-1], (8,)), torch.float32, residual=True, rms=rms)
    results = testing.run(ours(rms, (8,), backend), arguments)
    assert results["output"].shape == shape
    assert torch.equal(results["grad_weight"], torch.zeros(8))


@kinds
@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck(rms, residual, backend):
    arguments = make_arguments(((2, 3), (5,)), torch.float64, residual=residual, rms=rms)
    names = list(arguments)
    assert torch.autograd.gradcheck(
        lambda *values: ours(rms, (5,), backend)(**dict(zip(names, values, strict=True))),
        [t.requires_grad_() for t in arguments.values()],
    )


@kinds
def test_gradient_of_the_sum_alone(rms, backend):
    input, residual = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    function = ours(rms, (6,), backend, return_sum=True)
    function(input, residual=residual)[1].sum().backward()
    assert torch.equal(input.grad, torch.ones(4, 6))
    assert torch.equal(residual.grad, torch.ones(4, 6))


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values_spread_as_in_torch(rms, value, backend):
    arguments = make_arguments(SHAPES["odd"], torch.float32, rms=rms)
    arguments["input"][3, 5] = value
    output = ours(rms, (33,), backend)(**arguments)
    expected = torchs(rms, (33,))(**arguments)
    assert torch.equal(output[3].isnan(), expected[3].isnan())
    rest = torch.arange(17) != 3
    torch.testing.assert_close(output[rest], expected[rest])


def test_large_mean_keeps_the_variance(backend):
    """Where E[x^2] - E[x]^2 would lose every digit."""
    arguments = make_arguments(((9,), (64,)), torch.float32)
    arguments["input"] = arguments["input"] + 3000
    check(arguments, ((9,), (64,)), False, backend)


@kinds
def test_mixed_dtypes_promote_as_in_torch(rms, backend):
    input, residual = testing.normal(4, 16, dtype=torch.bfloat16), torch.randn(4, 16)
    weight = torch.randn(16)
    output = ours(rms, (16,), backend)(input, weight)
    assert output.dtype is torch.bfloat16
    expected = torchs(rms, (16,))(input.double(), weight.double())
    torch.testing.assert_close(output.double(), expected, rtol=2**-7, atol=2**-7)
    summed = ours(rms, (16,), backend)(input, weight, residual=residual)
    assert summed.dtype is torch.float32
    expected = torchs(rms, (16,))(input.double(), weight.double(), residual=residual.double())
    torch.testing.assert_close(summed.double(), expected, rtol=1e-5, atol=1e-5)


@dtypes
def test_same_bits_twice(dtype, backend):
    shape = SHAPES["many_rows"]
    arguments = make_arguments(shape, dtype, residual=True)
    first, second = (testing.run(ours(False, shape[1], backend), arguments) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compile(grad, dropout_p, backend):
    def function(input, residual, weight):
        return FF.add_rms_norm(
            input, residual, 8, weight, dropout_p=dropout_p, return_sum=True, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    arguments = [torch.randn(3, 8, requires_grad=grad) for _ in range(2)] + [torch.randn(8)]
    torch.manual_seed(2)
    expected = function(*arguments)
    torch.manual_seed(2)
    actual = compiled(*arguments)
    torch.testing.assert_close(actual, expected)
    if grad:
        grads = [
            torch.autograd.grad(sum(t.square().sum() for t in result), arguments[:2])
            for result in (expected, actual)
        ]
        torch.testing.assert_close(*grads)


def test_second_derivative_is_refused(backend):
    input = torch.randn(3, 4, requires_grad=True)
    output = FF.layer_norm(input, 4, backend=backend).square().sum()
    (grad,) = torch.autograd.grad(output, input, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("no tensor", 4), TypeError, "input must be a Tensor"),
        ((torch.ones(3, 4), 5), ValueError, "input must end in normalized_shape"),
        ((torch.ones(3, 4), ()), TypeError, "normalized_shape"),
        ((torch.ones(3, 4), "4"), TypeError, r"normalized_shape\[0\]"),
        ((torch.ones(3, 4), 0), ValueError, r"normalized_shape\[0\]"),
        ((torch.ones(4), (3, 4)), ValueError, "input must end"),
        ((torch.ones(3, 4), 4, torch.ones(3)), ValueError, "weight must have shape"),
        ((torch.ones(3, 4), 4, None, torch.ones(4).int()), TypeError, "bias must be float32"),
        ((torch.ones(3, 4), 4, None, None, "small"), TypeError, "eps must be a number"),
    ],
)
def test_bad_input(arguments, error, match, backend):
    with pytest.raises(error, match=match):
        FF.layer_norm(*arguments, backend=backend)


def test_bad_input_of_the_sum(backend):
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match="residual must have shape"):
        FF.add_layer_norm(x, torch.ones(4), 4, backend=backend)
    with pytest.raises(ValueError, match="dropout_p must be in"):
        FF.add_rms_norm(x, x, 4, dropout_p=1.5, backend=backend)


def test_masks_are_philox(backend):
    """The known answer of Random123 for counter 0 and key 0."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    seed = torch.tensor([0])
    for word, column in zip(words, range(4), strict=True):
        for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
            factors = _dropout.factors(seed, 1, 4, p, torch.float64)
            assert (factors[0, column] != 0) == kept
