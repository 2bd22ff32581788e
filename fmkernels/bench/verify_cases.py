"""What ``fmkernels verify`` computes: for each op, a set of shapes, layouts and options.

A case states the inputs as a recipe and the same computation twice: through
``fmkernels.functional`` and through PyTorch. Shapes are small but cross the kernels' block edges:
odd sizes, single elements, channel counts on both sides of a vector's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmkernels import functional
from fmkernels._attention_oracle import attend
from fmkernels.ops import _activations
from fmkernels.testing import torch_activation

Named = dict[str, Tensor]
Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One computation to verify.

    Attributes:
        family, op, name: what it is; ``name`` says the shape, layout and options.
        make: returns float64 inputs by name, drawn from the given generator; every one of floating
            point gets a gradient, except those whose name is in ``constants``.
        ours: the computation through fmkernels: ``ours(inputs, backend)``.
        torch: the same through PyTorch.
        constants: inputs that take no gradient.
        gradients: False for inference alone.
    """

    family: str
    op: str
    name: str
    make: Callable[[torch.Generator], Named]
    ours: Callable[[Named, str], Outputs]
    torch: Callable[[Named], Outputs]
    constants: tuple[str, ...] = ()
    gradients: bool = True


def all_cases() -> list[Case]:
    """Every case of every op, family by family."""
    return [
        *conv_cases(),
        *conv_axes_cases(),
        *max_pool_cases(),
        *avg_pool_cases(),
        *linear_cases(),
        *rnn_cases(),
        *attention_cases(),
    ]


# Activations with a corner. A pre-activation next to it may fall on either side by one rounding,
# in PyTorch's own runs too; that makes errors, and so tolerances, of any size. Their cases (and
# those with max-pooling, which has the same trouble with ties) take small integers as inputs,
# whose sums are exact in every dtype.
_CORNERED = ("relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid")


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def _integers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-1, 2, shape, generator=generator).double()


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """``tensor`` (4-D) with the same values in another memory layout."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype)
        wide[..., 1:-2] = tensor
        return wide[..., 1:-2]
    if layout == "transposed":  # dims 1 and 2 swapped in memory, as attention's heads often are
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor


# ---------------------------------------------------------------------------------- convolution


def _conv_inputs(
    generator, *, shape, out, kernel, groups, layout, bias, affine, residual, exact
) -> Named:
    draw = partial(_integers if exact else _normal, generator)
    fan_in = shape[1] // groups * kernel[0] * kernel[1]
    weight = draw(out, shape[1] // groups, *kernel)
    inputs = {
        "input": _laid_out(draw(*shape), layout),
        "weight": weight if exact else weight * fan_in**-0.5,
    }
    if bias:
        inputs["bias"] = draw(out)
    if affine:
        inputs["scale"] = draw(out).abs() + (1.0 if exact else 0.5)
        inputs["shift"] = draw(out)
    if residual is not None:
        inputs["residual"] = _laid_out(draw(*residual), layout)
    return inputs


def _torch_conv(inputs: Named, *, geometry: dict[str, Any], activation, pool) -> Tensor:
    y = F.conv2d(inputs["input"], inputs["weight"], inputs.get("bias"), **geometry)
    if "scale" in inputs:
        y = y * inputs["scale"][:, None, None] + inputs["shift"][:, None, None]
    if "residual" in inputs:
        y = y + inputs["residual"]
    y = torch_activation(activation, y)
    return F.max_pool2d(y, *pool[1:]) if pool else y


def _our_conv(inputs: Named, backend: str, *, geometry, activation, pool) -> Tensor:
    extras = {key: inputs[key] for key in ("scale", "shift", "residual") if key in inputs}
    return functional.conv2d(
        inputs["input"],
        inputs["weight"],
        inputs.get("bias"),
        **geometry,
        activation=activation,
        pool=pool,
        backend=backend,
        **extras,
    )


def _conv(
    name: str,
    shape=(2, 5, 9, 11),
    out=7,
    kernel=(3, 3),
    *,
    layout="contiguous",
    bias=True,
    affine=False,
    residual=False,
    activation=None,
    pool=None,
    **geometry,
) -> Case:
    residual_shape = None
    if residual:
        with torch.device("meta"):
            empty = torch.empty(out, shape[1] // geometry.get("groups", 1), *kernel)
            residual_shape = tuple(F.conv2d(torch.empty(shape), empty, **geometry).shape)
    make = partial(
        _conv_inputs,
        shape=shape,
        out=out,
        kernel=kernel,
        groups=geometry.get("groups", 1),
        layout=layout,
        bias=bias,
        affine=affine,
        residual=residual_shape,
        exact=activation in _CORNERED or pool is not None,
    )
    options = {"geometry": geometry, "activation": activation, "pool": pool}
    return Case(
        "conv",
        "conv2d",
        f"{name} {layout}",
        make,
        partial(_our_conv, **options),
        partial(_torch_conv, **options),
    )


def conv_cases() -> Iterator[Case]:
    for layout in ("contiguous", "channels_last"):
        conv = partial(_conv, layout=layout)
        yield conv("3x3", padding=1)
        yield conv("3x3 without bias or padding", bias=False)
        yield conv("3x3 17->33 channels", (2, 17, 8, 13), 33, padding=1)
        yield conv("3x3 32->64 channels", (2, 32, 16, 16), 64, padding=1)
        yield conv("3x3 64->64 channels 1x7x7", (1, 64, 7, 7), 64, padding=1)
        yield conv("3x3 stride 2", (2, 16, 15, 14), 24, stride=2, padding=1)
        yield conv("3x3 dilation 2", dilation=2, padding=2)
        yield conv("5x3 stride (2, 1)", kernel=(5, 3), stride=(2, 1), padding=(2, 0))
        yield conv("1x1", (3, 19, 6, 7), 21, (1, 1))
        yield conv("1x1 stride 2", (2, 32, 8, 8), 16, (1, 1), stride=2)
        yield conv("7x7 stride 2 from 3 channels", (2, 3, 20, 22), 16, (7, 7), stride=2, padding=3)
        yield conv("groups 2", (2, 12, 7, 8), 10, groups=2, padding=1)
        yield conv("depthwise", (2, 21, 9, 10), 21, groups=21, padding=1)
        yield conv("depthwise stride 2", (2, 16, 9, 10), 16, groups=16, stride=2, padding=1)
        yield conv("1x1 image", (4, 8, 1, 1), 8, padding=1)
        yield conv("scale and shift", (2, 16, 8, 8), 16, padding=1, affine=True)
        yield conv("residual relu", (2, 16, 8, 8), 16, padding=1, residual=True, activation="relu")
        yield conv(
            "scale, shift, relu, pool 2x2",
            (2, 3, 16, 16),
            32,
            padding=1,
            affine=True,
            activation="relu",
            pool=("max", 2, 2, 0),
        )
        yield conv("pool 2x2 of odd size", padding=1, pool=("max", 2, 2, 0))
        yield conv("silu, pool 3x3", padding=1, activation="silu", pool=("max", 3, 2, 1))
        for activation in _activations.NAMES:
            yield conv(activation, (2, 8, 6, 7), 18, padding=1, activation=activation)
    yield _conv("3x3", layout="sliced", padding=1)


def _axes_case(name, ours, theirs, shape, weight, **options) -> Case:
    """A convolution of any form, with bias; ``options`` are torch's."""
    fan_in = math.prod(weight) // (weight[1] if ours.__name__.startswith("conv_t") else weight[0])

    def make(generator: torch.Generator) -> Named:
        return {
            "input": _normal(generator, *shape),
            "weight": _normal(generator, *weight) * fan_in**-0.5,
        }

    return Case(
        "conv",
        ours.__name__,
        name,
        make,
        lambda x, b: ours(x["input"], x["weight"], **options, backend=b),
        lambda x: theirs(x["input"], x["weight"], **options),
    )


def conv_axes_cases() -> Iterator[Case]:
    f = functional
    yield _axes_case("5 taps", f.conv1d, F.conv1d, (2, 16, 50), (24, 16, 5), padding=2)
    yield _axes_case("stride 5", f.conv1d, F.conv1d, (2, 1, 1500), (32, 1, 10), stride=5)
    yield _axes_case("depthwise", f.conv1d, F.conv1d, (2, 20, 40), (20, 1, 4), groups=20)
    yield _axes_case("3x3x3", f.conv3d, F.conv3d, (1, 8, 5, 7, 6), (16, 8, 3, 3, 3), padding=1)
    transposed = (
        (f.conv_transpose1d, F.conv_transpose1d, 1),
        (f.conv_transpose2d, F.conv_transpose2d, 2),
        (f.conv_transpose3d, F.conv_transpose3d, 3),
    )
    for ours, theirs, dims in transposed:
        shape, weight = (2, 8, *(5,) * dims), (8, 12, *(3,) * dims)
        options = {"stride": 2, "padding": 1, "output_padding": 1}
        yield _axes_case("stride 2", ours, theirs, shape, weight, **options)


def avg_pool_cases() -> Iterator[Case]:
    for layout in ("contiguous", "channels_last"):
        for name, options in (("2x2", (2,)), ("3x3 stride 2, uncounted", (3, 2, 1, True, False))):
            yield Case(
                "conv",
                "avg_pool2d",
                f"{name} {layout}",
                lambda g, to=layout: {"input": _laid_out(_normal(g, 2, 21, 9, 11), to)},
                lambda x, b, o=options: functional.avg_pool2d(x["input"], *o, backend=b),
                lambda x, o=options: F.avg_pool2d(x["input"], *o),
            )


def max_pool_cases() -> Iterator[Case]:
    shapes = {"2x5x9x11": (2, 5, 9, 11), "1x33x8x8": (1, 33, 8, 8)}
    options = {
        "2x2": {"kernel_size": 2},
        "3x3 stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
        "3x2 dilated, ceil": {
            "kernel_size": (3, 2),
            "stride": 2,
            "dilation": 2,
            "ceil_mode": True,
        },
    }
    for layout in ("contiguous", "channels_last", "sliced"):
        for size, shape in shapes.items():
            for name, option in options.items():
                yield Case(
                    "conv",
                    "max_pool2d",
                    f"{name} of {size} {layout}",
                    lambda g, s=shape, to=layout: {"input": _laid_out(_normal(g, *s), to)},
                    lambda x, b, o=option: functional.max_pool2d(x["input"], **o, backend=b),
                    lambda x, o=option: F.max_pool2d(x["input"], **o),
                )


# --------------------------------------------------------------------------------------- linear


def _linear(name: str, rows: tuple[int, ...], features: int, out: int, **options) -> Case:
    bias, residual = options.pop("bias", True), options.pop("residual", False)
    activation = options.pop("activation", None)

    def make(generator: torch.Generator) -> Named:
        exact = activation in _CORNERED
        draw = partial(_integers if exact else _normal, generator)
        weight = draw(out, features)
        inputs = {
            "input": draw(*rows, features),
            "weight": weight if exact else weight * features**-0.5,
        }
        if bias:
            inputs["bias"] = draw(out)
        if residual:
            inputs["residual"] = draw(*rows, out)
        return inputs

    def ours(x: Named, backend: str) -> Tensor:
        return functional.linear(
            x["input"],
            x["weight"],
            x.get("bias"),
            activation=activation,
            residual=x.get("residual"),
            backend=backend,
        )

    def theirs(x: Named) -> Tensor:
        y = F.linear(x["input"], x["weight"], x.get("bias"))
        return torch_activation(activation, y + x["residual"] if residual else y)

    return Case("linear", "linear", name, make, ours, theirs)


def linear_cases() -> Iterator[Case]:
    yield _linear("33x47->19", (33,), 47, 19)
    yield _linear("128x256->192", (128,), 256, 192)
    yield _linear("one row 300->65", (1,), 300, 65)
    yield _linear("3x5x64->128", (3, 5), 64, 128)
    yield _linear("a vector 40->24", (), 40, 24)
    yield _linear("17x1->1", (17,), 1, 1)
    yield _linear("without bias 20x31->16", (20,), 31, 16, bias=False)
    yield _linear("residual relu 20x32->48", (20,), 32, 48, residual=True, activation="relu")
    for activation in _activations.NAMES:
        yield _linear(f"{activation} 9x33->20", (9,), 33, 20, activation=activation)


# ------------------------------------------------------------------------------------------ rnn


def _off_the_corner(
    generator: torch.Generator, steps: int, batch: int, features: int, hidden: int
) -> Named:
    """Operands of a relu RNN whose pre-activations keep clear of zero, see _CORNERED.

    Integers would not do: from step to step they grow beyond what a narrow dtype holds exactly. So
    the pre-activations are drawn first and the inputs found from them: W_ih has orthonormal rows.
    """
    assert features >= hidden, "the inputs must reach every pre-activation"
    w_ih = torch.linalg.qr(_normal(generator, features, hidden))[0].T
    w_hh = _normal(generator, hidden, hidden, scale=hidden**-0.5)
    b_ih, b_hh = (_normal(generator, hidden, scale=hidden**-0.5) for _ in range(2))
    wanted = _normal(generator, steps, batch, hidden)
    wanted = wanted + 0.25 * wanted.sign()
    before = torch.cat([wanted.new_zeros(1, batch, hidden), wanted[:-1].relu()])
    return {
        "input": (wanted - b_ih - b_hh - before @ w_hh.T) @ w_ih,
        "weight_ih_l0": w_ih.contiguous(),
        "weight_hh_l0": w_hh,
        "bias_ih_l0": b_ih,
        "bias_hh_l0": b_hh,
    }


def _recurrent(
    kind: str,
    name: str,
    shape: tuple[int, int, int],
    hidden: int,
    *,
    hx: bool = False,
    bias: bool = True,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    nonlinearity: str = "tanh",
) -> Case:
    """A layer of ``kind`` "lstm", "gru" or "rnn" on an input of ``shape``."""
    lstm = kind == "lstm"
    options = {"bidirectional": bidirectional, "device": "meta"}
    if proj_size:
        options["proj_size"] = proj_size
    template = getattr(nn, kind.upper())(
        shape[2],
        hidden,
        num_layers,
        bias=bias,
        batch_first=batch_first,
        **options,
    )
    weight_names = [key for key, _ in template.named_parameters()]
    states = (num_layers * (1 + bidirectional), shape[0 if batch_first else 1])

    def make(generator: torch.Generator) -> Named:
        if nonlinearity == "relu":
            return _off_the_corner(generator, *shape, hidden)
        inputs = {"input": _normal(generator, *shape)}
        if hx:
            inputs["h0"] = _normal(generator, *states, proj_size or hidden, scale=0.5)
            if lstm:
                inputs["c0"] = _normal(generator, *states, hidden)
        for key, parameter in template.named_parameters():
            inputs[key] = _normal(generator, *parameter.shape, scale=hidden**-0.5)
        return inputs

    def arguments(x: Named) -> tuple:
        h0 = x.get("h0", x["input"].new_zeros(*states, proj_size or hidden))
        state = (h0, x.get("c0", x["input"].new_zeros(*states, hidden))) if lstm else h0
        weights = [x[key] for key in weight_names]
        return x["input"], state, weights, bias, num_layers, 0.0, False, bidirectional, batch_first

    extra = {"nonlinearity": nonlinearity} if kind == "rnn" else {}
    theirs = getattr(torch, f"rnn_{nonlinearity}" if kind == "rnn" else kind)
    return Case(
        "rnn",
        kind,
        name,
        make,
        lambda x, backend: getattr(functional, kind)(*arguments(x), **extra, backend=backend),
        lambda x: theirs(*arguments(x)),
    )


def _cell(kind: str, name: str, batch: int, features: int, hidden: int) -> Case:
    """One step of "lstm_cell", "gru_cell", "rnn_tanh_cell" or "rnn_relu_cell"."""
    rows = {"lstm": 4, "gru": 3, "rnn": 1}[kind.split("_")[0]] * hidden

    def make(generator: torch.Generator) -> Named:
        draw = partial(_normal, generator)
        inputs = {"input": draw(batch, features), "h": draw(batch, hidden, scale=0.5)}
        if kind == "lstm_cell":
            inputs["c"] = draw(batch, hidden)
        return inputs | {
            "w_ih": draw(rows, features, scale=hidden**-0.5),
            "w_hh": draw(rows, hidden, scale=hidden**-0.5),
            "b_ih": draw(rows, scale=0.2),
            "b_hh": draw(rows, scale=0.2),
        }

    def arguments(x: Named) -> tuple:
        state = (x["h"], x["c"]) if kind == "lstm_cell" else x["h"]
        return x["input"], state, x["w_ih"], x["w_hh"], x["b_ih"], x["b_hh"]

    return Case(
        "rnn",
        kind,
        name,
        make,
        lambda x, backend: getattr(functional, kind)(*arguments(x), backend=backend),
        lambda x: getattr(torch, kind)(*arguments(x)),
    )


def rnn_cases() -> Iterator[Case]:
    for kind in ("lstm", "gru", "rnn"):
        layer = partial(_recurrent, kind)
        yield layer("T5 B3 7->9", (5, 3, 7), 9)
        yield layer("T12 B16 32->64", (12, 16, 32), 64)
        yield layer("T9 B1 24->48", (9, 1, 24), 48)
        yield layer("T1 B2 5->16", (1, 2, 5), 16)
        yield layer("T6 B5 11->20 with hx", (6, 5, 11), 20, hx=True)
        yield layer("batch first B4 T6 10->12", (4, 6, 10), 12, batch_first=True)
        yield layer("without bias T4 B3 8->8", (4, 3, 8), 8, bias=False)
        two_ways = {"hx": True, "num_layers": 2, "bidirectional": True}
        yield layer("bidirectional, 2 layers T6 B3 7->10 with hx", (6, 3, 7), 10, **two_ways)
    yield _recurrent("lstm", "projection T6 B3 7->20->9", (6, 3, 7), 20, proj_size=9)
    yield _recurrent("rnn", "relu T6 B3 11->9", (6, 3, 11), 9, nonlinearity="relu")
    yield _recurrent("rnn", "relu T20 B8 64->64", (20, 8, 64), 64, nonlinearity="relu")
    for kind in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"):
        yield _cell(kind, "B1 5->7", 1, 5, 7)
        yield _cell(kind, "B32 64->64", 32, 64, 64)


# ------------------------------------------------------------------------------------ attention


def _sdpa(
    name: str,
    query: tuple[int, int, int, int],
    keys: int | None = None,
    *,
    kv_heads: int | None = None,
    value_width: int | None = None,
    mask: str | None = None,
    layout: str = "contiguous",
    **options,
) -> Case:
    batch, heads, queries, width = query
    keys, kv_heads = keys or queries, kv_heads or heads
    if kv_heads != heads:
        options["enable_gqa"] = True

    def make(generator: torch.Generator) -> Named:
        draw = partial(_normal, generator)
        inputs = {
            "query": _laid_out(draw(*query), layout),
            "key": _laid_out(draw(batch, kv_heads, keys, width), layout),
            "value": _laid_out(draw(batch, kv_heads, keys, value_width or width), layout),
        }
        if mask == "float":
            inputs["mask"] = draw(batch, 1, queries, keys)
        elif mask == "bool":
            inputs["mask"] = draw(batch, heads, queries, keys) > 0
            inputs["mask"][..., 0] = True
        elif mask == "padding":
            inputs["mask"] = (torch.arange(keys) < keys // 2 + 1).expand(batch, 1, 1, keys)
        elif mask == "empty rows":
            inputs["mask"] = draw(queries, keys) > 0
            inputs["mask"][::3] = False
        return inputs

    def arguments(x: Named) -> tuple:
        return x["query"], x["key"], x["value"], x.get("mask")

    return Case(
        "attention",
        "sdpa",
        f"{name} {layout}",
        make,
        lambda x, backend: functional.scaled_dot_product_attention(
            *arguments(x), **options, backend=backend
        ),
        lambda x: F.scaled_dot_product_attention(*arguments(x), **options),
        constants=("mask",),
    )


def attention_cases() -> Iterator[Case]:
    for layout in ("contiguous", "transposed", "sliced"):
        yield _sdpa("2x3x37x16", (2, 3, 37, 16), layout=layout)
        yield _sdpa("causal 1x2x70x32", (1, 2, 70, 32), layout=layout, is_causal=True)
    yield _sdpa("1x2x130x64 of 200 keys", (1, 2, 130, 64), 200)
    yield _sdpa("causal 1x2x20x24 of 45 keys", (1, 2, 20, 24), 45, is_causal=True)
    yield _sdpa("causal 1x2x45x24 of 20 keys", (1, 2, 45, 24), 20, is_causal=True)
    yield _sdpa("scale 1x2x17x20", (1, 2, 17, 20), scale=0.3)
    yield _sdpa("narrow values 1x2x19x24->11", (1, 2, 19, 24), value_width=11)
    yield _sdpa("GQA 8/2 heads 2x8x21x16", (2, 8, 21, 16), kv_heads=2)
    yield _sdpa("decode 2x8/2x1x64 of 77 keys", (2, 8, 1, 64), 77, kv_heads=2)
    for mask in ("float", "bool", "padding", "empty rows"):
        yield _sdpa(f"{mask} mask 2x3x18x16 of 29 keys", (2, 3, 18, 16), 29, mask=mask)
    yield _sdpa_options("window, softcap, ALiBi, sinks", window=(9, 4), softcap=2.0)
    yield _sdpa_options("causal window, softcap, ALiBi, sinks", window=(6, 0), softcap=2.0)
    yield _sdpa_options("gradient of a mask, sinks, ALiBi", mask=True)
    for average in (False, True):
        yield _with_weights("2x4/2x33x24 of 45 keys", average)
        yield _with_weights("bool mask 1x3x70x16 of 300 keys", average, masked=True)
    yield _varlen("packed sequences of 5, 1, 40 and 17", (5, 1, 40, 17))


def _sdpa_options(name: str, mask: bool = False, **options) -> Case:
    def make(generator: torch.Generator) -> Named:
        draw = partial(_normal, generator)
        inputs = {
            "query": draw(2, 4, 33, 24),
            "key": draw(2, 2, 45, 24),
            "value": draw(2, 2, 45, 16),
            "alibi_slopes": draw(4, scale=0.1),
            "sinks": draw(4),
        }
        if mask:
            inputs["attn_mask"] = draw(2, 1, 33, 45)
        return inputs

    return Case(
        "attention",
        "sdpa",
        f"{name} 2x4/2x33x24",
        make,
        lambda x, backend: functional.scaled_dot_product_attention(
            **x, **options, enable_gqa=True, backend=backend
        ),
        lambda x: attend(**x, **options),
    )


def _with_weights(name: str, average: bool, masked: bool = False) -> Case:
    batch, heads, shared, queries, keys, width = (
        (1, 3, 3, 70, 300, 16) if masked else (2, 4, 2, 33, 45, 24)
    )

    def make(generator: torch.Generator) -> Named:
        draw = partial(_normal, generator)
        inputs = {
            "query": draw(batch, heads, queries, width),
            "key": draw(batch, shared, keys, width),
            "value": draw(batch, shared, keys, width),
        }
        if masked:
            inputs["attn_mask"] = torch.ones(queries, keys, dtype=torch.bool).tril(40)
        return inputs

    def exact(x: Named) -> tuple[Tensor, Tensor]:
        output, weights = attend(**x, return_weights=True)
        return output, weights.mean(1) if average else weights

    return Case(
        "attention",
        "weights",
        f"{name}{', their mean' if average else ''}",
        make,
        lambda x, backend: functional.attention_with_weights(
            **x, enable_gqa=True, average=average, backend=backend
        ),
        exact,
        constants=("attn_mask",),
    )


def _varlen(name: str, lengths: tuple[int, ...]) -> Case:
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()

    def make(generator: torch.Generator) -> Named:
        draw = partial(_normal, generator)
        return {key: draw(sum(lengths), 3, 16) for key in ("query", "key", "value")}

    def one_by_one(x: Named) -> torch.Tensor:
        parts = [[t.transpose(0, 1)[None] for t in x[key].split(lengths)] for key in x]
        outputs = [attend(*tensors, is_causal=True) for tensors in zip(*parts, strict=True)]
        return torch.cat([output[0].transpose(0, 1) for output in outputs])

    return Case(
        "attention",
        "varlen",
        name,
        make,
        lambda x, backend: functional.varlen_attention(
            x["query"], x["key"], x["value"], offsets, is_causal=True, backend=backend
        ),
        one_by_one,
    )
