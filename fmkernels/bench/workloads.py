"""What is measured: layers and models in PyTorch's own words, with inputs, as data.

A workload is built from ``torch.nn`` alone; the fmkernels candidate is made from a copy of it by
``fmkernels.replace``, so the benchmarks measure what a user gets. Floating-point operations are
counted by PyTorch's own counter on the meta device (an FMA is two), bytes are the least memory
traffic: every input, parameter, buffer and output once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fmkernels
from fmkernels import functional, models
from fmkernels import nn as fnn
from fmkernels.bench import cnn_stacks

FAMILIES = ("conv", "linear", "rnn", "attention", "models")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
MODES = ("inference", "training")

Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """One thing to time.

    Attributes:
        name: unique, and the row's label in reports.
        family: one of :data:`FAMILIES`.
        build: returns the fp32 torch module and its input tensors; called under a fixed seed.
        dtypes: names from :data:`DTYPES` it is run in.
        modes: "inference", "training" or both.
        layouts: memory formats a user would choose between; eager is timed in each of them.
        input_gradient: whether training asks for gradients of the floating-point inputs (a layer
            inside a network does, a whole model and a first layer do not).
        flops_share: the part of the counted operations that has to be done (causal masks: a half).
        backward_cost: operations of the backward pass as a multiple of the forward's.
        corners: whether it has ReLUs or max-pooling, see :func:`fmkernels.bench.numerics.check`.
        quick: whether ``--quick`` keeps it.
        substitute: how the fmkernels version is made from a copy of the module; None for
            ``fmkernels.replace``.
    """

    name: str
    family: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    modes: tuple[str, ...] = MODES
    layouts: tuple[str, ...] = ("contiguous",)
    input_gradient: bool = True
    flops_share: float = 1.0
    backward_cost: float = 2.0
    corners: bool = False
    quick: bool = False
    substitute: Callable[[nn.Module], nn.Module] | None = None

    def make(self, dtype: str, seed: int = 0) -> tuple[nn.Module, Inputs]:
        """The module in eval mode and its inputs, in ``dtype``; a seed fixes the values."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module, inputs = self.build()
        to = DTYPES[dtype]
        return module.to(to).eval(), tuple(cast(tensor, to) for tensor in inputs)

    def cost(self, dtype: str, mode: str = "inference") -> Cost:
        """Operations and bytes of one call in ``mode``."""
        module, inputs = self.make("fp32")
        module, meta = module.to("meta"), tuple(tensor.to("meta") for tensor in inputs)
        # With gradients on: fused inference-only operations are opaque to the counter.
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            outputs = module(*meta)
        size = DTYPES[dtype].itemsize
        held = [*module.parameters(), *module.buffers(), *meta, *tensors_in(outputs)]
        nbytes = sum(
            tensor.numel() * (size if tensor.is_floating_point() else tensor.itemsize)
            for tensor in held
        )
        flops = int(counter.get_total_flops() * self.flops_share)
        if mode == "training":
            # Backward reads all of that again and writes a gradient for most of it.
            return Cost(int(flops * (1 + self.backward_cost)), 3 * nbytes)
        return Cost(flops, nbytes)


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and the least bytes moved by one call."""

    flops: int
    bytes: int


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` in ``dtype`` if it is floating point, else as it is."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


class Attention(nn.Module):
    """Scaled-dot-product attention as a module: a call, not a layer, so ``attend`` is swapped."""

    def __init__(self, attend: Callable[..., torch.Tensor], **options: Any) -> None:
        super().__init__()
        self.attend = attend
        self.options = options

    def forward(self, query, key, value, mask=None):
        return self.attend(query, key, value, attn_mask=mask, **self.options)


def _with_our_attention(module: Attention) -> Attention:
    return Attention(functional.scaled_dot_product_attention, **module.options)


def _settled(module: nn.Module) -> nn.Module:
    """Gives batch norms statistics and weights that differ from "do nothing"."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.normal_(child.running_mean, std=0.2)
            nn.init.uniform_(child.running_var, 0.5, 1.5)
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.bias, std=0.2)
    return module


def _conv(
    batch: int, channels: int, size: int, out: int, kernel: int = 3, *, block=False, **options
) -> tuple[nn.Module, Inputs]:
    # A bias would do nothing before a batch norm, and have a gradient of pure rounding.
    options = {"padding": kernel // 2, "bias": not block, **options}
    conv = nn.Conv2d(channels, out, kernel, **options)
    after = [nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)] if block else []
    return _settled(nn.Sequential(conv, *after)), (torch.randn(batch, channels, size, size),)


def _depthwise(
    batch: int, channels: int, size: int, stride: int, *, norm: bool
) -> tuple[nn.Module, Inputs]:
    options = {"stride": stride, "groups": channels}
    layers = cnn_stacks.conv_norm(channels, channels, 3, act=nn.ReLU6, **options)
    return _settled(nn.Sequential(*layers[: 3 if norm else 1])), (
        torch.randn(batch, channels, size, size),
    )


def _stem(batch: int, size: int, out: int, kernel: int, *, pool: bool) -> tuple[nn.Module, Inputs]:
    layers = cnn_stacks.conv_norm(3, out, kernel, stride=2)
    if pool:
        layers.append(nn.MaxPool2d(3, 2, padding=1))
    return _settled(nn.Sequential(*layers)), (torch.randn(batch, 3, size, size),)


def _on_image(build: Callable[[], nn.Module], *size: int) -> tuple[nn.Module, Inputs]:
    return _settled(build()), (torch.randn(size),)


def _layer(kind: type, shape: tuple[int, ...], *arguments: Any, **options: Any):
    return kind(shape[1], *arguments, **options), (torch.randn(shape),)


def _linear(rows: int, out: int, features: int) -> tuple[nn.Module, Inputs]:
    return nn.Linear(features, out), (torch.randn(rows, features),)


class _TwoLSTMs(nn.Module):
    """Two LSTM layers of different width, as in the recurrent reference architecture."""

    def __init__(self, features: int, first: int, second: int) -> None:
        super().__init__()
        self.first = nn.LSTM(features, first)
        self.second = nn.LSTM(first, second)

    def forward(self, sequence):
        return self.second(self.first(sequence)[0])[0]


def _two_lstms() -> tuple[nn.Module, Inputs]:
    return _TwoLSTMs(64, 128, 64), (torch.randn(100, 32, 64),)


class Step(nn.Module):
    """A cell with its state, h or h and c, as tensors beside the input: without one, a compiler
    leaves out the half of the products that is of zeros."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, input, *state):
        return self.cell(input, state if len(state) == 2 else state[0])


def _cell(kind: str, batch: int, hidden: int) -> tuple[nn.Module, Inputs]:
    state = [torch.randn(batch, hidden) for _ in range(2 if kind == "LSTMCell" else 1)]
    return Step(getattr(nn, kind)(hidden, hidden)), (torch.randn(batch, hidden), *state)


def _recurrent(
    kind: str, time: int, batch: int, hidden: int, **options
) -> tuple[nn.Module, Inputs]:
    return getattr(nn, kind)(hidden, hidden, **options), (torch.randn(time, batch, hidden),)


def _variant(time: int, batch: int, hidden: int, **options) -> tuple[nn.Module, Inputs]:
    # torch has no such layer: the same equations in plain PyTorch stand for it.
    layer = fnn.LSTM(hidden, hidden, backend="reference", **options)
    return layer, (torch.randn(time, batch, hidden),)


def _on_the_best_backend(module: nn.Module) -> nn.Module:
    module.backend = None
    return module


def _sdpa(
    batch: int,
    heads: int,
    queries: int,
    width: int,
    *,
    keys: int | None = None,
    kv_heads: int | None = None,
    padded: bool = False,
    **options,
) -> tuple[nn.Module, Inputs]:
    keys, kv_heads = keys or queries, kv_heads or heads
    query = torch.randn(batch, heads, queries, width)
    key, value = (torch.randn(batch, kv_heads, keys, width) for _ in range(2))
    if kv_heads != heads:
        options["enable_gqa"] = True
    module = Attention(nn.functional.scaled_dot_product_attention, **options)
    if not padded:
        return module, (query, key, value)
    # Each sequence of the batch ends somewhere in its second half.
    lengths = torch.linspace(keys // 2, keys, batch).long()
    mask = torch.arange(keys) < lengths[:, None]
    return module, (query, key, value, mask[:, None, None, :])


class Windowed(Attention):
    """Causal attention to the last ``width`` keys: in PyTorch, a mask."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__(nn.functional.scaled_dot_product_attention)
        self.width = width
        position = torch.arange(length)
        distance = position[:, None] - position
        self.register_buffer("mask", (distance >= 0) & (distance < width))

    def forward(self, query, key, value):
        return self.attend(query, key, value, attn_mask=self.mask)


def _windowed(
    batch: int, heads: int, length: int, width: int, window: int
) -> tuple[nn.Module, Inputs]:
    tensors = tuple(torch.randn(batch, heads, length, width) for _ in range(3))
    return Windowed(length, window), tensors


def _with_our_window(module: Windowed) -> Attention:
    window = (module.width - 1, 0)
    return Attention(functional.scaled_dot_product_attention, window=window)


class SelfAttention(nn.Module):
    """A layer as most callers use it: with the weights, averaged over heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def _self_attention(batch: int, length: int, width: int, heads: int) -> tuple[nn.Module, Inputs]:
    return SelfAttention(width, heads), (torch.randn(batch, length, width),)


def _encoder_layer(batch: int, length: int, width: int) -> tuple[nn.Module, Inputs]:
    layer = nn.TransformerEncoderLayer(
        width, width // 64, 4 * width, dropout=0.0, batch_first=True
    )
    return layer, (torch.randn(batch, length, width),)


def _cnn(variant: str, batch: int) -> tuple[nn.Module, Inputs]:
    return models.CNN(variant), (torch.randn(batch, 3, 32, 32),)


def _rnn(batch: int, time: int) -> tuple[nn.Module, Inputs]:
    return models.RNN(64), (torch.randn(batch, time, 64),)


def _transformer(batch: int, length: int) -> tuple[nn.Module, Inputs]:
    # Without dropout, so that training steps can be compared number by number.
    transformer = models.Transformer(num_layers=2, dropout=0.0)
    return transformer, (torch.randn(batch, length, 512), torch.randn(batch, length, 512))


_BOTH_LAYOUTS = ("contiguous", "channels_last")
conv = partial(Workload, family="conv", layouts=_BOTH_LAYOUTS)
block = partial(conv, corners=True)
linear = partial(Workload, family="linear")
rnn = partial(Workload, family="rnn")
variant = partial(rnn, substitute=_on_the_best_backend)
attention = partial(Workload, family="attention")
sdpa = partial(attention, backward_cost=2.5, substitute=_with_our_attention)
model = partial(Workload, family="models", input_gradient=False, corners=True)
cnn = partial(model, layouts=_BOTH_LAYOUTS)

# The names state batch x channels x height x width (-> out channels), time T, batch B, hidden H,
# batch x heads x queries x width.
WORKLOADS: tuple[Workload, ...] = (
    block(
        "conv-bn-relu-pool 32x64x56x56->64",
        build=partial(_conv, 32, 64, 56, 64, block=True),
        quick=True,
    ),
    block(
        "conv-bn-relu-pool 32x3x32x32->64",
        build=partial(_conv, 32, 3, 32, 64, block=True),
        input_gradient=False,
        backward_cost=1.0,
    ),
    conv("conv 3x3 8x128x28x28->128", build=partial(_conv, 8, 128, 28, 128), quick=True),
    conv("conv 3x3 stride 2 8x64x56x56->128", build=partial(_conv, 8, 64, 56, 128, stride=2)),
    conv("conv 1x1 8x256x28x28->256", build=partial(_conv, 8, 256, 28, 256, 1)),
    conv("conv depthwise 8x128x56x56", build=partial(_conv, 8, 128, 56, 128, groups=128)),
    *(
        conv(
            f"conv 3x3 {batch}x{channels}x{size}x{size}->{channels}",
            build=partial(_conv, batch, channels, size, channels),
        )
        for batch in (1, 8, 32)
        for channels, size in ((64, 56), (128, 28), (256, 14))
        if (batch, channels) != (8, 128)
    ),
    block(
        "conv-bn-relu-pool 32x128x28x28->128", build=partial(_conv, 32, 128, 28, 128, block=True)
    ),
    conv("conv 1x1 8x64x56x56->256", build=partial(_conv, 8, 64, 56, 256, 1)),
    conv("conv 1x1 8x512x14x14->512", build=partial(_conv, 8, 512, 14, 512, 1)),
    conv("conv 1x1 stride 2 8x256x56x56->512", build=partial(_conv, 8, 256, 56, 512, 1, stride=2)),
    conv("conv 3x3 stride 2 8x128x28x28->256", build=partial(_conv, 8, 128, 28, 256, stride=2)),
    block(
        "first 3x3 stride 2 bn relu 8x3x224x224->32",
        build=partial(_stem, 8, 224, 32, 3, pool=False),
        input_gradient=False,
        backward_cost=1.0,
    ),
    block(
        "first 7x7 stride 2 bn relu pool 8x3x224x224->64",
        build=partial(_stem, 8, 224, 64, 7, pool=True),
        input_gradient=False,
        backward_cost=1.0,
    ),
    conv(
        "conv depthwise stride 2 8x128x56x56", build=partial(_depthwise, 8, 128, 56, 2, norm=False)
    ),
    *(
        block(
            f"depthwise-bn-relu6 stride {stride} 8x128x56x56",
            build=partial(_depthwise, 8, 128, 56, stride, norm=True),
        )
        for stride in (1, 2)
    ),
    *(
        block(
            f"inverted residual stride {stride} 8x32x28x28->32",
            build=partial(
                _on_image, partial(cnn_stacks.InvertedResidual, 32, 32, stride), 8, 32, 28, 28
            ),
        )
        for stride in (1, 2)
    ),
    conv("conv 3x3 of 32 groups 8x128x56x56", build=partial(_conv, 8, 128, 56, 128, groups=32)),
    *(
        block(
            f"{name} stack batch {batch}",
            build=partial(_on_image, network, batch, 3, 224, 224),
            modes=("inference",),
        )
        for name, network in (
            ("ResNet-18", cnn_stacks.resnet18),
            ("MobileNetV2", cnn_stacks.mobilenet_v2),
        )
        for batch in (1, 8)
    ),
    Workload(
        "conv1d 10 taps stride 5 8x64x8000->64",
        "conv",
        partial(_layer, nn.Conv1d, (8, 64, 8000), 64, 10, 5),
    ),
    Workload(
        "conv1d depthwise causal 8x256x2048",
        "conv",
        partial(_layer, nn.Conv1d, (8, 256, 2048), 256, 4, padding=3, groups=256),
    ),
    Workload(
        "conv3d 3x3x3 2x32x16x28x28->32",
        "conv",
        partial(_layer, nn.Conv3d, (2, 32, 16, 28, 28), 32, 3, padding=1),
    ),
    conv(
        "conv transposed 2x2 stride 2 8x128x28x28->64",
        build=partial(_layer, nn.ConvTranspose2d, (8, 128, 28, 28), 64, 2, 2),
    ),
    linear("linear 512x512x512", build=partial(_linear, 512, 512, 512), quick=True),
    linear("linear 256x256x256", build=partial(_linear, 256, 256, 256)),
    linear("linear 1024x1024x1024", build=partial(_linear, 1024, 1024, 1024)),
    linear("linear 2048x2048x2048", build=partial(_linear, 2048, 2048, 2048)),
    linear("linear 4096x4096x4096", build=partial(_linear, 4096, 4096, 4096)),
    linear("linear 64x4096x1024", build=partial(_linear, 64, 4096, 1024)),
    linear("linear 1x4096x4096", build=partial(_linear, 1, 4096, 4096)),
    *(
        rnn(
            f"lstm T100 B{batch} H{hidden}",
            build=partial(_recurrent, "LSTM", 100, batch, hidden),
            quick=(batch, hidden) == (64, 256),
        )
        for batch in (32, 64)
        for hidden in (128, 256, 512)
    ),
    *(
        rnn(
            f"lstm T50 B1 H{hidden}",
            build=partial(_recurrent, "LSTM", 50, 1, hidden),
            quick=hidden == 128,
        )
        for hidden in (64, 128, 512)
    ),
    rnn("lstm T50 B8 H256", build=partial(_recurrent, "LSTM", 50, 8, 256)),
    rnn("lstm 128 + lstm 64 T100 B32", build=_two_lstms),
    rnn(
        "lstm bidirectional 2 layers T50 B16 H128",
        build=partial(_recurrent, "LSTM", 50, 16, 128, num_layers=2, bidirectional=True),
    ),
    rnn("gru T100 B32 H256", build=partial(_recurrent, "GRU", 100, 32, 256)),
    rnn("rnn T100 B32 H256", build=partial(_recurrent, "RNN", 100, 32, 256)),
    *(
        rnn(f"{kind.lower()[:-4]} cell B{batch} H256", build=partial(_cell, kind, batch, 256))
        for kind in ("LSTMCell", "GRUCell")
        for batch in (1, 32)
    ),
    *(
        variant(f"lstm {name} T100 B32 H256", build=partial(_variant, 100, 32, 256, **options))
        for name, options in (
            ("relu", {"activation": "relu"}),
            ("layer norm", {"layer_norm": True}),
            ("peephole", {"peephole": True}),
        )
    ),
    sdpa("sdpa 4x8x512x64", build=partial(_sdpa, 4, 8, 512, 64), quick=True),
    *(
        sdpa(
            f"sdpa {'causal ' if causal else ''}{batch}x{heads}x{length}x{width}",
            build=partial(_sdpa, batch, heads, length, width, is_causal=causal),
            flops_share=0.5 if causal else 1.0,
        )
        for batch, heads, length, width in (
            (4, 12, 96, 64),
            (1, 12, 1024, 64),
            (1, 4, 2048, 64),
            (1, 2, 4096, 64),
            (4, 12, 96, 128),
            (2, 8, 512, 128),
            (1, 8, 1024, 128),
            (1, 2, 2048, 128),
            (1, 1, 4096, 128),
        )
        for causal in (False, True)
    ),
    sdpa("sdpa padding mask 4x8x512x64", build=partial(_sdpa, 4, 8, 512, 64, padded=True)),
    sdpa(
        "sdpa window 256 1x8x4096x64",
        build=partial(_windowed, 1, 8, 4096, 64, 256),
        # Eager computes every score; what has to be done is the band.
        flops_share=(256 * 4096 - 256 * 255 / 2) / 4096**2,
        substitute=_with_our_window,
    ),
    *(
        sdpa(
            f"sdpa decode 8x32/8x1x128 of {keys} keys",
            build=partial(_sdpa, 8, 32, 1, 128, keys=keys, kv_heads=8),
            modes=("inference",),
        )
        for keys in (2048, 4096, 8192)
    ),
    *(
        attention(
            f"multihead with weights {batch}x{length}x{width}, {heads} heads",
            build=partial(_self_attention, batch, length, width, heads),
            quick=length == 128,
        )
        for batch, length, width, heads in (
            (1, 16, 64, 4),
            (8, 128, 512, 8),
            (1, 512, 768, 12),
            (4, 1024, 512, 8),
        )
    ),
    attention(
        "encoder layer 8x128x512",
        build=partial(_encoder_layer, 8, 128, 512),
        corners=True,
        quick=True,
    ),
    attention("encoder layer 1x512x768", build=partial(_encoder_layer, 1, 512, 768), corners=True),
    cnn("CNN (64-128-512-10) batch 32", build=partial(_cnn, "large", 32), quick=True),
    cnn("CNN (64-128-512-10) batch 1", build=partial(_cnn, "large", 1), modes=("inference",)),
    cnn("CNN (32-64-64-64-10) batch 32", build=partial(_cnn, "small", 32)),
    cnn("CNN (32-64-64-64-10) batch 1", build=partial(_cnn, "small", 1), modes=("inference",)),
    model("RNN (128-64-64-10) T100 batch 32", build=partial(_rnn, 32, 100), quick=True),
    model(
        "Transformer (2 layers of 8x64) S128 batch 8",
        build=partial(_transformer, 8, 128),
        quick=True,
    ),
)


def select(
    families: tuple[str, ...] = ("all",), *, quick: bool = False, match: str = ""
) -> list[Workload]:
    """The workloads of ``families`` whose name contains ``match``.

    Args:
        families: names from :data:`FAMILIES`, or "all".
        quick: keep only those marked quick.
        match: a part of the name, case-insensitive.

    Raises:
        ValueError: an unknown family, or nothing is left.
    """
    unknown = set(families) - {*FAMILIES, "all"}
    if unknown:
        raise ValueError(
            f"family must be one of {', '.join(FAMILIES)} or all, got {sorted(unknown)}"
        )
    chosen = [
        workload
        for workload in WORKLOADS
        if ("all" in families or workload.family in families)
        and match.lower() in workload.name.lower()
        and (workload.quick or not quick)
    ]
    if not chosen:
        raise ValueError(f"no workload of {', '.join(families)} has {match!r} in its name")
    return chosen


def with_fmkernels(workload: Workload, module: nn.Module) -> nn.Module:
    """The fmkernels version of ``module``, which it may modify."""
    if workload.substitute is not None:
        return workload.substitute(module)
    report = fmkernels.replace(module)
    return report.model
