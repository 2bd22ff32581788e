"""Verification cases for the parts of a Transformer around its attention: norms, feed-forward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fmkernels import functional
from fmkernels.bench.verify_cases import Case, Named
from fmkernels.testing import torch_activation

EPS = 1e-5


def transformer_cases() -> Iterator[Case]:
    """Layer and RMS norm, alone and of a sum; feed-forward, plain and gated."""
    for rms in (False, True):
        kind = "rms_norm" if rms else "layer_norm"
        norm = partial(_norm, kind, rms)
        yield norm("17x33", (17,), 33)
        yield norm("2x9x512", (2, 9), 512)
        yield norm("without parameters 20x40", (20,), 40, affine=False)
        yield norm("of a sum 17x33", (17,), 33, residual=True)
        yield norm("of a sum 300x64, and the sum", (300,), 64, residual=True, return_sum=True)
    for gated in (False, True):
        block = partial(_feed_forward, gated)
        form = "gated " if gated else ""
        for activation in ("relu", "gelu", "silu"):
            yield block(f"{form}{activation} 17x33->70->19", (17,), 33, 70, 19, activation)
        yield block(f"{form}residual 3x5x64->256->64", (3, 5), 64, 256, 64, "silu", residual=True)
        yield block(f"{form}one row 64->200->48", (1,), 64, 200, 48, "gelu_tanh")
        yield block(f"{form}without bias 20x31->40->16", (20,), 31, 40, 16, "silu", bias=False)


def _norm(
    op: str,
    rms: bool,
    name: str,
    rows: tuple[int, ...],
    features: int,
    *,
    affine: bool = True,
    residual: bool = False,
    return_sum: bool = False,
) -> Case:
    def make(generator: torch.Generator) -> Named:
        def sixteenths(*shape: int) -> Tensor:
            # Sums of these need no rounding in any dtype; one rounding would outweigh the rest.
            values = torch.randint(-32, 33, shape, generator=generator)
            return values.double() / 16

        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        inputs = {"input": sixteenths(*rows, features)}
        if residual:
            inputs["residual"] = sixteenths(*rows, features)
        if affine:
            inputs["weight"] = normal(features)
        if affine and not rms:
            inputs["bias"] = normal(features)
        return inputs

    def parameters(x: Named) -> tuple:
        return (x.get("weight"),) if rms else (x.get("weight"), x.get("bias"))

    def ours(x: Named, backend: str) -> Tensor | tuple[Tensor, Tensor]:
        of_features = (features, *parameters(x), EPS)
        if not residual:
            function = functional.rms_norm if rms else functional.layer_norm
            return function(x["input"], *of_features, backend=backend)
        function = functional.add_rms_norm if rms else functional.add_layer_norm
        options = {"return_sum": return_sum, "backend": backend}
        return function(x["input"], x["residual"], *of_features, **options)

    def theirs(x: Named) -> Tensor | tuple[Tensor, Tensor]:
        total = x["input"] + x["residual"] if residual else x["input"]
        function = F.rms_norm if rms else F.layer_norm
        output = function(total, (features,), *parameters(x), EPS)
        return (output, total) if return_sum else output

    return Case("linear", f"add_{op}" if residual else op, name, make, ours, theirs)


def _feed_forward(
    gated: bool,
    name: str,
    rows: tuple[int, ...],
    features: int,
    hidden: int,
    out: int,
    activation: str,
    *,
    bias: bool = True,
    residual: bool = False,
) -> Case:
    exact = activation == "relu"  # see _CORNERED in verify_cases.py

    def make(generator: torch.Generator) -> Named:
        def draw(*shape: int) -> Tensor:
            if exact:
                return torch.randint(-1, 2, shape, generator=generator).double()
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def weight(rows: int, columns: int) -> Tensor:
            return draw(rows, columns) * (1.0 if exact else columns**-0.5)

        inputs = {
            "input": draw(*rows, features),
            "weight1": weight(hidden, features),
            "weight2": weight(out, hidden),
        }
        if gated:
            inputs["gate_weight"] = weight(hidden, features)
        if bias:
            inputs |= {"bias1": draw(hidden), "bias2": draw(out)}
        if bias and gated:
            inputs["gate_bias"] = draw(hidden)
        if residual:
            inputs["residual"] = draw(*rows, out)
        return inputs

    def ours(x: Named, backend: str) -> Tensor:
        biases = {"bias1": x.get("bias1"), "bias2": x.get("bias2")}
        return functional.feed_forward(**(biases | x), activation=activation, backend=backend)

    def theirs(x: Named) -> Tensor:
        hidden = F.linear(x["input"], x["weight1"], x.get("bias1"))
        if gated:
            gate = F.linear(x["input"], x["gate_weight"], x.get("gate_bias"))
            hidden = torch_activation(activation, gate) * hidden
        else:
            hidden = torch_activation(activation, hidden)
        output = F.linear(hidden, x["weight2"], x.get("bias2"))
        return output + x["residual"] if residual else output

    return Case("linear", "feed_forward", name, make, ours, theirs)
