"""The reference architectures: both kinds of layers agree in names, values and training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fmkernels import models, testing, use_backend
from fmkernels import nn as fnn
from fmkernels.bench import numerics
from fmkernels.ops.linear.backends import LINEAR

BUILDERS = {
    "cnn-large": (lambda **o: models.CNN("large", **o), [(2, 3, 32, 32)], (2, 10)),
    "cnn-small": (lambda **o: models.CNN("small", **o), [(2, 3, 32, 32)], (2, 10)),
    "cnn-other-sizes": (
        lambda **o: models.CNN("small", in_channels=1, image_size=27, num_classes=4, **o),
        [(2, 1, 27, 27)],
        (2, 4),
    ),
    "rnn": (lambda **o: models.RNN(8, **o), [(2, 7, 8)], (2, 10)),
    "transformer": (
        lambda **o: models.Transformer(
            2, d_model=32, nhead=4, dim_feedforward=64, dropout=0.0, **o
        ),
        [(2, 5, 32), (2, 7, 32)],
        (2, 5, 32),
    ),
}


@pytest.fixture(params=BUILDERS)
def pair(request):
    """A model with torch's layers, the same with ours from the same seed, inputs, output shape."""
    build, shapes, output = BUILDERS[request.param]
    torch.manual_seed(1)
    theirs = build(layers="torch")
    torch.manual_seed(1)
    ours = build(layers="fmkernels")
    return theirs, ours, [torch.randn(shape) for shape in shapes], output


def test_same_names_and_initial_values(pair):
    theirs, ours, _, _ = pair
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_layers_come_from_the_package_asked_for(pair):
    theirs, ours, _, _ = pair
    layer_kinds = (
        nn.Conv2d,
        nn.Linear,
        nn.LSTM,
        nn.MultiheadAttention,
        nn.TransformerDecoderLayer,
    )

    def packages(model):
        layers = [m for m in model.modules() if isinstance(m, layer_kinds)]
        return {type(layer).__module__.split(".")[0] for layer in layers}

    assert packages(theirs) == {"torch"}
    assert packages(ours) == {"fmkernels"}


def test_same_results(pair):
    theirs, ours, inputs, shape = pair
    expected = theirs.eval()(*inputs)
    actual = ours.eval()(*inputs)
    assert actual.shape == shape
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


BACKENDS = testing.available_backends(LINEAR, torch.zeros(1, 1), torch.zeros(1, 1), None)


def step(model, inputs):
    output = model.eval()(*inputs)
    gradients = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    names = [f"grad {name}" for name, _ in model.named_parameters()]
    return {"output": output.detach()} | dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_layer_on_one_backend(pair, backend):
    theirs, ours, inputs, _ = pair
    with use_backend(backend):
        found = step(ours, inputs)
    eager = step(theirs, inputs)
    oracle = step(theirs.double(), [tensor.double() for tensor in inputs])
    verdict = numerics.check(found, [eager], oracle, torch.float32, corners=True)
    assert verdict.ok, verdict.message


def test_state_dicts_interchange(pair):
    theirs, ours, inputs, _ = pair
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.5)
    ours.load_state_dict(theirs.state_dict())
    expected = theirs.eval()(*inputs)
    torch.testing.assert_close(ours.eval()(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_same_training(pair):
    theirs, ours, inputs, shape = pair
    target = torch.randn(shape)
    losses = []
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        model.train()
        losses.append([])
        for _ in range(5):
            loss = F.mse_loss(model(*inputs), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_cnn_fuses_convolution_activation_and_pooling():
    model = models.CNN("small", layers="fmkernels")
    assert [type(m) for m in model.features] == [fnn.Conv2d] * 3
    assert [(m.activation, m.pool) for m in model.features] == [
        ("relu", ("max", 2)),
        ("relu", ("max", 2)),
        ("relu", None),
    ]


@pytest.mark.parametrize("layers", ["torch", "fmkernels"])
def test_cnn_sizes_are_those_of_the_reference_architectures(layers):
    large = models.CNN("large", layers)
    assert large.features.conv2.weight.shape == (128, 64, 3, 3)
    assert large.classifier.dense1.weight.shape == (512, 128 * 8 * 8)
    small = models.CNN("small", layers)
    assert small.features.conv3.weight.shape == (64, 64, 3, 3)
    assert small.classifier.dense1.weight.shape == (64, 64 * 4 * 4)


def test_transformer_defaults_have_eight_heads_of_64():
    attention = models.Transformer(1).layers[0].self_attn
    assert (attention.num_heads, attention.head_dim) == (8, 64)


def test_causal_transformer_does_not_look_ahead():
    build, shapes, _ = BUILDERS["transformer"]
    theirs, ours = build(layers="torch").eval(), build(layers="fmkernels").eval()
    ours.load_state_dict(theirs.state_dict())
    target, memory = (torch.randn(shape) for shape in shapes)
    changed = target.clone()
    changed[:, 3:] += 1
    before = ours(target, memory, is_causal=True)
    after = ours(changed, memory, is_causal=True)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3:], before[:, 3:])
    expected = theirs(target, memory, is_causal=True)
    torch.testing.assert_close(before, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.CNN("medium"), "variant must be one of large, small, got 'medium'"),
        (lambda: models.CNN(layers="keras"), "layers must be one of torch, fmkernels"),
        (lambda: models.CNN("small", image_size=9), "image_size is too small .* got 9"),
        (lambda: models.RNN(layers="keras"), "layers must be one of torch, fmkernels"),
        (lambda: models.Transformer(layers="keras"), "layers must be one of torch, fmkernels"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
