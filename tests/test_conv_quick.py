"""The everyday call of a convolution, which skips the checks in Python: it is taken, and gives the
same; what it cannot serve, and what is wrong, goes the checked way."""

import sys

import pytest
import torch

import fmkernels
import fmkernels.functional as FF
from fmkernels import _native
from fmkernels import nn as fnn
from fmkernels._dispatch import clear_decisions, last_decisions
from fmkernels.ops.conv import autograd, quick

# The function of the same name hides the module.
functional = sys.modules["fmkernels.functional.conv"]

pytestmark = pytest.mark.skipif(
    not _native.HAS_NATIVE,
    reason="the quick way leads to native kernels, which are not built",
)

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def no_closer_look(monkeypatch):
    def refuse(*_):
        raise AssertionError("took the checked way")

    monkeypatch.setattr(functional, "_run", refuse)


@pytest.fixture
def operands():
    torch.manual_seed(0)
    return {
        "input": torch.randn(2, 32, 9, 8),
        "weight": torch.randn(40, 32, 3, 3) / 17,
        "bias": torch.randn(40),
        "scale": torch.rand(40) + 0.5,
        "shift": torch.randn(40),
        "residual": torch.randn(2, 40, 9, 8),
    }


@pytest.mark.parametrize("backend", [None, "auto", "cpu"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("frozen", [False, True])
def test_everyday_calls_take_the_quick_way(frozen, memory_format, backend, no_closer_look):
    conv = fnn.Conv2d(32, 40, 3, padding=1, activation="relu", backend=backend).eval()
    block = fnn.ConvBlock2d(32, 40, 3, norm="batch", pool=("max", 2, 2, 0), backend=backend).eval()
    input = torch.randn(2, 32, 9, 8).to(memory_format=memory_format)
    for layer in (conv, block):
        layer.to(memory_format=memory_format)
        if frozen:
            fmkernels.freeze(layer)
        with torch.no_grad():
            layer(input)
    clear_decisions()
    with torch.no_grad():
        conv(input)
    logged = [(d.op, d.chosen) for d in last_decisions()]
    assert logged == ([] if backend == "cpu" else [("conv2d", "cpu")])


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_quick_way_gives_what_the_checked_way_gives(
    operands, memory_format, mode, monkeypatch
):
    for name in ("input", "residual"):
        operands[name] = operands[name].to(memory_format=memory_format)
    options = {"padding": 1, "activation": "gelu", "pool": ("max", 2, 2, 0)}
    with torch.no_grad(), fmkernels.precision(mode):
        ours = FF.conv2d(**operands, **options)
        monkeypatch.setattr(quick, "conv", lambda *_: None)
        checked = FF.conv2d(**operands, **options)
    assert torch.equal(ours, checked)
    assert ours.stride() == checked.stride()


# name of an operand -> what no kernel takes as it is
UNUSUAL = {
    "strided input": ("input", lambda x: x.repeat_interleave(2, 3)[..., ::2]),
    "transposed weight": ("weight", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "strided bias": ("bias", lambda x: x.repeat_interleave(2)[::2]),
    "strided scale": ("scale", lambda x: x.repeat_interleave(2)[::2]),
    "residual in the other layout": (
        "residual", lambda x: x.contiguous(memory_format=torch.channels_last),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSUAL)
def test_operands_of_unusual_strides(case, operands):
    name, change = UNUSUAL[case]
    with torch.no_grad():
        expected = FF.conv2d(**operands, padding=1)
        operands[name] = change(operands[name])
        assert torch.equal(FF.conv2d(**operands, padding=1), expected)


WRONG = {
    "dtype of the weight": ("weight", lambda x: x.double(), TypeError),
    "dtype of the bias": ("bias", lambda x: x.bfloat16(), TypeError),
    "length of the scale": ("scale", lambda x: x[1:], ValueError),
    "shape of the residual": ("residual", lambda x: x[:, :, 1:], ValueError),
    "no tensor": ("shift", lambda x: x.tolist(), TypeError),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case, operands):
    name, change, error = WRONG[case]
    operands[name] = change(operands[name])
    with torch.no_grad(), pytest.raises(error, match=name):
        FF.conv2d(**operands, padding=1)


def test_packed_weight_of_another_layer_is_refused(operands):
    layer = fnn.Conv2d(32, 48, 3, backend="cpu")
    fmkernels.freeze(layer)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match="packed_weight"):
        FF.conv2d(operands["input"], operands["weight"], packed_weight=layer._packed_weight)


@pytest.mark.parametrize("graph", [False, True])
def test_calls_with_a_graph_take_the_checked_way(operands, graph, monkeypatch):
    calls, dispatch = [], autograd._dispatch
    monkeypatch.setattr(autograd, "_dispatch", lambda *a: calls.append(a) or dispatch(*a))
    weight = operands["weight"].requires_grad_()
    with torch.set_grad_enabled(graph):
        output = FF.conv2d(operands["input"], weight)
    assert len(calls) == graph
    assert output.requires_grad == graph


@pytest.mark.parametrize("parameter", ["norm.weight", "conv.weight"])
def test_frozen_blocks_that_are_trained_have_a_graph(parameter):
    """Also where the convolution's parameters want none, and the norm was folded without one."""
    block = _frozen(fnn.ConvBlock2d(8, 8, 3, norm="batch", activation="gelu"))
    block.requires_grad_(False)
    wanted = block.get_parameter(parameter).requires_grad_()
    block(torch.randn(1, 8, 9, 9)).square().sum().backward()
    assert wanted.grad.abs().max() > 0


def _frozen(layer):
    layer.eval()
    fmkernels.freeze(layer)
    return layer


LAYERS = {
    "conv": lambda: fnn.Conv2d(32, 40, 3, padding=1, activation="gelu"),
    "same": lambda: fnn.Conv2d(32, 40, (3, 4), padding="same", dilation=2),
    "reflect": lambda: fnn.Conv2d(32, 40, 3, padding=1, padding_mode="reflect"),
    "stride and groups": lambda: fnn.Conv2d(32, 40, 3, stride=(2, 1), groups=4),
    "fused pool": lambda: fnn.Conv2d(32, 40, 3, activation="relu", pool=("max", 3, 2, 1)),
    "pool of its own": lambda: fnn.Conv2d(32, 40, 3, pool=("avg", 4, 2, 0)),
    "one axis": lambda: fnn.Conv1d(32, 40, 3, padding=1),
    "three axes": lambda: fnn.Conv3d(32, 40, 3, padding=1, activation="relu"),
    "block": lambda: fnn.ConvBlock2d(32, 40, 3, norm="batch", activation="relu6"),
    "group norm": lambda: fnn.ConvBlock2d(32, 40, 3, norm=("group", 4), activation="relu"),
}


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_frozen_layers_call_the_op_themselves(name, batched, mode, monkeypatch):
    torch.manual_seed(0)
    layer = _frozen(LAYERS[name]())
    axes = {"one axis": 1, "three axes": 3}.get(name, 2)
    input = torch.randn(2, 32, *(12, 11, 10)[:axes])[slice(None) if batched else 0]
    with torch.no_grad(), fmkernels.precision(mode):
        ours = layer(input)
        monkeypatch.setattr(quick, "conv", lambda *_: None)
        assert torch.equal(layer(input), ours)


def test_attributes_changed_after_freezing_count():
    layer = _frozen(fnn.Conv2d(8, 8, 3, padding=1))
    block = _frozen(fnn.ConvBlock2d(8, 8, 3, norm="batch", activation="relu"))
    input = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        layer(input)
        layer.stride, layer.activation = (2, 2), "relu"
        expected = torch.relu(torch.conv2d(input, layer.weight, layer.bias, 2, 1))
        torch.testing.assert_close(layer(input), expected)
        before = block(input)
        block.activation = None
        assert block(input).min() < 0 <= before.min()
        block.norm.train()
        assert not torch.equal(block(input), before)
        block.norm.eval()
        block.conv.weight.zero_()
        assert torch.equal(block(input)[0, :, 0, 0], block(input)[0, :, 3, 3])


def test_wrong_images_of_frozen_layers_are_named():
    layer = _frozen(fnn.Conv2d(8, 8, 3, padding=1))
    with torch.no_grad():
        for input, error in (
            (torch.randn(1, 7, 9, 9), ValueError),
            (torch.randn(1, 8, 9, 9).double(), TypeError),
            (torch.randn(9), ValueError),
            ([1.0], TypeError),
        ):
            with pytest.raises(error):
                layer(input)
