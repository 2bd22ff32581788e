"""replace() leaves no convolution of the usual architectures behind, and changes no result."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fmkernels

transformers = pytest.importorskip("transformers")


class DoubleConv(nn.Sequential):
    def __init__(self, channels, out_channels):
        super().__init__(
            nn.Conv2d(channels, out_channels, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.GroupNorm(4, out_channels),
            nn.SiLU(),
        )


class UNet(nn.Module):
    """Ronneberger et al. 2015, arXiv:1505.04597, small."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = DoubleConv(3, 8), DoubleConv(8, 16)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge = DoubleConv(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        fine = self.down1(x)
        coarse = self.down2(self.pool(fine))
        return self.head(self.merge(torch.cat((fine, self.up(coarse)), 1)))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        squeezed = channels // 4
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x):
        return x * self.scale(x)


class InvertedResidual(nn.Module):
    def __init__(self, channels, expanded, out_channels, kernel, stride, squeezes, activation):
        super().__init__()
        self.adds = stride == 1 and channels == out_channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, expanded, 1, bias=False),
            nn.BatchNorm2d(expanded, eps=1e-3, momentum=0.01),
            activation(inplace=True),
            nn.Conv2d(
                expanded, expanded, kernel, stride, kernel // 2, groups=expanded, bias=False
            ),
            nn.BatchNorm2d(expanded, eps=1e-3, momentum=0.01),
            activation(inplace=True),
            SqueezeExcitation(expanded) if squeezes else nn.Identity(),
            nn.Conv2d(expanded, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01),
        )

    def forward(self, x):
        return x + self.layers(x) if self.adds else self.layers(x)


class MobileNetV3(nn.Sequential):
    """Howard et al. 2019, arXiv:1905.02244, with a block of each kind."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8, eps=1e-3, momentum=0.01),
            nn.Hardswish(inplace=True),
            InvertedResidual(8, 16, 8, 3, 1, squeezes=True, activation=nn.ReLU),
            InvertedResidual(8, 24, 12, 5, 2, squeezes=False, activation=nn.Hardswish),
            InvertedResidual(12, 32, 12, 5, 1, squeezes=True, activation=nn.Hardswish),
            nn.Conv2d(12, 32, 1, bias=False),
            nn.BatchNorm2d(32, eps=1e-3, momentum=0.01),
            nn.Hardswish(inplace=True),
        )


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"
    )
    return transformers.ResNetModel(config), torch.randn(2, 3, 32, 32)


def mobilenet_v2():
    config = transformers.MobileNetV2Config(image_size=64, depth_multiplier=0.35)
    return transformers.MobileNetV2Model(config), torch.randn(2, 3, 64, 64)


def mobilenet_v3():
    return MobileNetV3(), torch.randn(4, 3, 48, 48)


def convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    return transformers.ConvNextModel(config), torch.randn(2, 3, 64, 64)


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        mask_time_prob=0.0,
        activation_dropout=0.0,
    )
    return transformers.Wav2Vec2Model(config), torch.randn(2, 2400)


def unet():
    return UNet(), torch.randn(2, 3, 16, 20)


MODELS = {f.__name__: f for f in (resnet, mobilenet_v2, mobilenet_v3, convnext, wav2vec2, unet)}


def first_tensor(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def run(model, input, dtype):
    output = first_tensor(model(input.to(dtype)))
    torch.manual_seed(5)
    grad = torch.randn(output.shape, dtype=torch.float64).to(dtype)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(output, list(parameters.values()), grad, allow_unused=True)
    results = {name: g for name, g in zip(parameters, grads, strict=True) if g is not None}
    return {"output": output.detach(), **results}


def distance(results, exact):
    """Of all tensors together, relative to their norm: single ones may be sums that cancel."""
    total = sum(
        (results[n].double() - e).square().sum() for n, e in exact.items() if n != "output"
    )
    norm = sum(e.square().sum() for n, e in exact.items() if n != "output")
    output = (results["output"].double() - exact["output"]).norm() / exact["output"].norm()
    return float(output), float((total / norm).sqrt())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_no_convolution_is_kept(make, training):
    torch.manual_seed(1)
    model, input = make()
    model.train(training)
    exact = run(copy.deepcopy(model).double(), input, torch.float64)
    theirs = run(copy.deepcopy(model), input, torch.float32)
    report = fmkernels.replace(model, families=("conv",))
    kept = [row for row in report.rows if row.status == "kept"]
    assert report.rows and not kept, kept
    ours = run(model, input, torch.float32)
    assert ours.keys() == theirs.keys()
    floor = 2e-5  # Winograd: 1e-5 of the largest output of each layer
    pairs = zip(distance(ours, exact), distance(theirs, exact), strict=True)
    for actual, from_torch in pairs:
        assert actual <= 2 * from_torch + floor
    buffers = dict(model.named_buffers())
    assert all(buffer.isfinite().all() for buffer in buffers.values())


def test_computed_weight_stays_computed():
    """weight_norm as a parametrization, as in Wav2Vec2's position embedding."""
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3, padding=1), dim=2)
    model = nn.Sequential(layer)
    exact = copy.deepcopy(model)
    report = fmkernels.replace(model)
    assert report.rows[0].status == "replaced"
    assert model.state_dict().keys() == exact.state_dict().keys()
    input = torch.randn(2, 4, 9)
    for module in (model, exact):
        module.zero_grad()
        module(input).square().sum().backward()
    torch.testing.assert_close(model(input), exact(input))
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(copy.deepcopy(model)(input), exact(input))
    report.undo()
    assert model[0] is layer
