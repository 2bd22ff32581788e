"""freeze(): same results from packed weights, which notice writes and never reach a state_dict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fmkernels
from fmkernels import nn as fnn
from fmkernels.nn._frozen import Freezable


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3)
        )
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = self.features(x).flatten(2).transpose(1, 2)
        x, _ = self.lstm(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x)


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 10, 10)


@pytest.fixture
def model(inputs):
    """In evaluation, with running statistics that are not the initial ones."""
    model = Model().train()
    model(inputs)
    return model.eval()


def freezable(model):
    return [m for m in model.modules() if isinstance(m, Freezable)]


def test_freeze_and_unfreeze(model, inputs):
    fmkernels.replace(model)
    expected = model(inputs)
    layers = freezable(model)
    assert len(layers) == 6
    assert fmkernels.freeze(model) is model
    assert all(layer.is_frozen for layer in layers)
    torch.testing.assert_close(model(inputs), expected)
    assert fmkernels.unfreeze(model) is model
    assert not any(layer.is_frozen for layer in layers)
    torch.testing.assert_close(model(inputs), expected)


def test_replace_freezes(model, inputs):
    expected = model(inputs)
    report = fmkernels.replace(model, freeze=True, example_inputs=inputs)
    assert all(layer.is_frozen for layer in freezable(model))
    assert report.error < 1e-5
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)


def test_state_dict_and_parameters_are_unchanged(model):
    keys = list(model.state_dict())
    parameters = [name for name, _ in model.named_parameters()]
    fmkernels.replace(model, freeze=True)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == parameters


@pytest.mark.parametrize("write", ["in place", "load_state_dict", "optimizer", "to"])
def test_writes_that_autograd_sees_are_noticed(model, inputs, write):
    fmkernels.replace(model, freeze=True)
    theirs = copy.deepcopy(model)
    fmkernels.unfreeze(theirs)
    before = model(inputs)
    for m in (model, theirs):
        if write == "in place":
            with torch.no_grad():
                for tensor in [*m.parameters(), *m.buffers()]:
                    if tensor.is_floating_point():
                        tensor.mul_(1.1)
        elif write == "load_state_dict":
            # By name, as the frozen buffers are none of the state_dict's business.
            m.load_state_dict({name: value * 1.1 for name, value in theirs.state_dict().items()})
            if m is theirs:
                model.load_state_dict(theirs.state_dict())
        elif write == "optimizer":
            optimizer = torch.optim.SGD(m.parameters(), lr=0.1, foreach=False)
            m(inputs).square().sum().backward()
            optimizer.step()
        else:
            m.to(torch.float64)
    x = inputs.double() if write == "to" else inputs
    expected = theirs(x)
    assert write == "to" or not torch.allclose(before, expected)
    torch.testing.assert_close(model(x), expected)


def test_batch_norm_statistics_written_after_freezing_are_noticed(model, inputs):
    fmkernels.replace(model, freeze=True)
    before = model(inputs)
    model.train()(torch.randn(2, 3, 10, 10) * 3)
    model.eval()
    theirs = fmkernels.unfreeze(copy.deepcopy(model))
    expected = theirs(inputs)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(model(inputs), expected)


def test_frozen_model_can_still_train(model, inputs):
    theirs = copy.deepcopy(model).train()
    fmkernels.replace(model, freeze=True)
    model.train()
    for m in (theirs, model):
        m(inputs).square().sum().backward()
    for (name, a), b in zip(theirs.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_deepcopy_of_a_frozen_model(model, inputs):
    fmkernels.replace(model, freeze=True)
    expected = model(inputs)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(copied(inputs), expected)


def test_check_frozen_accepts_a_model_that_was_not_written(model, inputs, monkeypatch):
    monkeypatch.setenv("FMKERNELS_CHECK_FROZEN", "1")
    fmkernels.replace(model, freeze=True)
    expected = model(inputs)
    torch.testing.assert_close(model(inputs), expected)


def test_check_frozen_sees_hidden_writes(model, inputs, monkeypatch):
    """Shown on the folded batch norm: that is packed whichever backend serves the convolution."""
    monkeypatch.setenv("FMKERNELS_CHECK_FROZEN", "1")
    fmkernels.replace(model, freeze=True)
    model.features[1].weight.data.mul_(2)
    with pytest.raises(RuntimeError, match="freeze it again"):
        model(inputs)
    fmkernels.freeze(model)
    model(inputs)


def test_nothing_to_freeze():
    with pytest.warns(UserWarning, match="contains no fmkernels layer to freeze"):
        fmkernels.freeze(nn.Sequential(nn.Linear(2, 2)))


# Kernel, input channels, groups, pool: packed for direct sums and for Winograd, one tap, which is
# read where it lies, depthwise, and a pool that Winograd does not fuse.
FROZEN_CONVS = [
    (3, 8, 1, None),
    (3, 64, 1, None),
    (1, 32, 1, None),
    (3, 32, 32, None),
    (3, 64, 1, ("max", 2, 7, 0)),
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel, channels, groups, pool", FROZEN_CONVS)
@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_weights_of_any_strides(kernel, channels, groups, pool, memory_format, mode):
    """What was packed is read in the place of a weight whose own strides no kernel reads."""
    layer = fnn.Conv2d(
        channels, 32, kernel, padding=kernel // 2, groups=groups, pool=pool, backend="cpu"
    )
    fmkernels.freeze(layer)
    input = torch.randn(2, channels, 20, 19).to(memory_format=memory_format)
    with torch.no_grad(), fmkernels.precision(mode):
        expected = layer(input)
        dense = layer.weight.detach()
        for strided in (
            dense.to(memory_format=torch.channels_last),
            dense.transpose(0, 1).contiguous().transpose(0, 1),
            dense.repeat_interleave(2, 0)[::2],
        ):
            layer.weight = torch.nn.Parameter(strided)
            assert torch.equal(layer(input), expected)
