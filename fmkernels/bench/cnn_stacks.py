"""Convolutional networks in PyTorch's own words, to be measured whole.

The residual stack of ResNet-18 (He et al., arXiv:1512.03385) and the inverted residuals of
MobileNetV2 (Sandler et al., arXiv:1801.04381).
"""

from __future__ import annotations

import torch
from torch import nn


def conv_norm(channels: int, out: int, kernel: int, *, act=nn.ReLU, **options) -> list[nn.Module]:
    """Convolution without a bias, batch norm, and the activation unless ``act`` is None."""
    conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False, **options)
    return [conv, nn.BatchNorm2d(out), *([act()] if act else [])]


class Residual(nn.Module):
    """ResNet's basic block: two 3x3 convolutions and a sum."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        first = conv_norm(channels, out, 3, stride=stride)
        self.body = nn.Sequential(*first, *conv_norm(out, out, 3, act=None))
        changed = stride != 1 or channels != out
        shortcut = conv_norm(channels, out, 1, act=None, stride=stride) if changed else []
        self.shortcut = nn.Sequential(*shortcut)
        self.act = nn.ReLU()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.act(self.body(image) + self.shortcut(image))


class InvertedResidual(nn.Module):
    """1x1 to ``expand`` times the channels, depthwise 3x3, 1x1 back, and a sum where it fits."""

    def __init__(self, channels: int, out: int, stride: int = 1, expand: int = 6) -> None:
        super().__init__()
        wide = channels * expand
        self.body = nn.Sequential(
            *(conv_norm(channels, wide, 1, act=nn.ReLU6) if expand != 1 else []),
            *conv_norm(wide, wide, 3, act=nn.ReLU6, stride=stride, groups=wide),
            *conv_norm(wide, out, 1, act=None),
        )
        self.adds = stride == 1 and channels == out

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + self.body(image) if self.adds else self.body(image)


def _classifier(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]


def resnet18() -> nn.Sequential:
    """64, 128, 256, 512 channels in pairs of basic blocks, from 3 x 224 x 224."""
    layers: list[nn.Module] = [*conv_norm(3, 64, 7, stride=2), nn.MaxPool2d(3, 2, padding=1)]
    channels = 64
    for out in (64, 128, 256, 512):
        layers += [Residual(channels, out, 1 if out == channels else 2), Residual(out, out)]
        channels = out
    return nn.Sequential(*layers, *_classifier(channels))


def mobilenet_v2() -> nn.Sequential:
    """The blocks of MobileNetV2 at width 1, from 3 x 224 x 224."""
    layers: list[nn.Module] = [*conv_norm(3, 32, 3, act=nn.ReLU6, stride=2)]
    layers.append(InvertedResidual(32, 16, expand=1))
    channels = 16
    for out, count, stride in (
        (24, 2, 2),
        (32, 3, 2),
        (64, 4, 2),
        (96, 3, 1),
        (160, 3, 2),
        (320, 1, 1),
    ):
        for i in range(count):
            layers.append(InvertedResidual(channels, out, stride if i == 0 else 1))
            channels = out
    layers += conv_norm(channels, 1280, 1, act=nn.ReLU6)
    return nn.Sequential(*layers, *_classifier(1280))
