"""Verification cases for frozen layers: inference from weights that were packed beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fmkernels
from fmkernels.bench.verify_cases import Case, Named, Outputs


def frozen_cases() -> Iterator[Case]:
    """A frozen layer of each kind, over the shapes and options that change how it packs."""
    for layout in (torch.contiguous_format, torch.channels_last):
        conv = partial(_frozen_conv, layout=layout)
        yield conv("3x3 17->33", 17, 33, 3, padding=1)
        yield conv("3x3 32->64 stride 2", 32, 64, 3, stride=2, padding=1)
        yield conv("1x1 48->20", 48, 20, 1)
        yield conv("depthwise 3x3 24", 24, 24, 3, padding=1, groups=24)
        yield conv("3x3 3->16, silu", 3, 16, 3, activation="silu")
        stack = partial(_frozen_stack, layout=layout)
        yield stack("inverted residual 2x16x37x41", 16, 96, 16, (37, 41))
        yield stack("inverted residual stride 2 2x24x40x30->20", 24, 144, 20, (40, 30), stride=2)
        yield stack("inverted residual 2x32x7x7", 32, 192, 32, (7, 7))
    linear = partial(_frozen, "linear", "Linear")
    yield linear("33x47->19", (33, 47), (47, 19))
    yield linear("one row 300->65", (1, 300), (300, 65))
    yield linear("without bias 128x256->192", (128, 256), (256, 192), bias=False)
    lstm = partial(_frozen, "rnn", "LSTM")
    yield lstm("T5 B3 7->9", (5, 3, 7), (7, 9))
    yield lstm("T12 B16 32->64", (12, 16, 32), (32, 64))
    two_ways = {"num_layers": 2, "bidirectional": True}
    yield lstm("bidirectional, 2 layers T6 B3 7->10", (6, 3, 7), (7, 10), **two_ways)
    yield _frozen("rnn", "LSTMCell", "B32 64->64", (32, 64), (64, 64))


def _frozen_conv(
    name: str,
    channels: int,
    out: int,
    kernel: int,
    *,
    layout: torch.memory_format,
    activation: str | None = None,
    **options: Any,
) -> Case:
    suffix = " channels_last" if layout == torch.channels_last else " contiguous"
    return _frozen(
        "conv",
        "Conv2d",
        name + suffix,
        (2, channels, 11, 13),
        (channels, out, kernel),
        place=lambda tensor: tensor.contiguous(memory_format=layout),
        extras={"activation": activation},
        then=F.silu if activation == "silu" else None,
        **options,
    )


def _frozen_stack(
    name: str,
    channels: int,
    wide: int,
    out: int,
    size: tuple[int, int],
    *,
    layout: torch.memory_format,
    stride: int = 1,
) -> Case:
    """Three convolutions that replace() and freeze() make one call of."""
    shapes = {"expand": (wide, channels, 1, 1), "depthwise": (wide, 1, 3, 3)}
    shapes["project"] = (out, wide, 1, 1)

    def make(generator: torch.Generator) -> Named:
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        inputs = {"input": normal(2, channels, *size).contiguous(memory_format=layout)}
        for part, shape in shapes.items():
            inputs[part] = normal(shape) / math.prod(shape[1:]) ** 0.5
            inputs[f"{part} bias"] = normal(shape[0])
        return inputs

    def stack(x: Named) -> nn.Sequential:
        model = nn.Sequential(
            nn.Conv2d(channels, wide, 1),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide),
            nn.ReLU6(),
            nn.Conv2d(wide, out, 1),
        )
        for conv, part in zip(model[::2], shapes, strict=True):
            conv.weight, conv.bias = nn.Parameter(x[part]), nn.Parameter(x[f"{part} bias"])
        return model.eval()

    def ours(x: Named, backend: str) -> Tensor:
        model = stack(x)
        with fmkernels.use_backend(backend):
            fmkernels.replace(model, freeze=True)
            return model(x["input"])

    suffix = " channels_last" if layout == torch.channels_last else " contiguous"
    return Case(
        "conv", "frozen Sequential", name + suffix, make, ours,
        lambda x: stack(x)(x["input"]), gradients=False,
    )  # fmt: skip


def _frozen(
    family: str,
    layer: str,
    name: str,
    shape: tuple[int, ...],
    arguments: tuple[int, ...],
    *,
    place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    extras: dict[str, Any] | None = None,
    then: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> Case:
    """A case for the class ``layer`` of fmkernels.nn and torch.nn.

    Args:
        shape: of the input.
        arguments, options: of both constructors.
        place: puts the input into its memory layout.
        extras: keyword arguments of our constructor alone.
        then: what torch's layer has to be followed by to do the same.
    """
    make_theirs = partial(getattr(nn, layer), *arguments, **options)
    make_ours = partial(getattr(fmkernels.nn, layer), *arguments, **options, **extras or {})
    shapes = {key: p.shape for key, p in make_theirs(device="meta").named_parameters()}

    def make(generator: torch.Generator) -> Named:
        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        fan_in = shapes["weight"][1:].numel() if "weight" in shapes else arguments[-1]
        weights = {key: normal(*size) * fan_in**-0.5 for key, size in shapes.items()}
        return {"input": place(normal(*shape)), **weights}

    def load(module: nn.Module, x: Named) -> nn.Module:
        module.to(x["input"].dtype).load_state_dict({key: x[key] for key in shapes})
        return module.eval()

    def ours(x: Named, backend: str) -> Outputs:
        return _flat(fmkernels.freeze(load(make_ours(backend=backend), x))(x["input"]))

    def theirs(x: Named) -> Outputs:
        output = load(make_theirs(), x)(x["input"])
        return _flat(then(output) if then else output)

    op = f"frozen {layer}"
    return Case(family, op, name, make, ours, theirs, gradients=False)


def _flat(outputs: Any) -> Outputs:
    """LSTM's ``(output, (h, c))`` as one tuple."""
    if isinstance(outputs, Tensor) or isinstance(outputs[1], Tensor):
        return outputs
    return (outputs[0], *outputs[1])
