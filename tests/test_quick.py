"""The everyday calls that skip the checks in Python (fmkernels/ops/_quick.py), of every family but
the recurrent one: they are taken, and give the same; everything else goes the checked way."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fmkernels
import fmkernels.functional as FF
from fmkernels import _native
from fmkernels import nn as fnn
from fmkernels._dispatch import clear_decisions, last_decisions
from fmkernels.ops.attention import autograd as attention_autograd
from fmkernels.ops.attention import quick as attention_quick
from fmkernels.ops.conv import autograd as conv_autograd
from fmkernels.ops.conv import quick as conv_quick
from fmkernels.ops.feed_forward import autograd as feed_forward_autograd
from fmkernels.ops.feed_forward import quick as feed_forward_quick
from fmkernels.ops.linear import autograd as linear_autograd
from fmkernels.ops.linear import quick as linear_quick
from fmkernels.ops.norm import autograd as norm_autograd
from fmkernels.ops.norm import quick as norm_quick

pytestmark = pytest.mark.skipif(
    not _native.HAS_NATIVE,
    reason="the quick way leads to native kernels, which are not built",
)


class Case(NamedTuple):
    """A function, its tensors by name with their shapes, its other arguments, and the names of
    what serves it: the function in the family's quick.py and that in its autograd.py."""

    function: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any]
    quick: tuple[ModuleType, str]
    checked: tuple[ModuleType, str]
    op: str


_LINEAR = (linear_quick, "linear"), (linear_autograd, "linear"), "linear"
_NORM = (norm_quick, "norm"), (norm_autograd, "norm")
_SDPA = (
    (attention_quick, "attention"),
    (attention_autograd, "attention"),
    "scaled_dot_product_attention",
)
_WEIGHTS = (
    (attention_quick, "attention_with_weights"),
    (attention_autograd, "attention_with_weights"),
    "attention_with_weights",
)
_FEED_FORWARD = (
    (feed_forward_quick, "feed_forward"),
    (feed_forward_autograd, "feed_forward"),
    "feed_forward",
)
_CONV = (conv_quick, "conv"), (conv_autograd, "conv"), "conv_transpose2d"

_HEADS = {"query": (2, 3, 5, 8), "key": (2, 3, 7, 8), "value": (2, 3, 7, 6)}
_BLOCK = {"input": (3, 5), "weight1": (7, 5), "bias1": (7,), "weight2": (4, 7), "bias2": (4,)}
CASES = {
    "linear": Case(FF.linear, {"input": (2, 3, 5), "weight": (4, 5), "bias": (4,)}, {}, *_LINEAR),
    "linear, epilogue": Case(
        FF.linear,
        {"input": (3, 5), "weight": (4, 5), "residual": (3, 4)},
        {"activation": "gelu"},
        *_LINEAR,
    ),
    "layer norm": Case(
        FF.layer_norm,
        {"input": (2, 3, 5), "weight": (5,), "bias": (5,)},
        {"normalized_shape": (5,)},
        *_NORM,
        "layer_norm",
    ),
    "rms norm": Case(
        FF.rms_norm,
        {"input": (3, 5), "weight": (5,)},
        {"normalized_shape": 5},
        *_NORM,
        "rms_norm",
    ),
    "layer norm of a sum": Case(
        FF.add_layer_norm,
        {"input": (2, 3, 5), "residual": (2, 3, 5), "weight": (5,), "bias": (5,)},
        {"normalized_shape": (5,), "return_sum": True},
        *_NORM,
        "layer_norm",
    ),
    "rms norm of a sum": Case(
        FF.add_rms_norm,
        {"input": (3, 5), "residual": (3, 5)},
        {"normalized_shape": (5,), "eps": 1e-3},
        *_NORM,
        "rms_norm",
    ),
    "attention": Case(FF.scaled_dot_product_attention, _HEADS, {}, *_SDPA),
    "causal attention": Case(
        FF.scaled_dot_product_attention,
        _HEADS,
        {"is_causal": True, "scale": 0.3, "return_lse": True},
        *_SDPA,
    ),
    "masked attention": Case(
        FF.scaled_dot_product_attention, {**_HEADS, "attn_mask": (2, 1, 5, 7)}, {}, *_SDPA
    ),
    "attention with weights": Case(
        FF.attention_with_weights, _HEADS, {"is_causal": True, "scale": 0.3}, *_WEIGHTS
    ),
    "masked attention with their mean": Case(
        FF.attention_with_weights,
        {**_HEADS, "attn_mask": (2, 1, 5, 7)},
        {"average": True},
        *_WEIGHTS,
    ),
    "feed-forward": Case(FF.feed_forward, {**_BLOCK, "residual": (3, 4)}, {}, *_FEED_FORWARD),
    "gated feed-forward": Case(
        FF.feed_forward,
        {**_BLOCK, "gate_weight": (7, 5), "gate_bias": (7,)},
        {"activation": "silu"},
        *_FEED_FORWARD,
    ),
    "transposed convolution": Case(
        FF.conv_transpose2d,
        {"input": (2, 4, 5, 6), "weight": (4, 3, 3, 3), "bias": (6,), "scale": (6,)},
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "activation": "relu"},
        *_CONV,
    ),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def _operands(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=dtype) for name, shape in case.shapes.items()}


def _call(case: Case, operands: dict[str, Tensor], **options) -> list[Tensor]:
    results = case.function(**operands, **{**case.options, **options})
    return list(results) if isinstance(results, tuple) else [results]


def _refuse(*_):
    raise AssertionError("took the other way")


def _graph(case: Case) -> bool:
    return case.op != "conv_transpose2d"  # which leaves graphs to the checked way


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("backend", [None, "auto", "cpu"])
def test_everyday_calls_take_the_quick_way(case, backend, graph, monkeypatch):
    if graph and not _graph(case):
        pytest.skip("a transposed convolution with a graph takes the checked way by design")
    monkeypatch.setattr(*case.checked, _refuse)
    operands = {name: t.requires_grad_(graph) for name, t in _operands(case).items()}
    clear_decisions()
    output = _call(case, operands, backend=backend)[0]
    assert output.requires_grad == graph
    logged = [(d.op, d.chosen) for d in last_decisions()]
    assert logged == ([] if backend == "cpu" else [(case.op, "cpu")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_both_ways_give_the_same(case, dtype, monkeypatch):
    def run() -> list[Tensor]:
        operands = {n: t.requires_grad_() for n, t in _operands(case, dtype).items()}
        results = _call(case, operands)
        torch.autograd.backward(results, [torch.ones_like(r) for r in results])
        with torch.no_grad():
            results += _call(case, operands)
        return results + [t.grad for t in operands.values()]

    ours = run()
    monkeypatch.setattr(*case.quick, lambda *_: None)
    for result, expected in zip(ours, run(), strict=True):
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()


def _strided(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


def test_operands_of_unusual_strides(case):
    operands = _operands(case)
    expected = _call(case, operands)
    for name, operand in operands.items():
        results = _call(case, {**operands, name: _strided(operand)})
        for result, other in zip(results, expected, strict=True):
            assert torch.equal(result, other), name


# What may be wrong with an operand, and what is raised.
WRONG = {
    "dtype": (lambda t: t.to(torch.int32), TypeError),
    "rank": (lambda t: t[(None,) * 4], ValueError),
    "no dimensions": (lambda t: t.flatten()[0], ValueError),
    "longer": (lambda t: torch.cat((t, t), -1), ValueError),
    "empty": (lambda t: t[..., :0], ValueError),
    "device": (lambda t: t.to("meta"), RuntimeError),
    "layout": (lambda t: t.to_sparse(), TypeError),
    "no tensor": (lambda t: t.tolist(), TypeError),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(case, wrong, monkeypatch):
    change, error = WRONG[wrong]
    for name, operand in _operands(case).items():
        operands = {**_operands(case), name: change(operand)}

        def outcome(operands=operands) -> tuple[type, str] | None:
            with torch.no_grad():
                try:
                    _call(case, operands)
                except (TypeError, ValueError, RuntimeError) as raised:
                    return type(raised), str(raised)
            return None

        ours = outcome()
        with monkeypatch.context() as patch:
            patch.setattr(*case.quick, lambda *_: None)
            assert outcome() == ours, name
        if ours is not None:
            assert issubclass(ours[0], error)


def test_fake_tensors_are_checked(case):
    with FakeTensorMode() as mode:
        operands = {n: mode.from_tensor(t) for n, t in _operands(case).items()}
        expected = _call(case, operands)[0].shape
        name, axis = next(iter(operands)), 1 if "conv" in case.op else -1
        with pytest.raises(ValueError):
            _call(case, {**operands, name: torch.cat((operands[name],) * 2, axis)})
    assert _call(case, _operands(case))[0].shape == expected


@pytest.mark.parametrize("surrounding", ["autocast", "reference", "subclass"])
def test_unusual_calls_take_the_checked_way(case, surrounding, monkeypatch):
    calls, function = [], getattr(*case.checked)
    monkeypatch.setattr(*case.checked, lambda *a: calls.append(a) or function(*a))
    operands = _operands(case)
    expected = _call(case, operands)[0]
    assert not calls
    if surrounding == "subclass":
        name = next(iter(operands))
        operands[name] = operands[name].as_subclass(_Subclass)
        output = _call(case, operands)[0]
        assert isinstance(output, _Subclass)
    elif surrounding == "autocast":
        with torch.autocast("cpu"):
            output = _call(case, operands)[0]
    else:
        with fmkernels.use_backend("reference"):
            output = _call(case, operands)[0]
    assert len(calls) == 1
    tolerance = 0.1 if surrounding == "autocast" else 1e-4
    torch.testing.assert_close(
        output.float().as_subclass(Tensor), expected, rtol=tolerance, atol=tolerance
    )


class _Subclass(Tensor):
    pass


def test_operands_of_two_dtypes_are_promoted_by_norms():
    input, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    output = FF.layer_norm(input, 8, weight)
    expected = torch.nn.functional.layer_norm(input.float(), (8,), weight)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output, expected.bfloat16())


def test_heads_broadcast_only_where_they_may():
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 1, 5, 8)
    output = FF.scaled_dot_product_attention(query, key, key)
    wide = key.expand(2, 4, 5, 8)
    torch.testing.assert_close(output, FF.scaled_dot_product_attention(query, wide, wide))
    key = torch.randn(2, 2, 5, 8)
    with pytest.raises(ValueError, match="broadcast"):
        FF.scaled_dot_product_attention(query, key, key)


def test_packed_weights_of_other_layers_are_refused():
    layer = fmkernels.freeze(fnn.Linear(8, 8))
    weight = torch.randn(8, 5)
    for packed in (layer._packed_weight, layer._packed_weight[:-1], torch.zeros(9)):
        with pytest.raises((TypeError, RuntimeError), match="packed_weight"):
            FF.linear(torch.randn(2, 5), weight, packed_weight=packed)
        with pytest.raises((TypeError, RuntimeError), match="packed_weight"):
            FF.feed_forward(
                torch.randn(2, 5), weight, None, layer.weight, None, packed_weights=(packed, None)
            )


@pytest.mark.parametrize("op", ["linear", "feed_forward"])
def test_ops_refuse_weights_without_outputs(op):
    input, weight, none = torch.randn(2, 5), torch.randn(4, 5), torch.randn(0, 4)
    with pytest.raises(RuntimeError, match="at least one element"):
        if op == "linear":
            torch.ops.fmkernels.linear_inference(input, weight[:0], None, None, None, None)
        else:
            torch.ops.fmkernels.feed_forward_inference(
                input, weight, None, None, None, none, None, None, None, None, None
            )


OPTIONS = "1,1;0,0,0,0;1,1;1;0;zeros;;;"
BAD_OPTIONS = {
    "": "more fields",
    OPTIONS[:-1]: "more fields",
    OPTIONS + ";": "fewer fields",
    OPTIONS.replace("1,1;1;", "1,1;;"): "one integer",
    OPTIONS.replace("1,1;1;", "1,1;1,1;"): "one integer",
    OPTIONS.replace("1,1;", "1,x;"): "integers",
    OPTIONS.replace("1,1;", "1 1;"): "integers",
    OPTIONS.replace("1,1;", "99999999999999999999,1;"): "integers",
    OPTIONS.replace("1,1;", "1;"): "stride",
    OPTIONS.replace("0,0,0,0;", "0,0,0,-1;"): "padding",
    OPTIONS.replace("zeros", "ones"): "padding_mode",
    OPTIONS.replace(";;;", ";step;;"): "activation",
    OPTIONS.replace(";;;", ";;sum;2,2,2,2,0,0"): "pool",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_of_convolutions(options):
    def convolve(options: str) -> Tensor:
        image, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 2, 2)
        return torch.ops.fmkernels.conv_inference(
            image, weight, None, None, None, None, None, options
        )

    assert convolve(OPTIONS).shape == (1, 3, 4, 4)
    with pytest.raises(RuntimeError, match=BAD_OPTIONS[options]):
        convolve(options)


LAYERS = {
    "plain": lambda **options: fnn.ConvTranspose2d(8, 6, 3, **options),
    "all options": lambda **options: fnn.ConvTranspose2d(
        8, 6, (3, 2), (2, 1), (1, 0), (1, 0), 2, dilation=(1, 2), activation="gelu", **options
    ),
    "one axis": lambda **options: fnn.ConvTranspose1d(8, 6, 4, 2, **options),
    "three axes": lambda **options: fnn.ConvTranspose3d(8, 6, 2, 2, **options),
    "pool": lambda **options: fnn.ConvTranspose2d(8, 6, 3, pool=("max", 2, 2, 0), **options),
}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_frozen_transposed_convolutions(name, batched, monkeypatch):
    torch.manual_seed(0)
    layer = fmkernels.freeze(LAYERS[name](backend="cpu").eval())
    axes = {"one axis": 1, "three axes": 3}.get(name, 2)
    input = torch.randn(2, 8, *(7, 6, 5)[:axes])[slice(None) if batched else 0]
    with torch.no_grad():
        ours = layer(input)
        monkeypatch.setattr(conv_quick, "conv", lambda *_: None)
        assert torch.equal(layer(input), ours)
        if name == "one axis":
            assert layer(input, output_size=[17]).shape[-1] == 17


def test_transposed_outputs_that_are_too_large_are_refused():
    layer = fmkernels.freeze(fnn.ConvTranspose1d(1, 1, 1, stride=2**31 - 1))
    with torch.no_grad(), pytest.raises(ValueError, match="padding leaves an output of size"):
        layer(torch.zeros(1, 1, 3))
