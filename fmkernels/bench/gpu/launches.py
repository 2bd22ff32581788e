"""Launches and bytes of a layer on a GPU, ours and PyTorch's, counted on meta tensors.

PyTorch's are the operators that eager execution dispatches, views and allocations left out; a CUDA
operator is at least one launch, so the count is a lower bound. Ours are the launches of the Triton
kernels, and the operators around them counted in the same way. Bytes are those of the operands and
results of each launch, each counted once, as if every launch read and wrote device memory.

The times are a MODEL, never a measurement: for each launch the larger of bytes over bandwidth and
its share of the FLOPs over the peak, on the H100's data sheet figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fmkernels.functional as FF
from fmkernels._dispatch import UnsupportedError
from fmkernels.ops._triton.launch import counted_launches

# NVIDIA H100 SXM: dense bfloat16 and HBM3.
PEAK_FLOPS = 989e12
BANDWIDTH = 3.35e12
LAUNCH_S = 3e-6  # assumed cost of a launch that the device has to wait for, in eager execution

_FREE = ("empty", "detach", "view", "alias", "expand", "permute", "transpose", "slice", "select")
_FREE += ("as_strided", "unsqueeze", "squeeze", "t", "_unsafe_view", "split", "new_empty", "zeros")
_FREE += (
    "empty_like",
    "ones_like",
    "empty_strided",
    "unbind",
    "chunk",
    "_reshape_alias",
    "promote_types",
)


@dataclass(frozen=True)
class Count:
    """Launches, bytes moved, and the modelled time in seconds, of a forward or backward."""

    launches: int
    bytes: int
    model_s: float


@dataclass(frozen=True)
class Row:
    """One layer; ``ours`` and ``theirs`` are (forward, backward). ``error``: not served."""

    layer: str
    theirs: tuple[Count, Count]
    ours: tuple[Count, Count] | None
    error: str = ""


@dataclass(frozen=True)
class Layer:
    """A layer as a call of ours and as the eager sequence that computes the same.

    Attributes:
        goal: most launches of the forward and of the backward that the project allows itself;
            None where nothing is promised.
    """

    name: str
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    theirs: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]
    channels_last: bool = False
    goal: tuple[int | None, int | None] = (None, None)


class _Operators(TorchDispatchMode):
    """Collects the bytes of every operator that computes something."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1] not in _FREE:
            tensors = {id(t): t for t in _tensors((args, kwargs or {}, result))}.values()
            self.bytes.append(sum(t.numel() * t.itemsize for t in tensors))
        return result


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _count(sizes: Sequence[int], flops: int) -> Count:
    # The FLOPs are one launch's or few launches': the roofline of their sum bounds from below.
    moved = sum(sizes)
    model = max(moved / BANDWIDTH, flops / PEAK_FLOPS) + len(sizes) * LAUNCH_S
    return Count(len(sizes), moved, model)


def _leaves(layer: Layer) -> list[Tensor]:
    leaves = []
    for shape in layer.shapes:
        leaf = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        if layer.channels_last and len(shape) == 4:
            leaf = leaf.contiguous(memory_format=torch.channels_last)
        leaves.append(leaf.requires_grad_())
    return leaves


def _empty_like(output: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in _tensors(output)]


def missed_goals(row: Row) -> list[str]:
    """The passes of a counted layer that take more launches than its goal."""
    if row.ours is None:
        return [f"{row.layer}: {row.error}"]
    (layer,) = (layer for layer in LAYERS if layer.name == row.layer)
    return [
        f"{row.layer}: {name} takes {ours.launches} launches, the goal is {goal}"
        for name, goal, ours in zip(("forward", "backward"), layer.goal, row.ours, strict=True)
        if goal is not None and ours.launches > goal
    ]


def count(layer: Layer) -> Row:
    """Count one layer, forward and backward with every gradient, in bfloat16 on an H100."""
    leaves = _leaves(layer)
    with FlopCounterMode(display=False) as forward_flops:
        output = layer.theirs(*leaves)
    grads = _empty_like(output)
    with FlopCounterMode(display=False) as backward_flops:
        torch.autograd.backward(output, grads)
    flops = forward_flops.get_total_flops(), backward_flops.get_total_flops()

    leaves = _leaves(layer)
    with _Operators() as forward:
        output = layer.theirs(*leaves)
    grads = _empty_like(output)
    with _Operators() as backward:
        torch.autograd.backward(output, grads)
    theirs = _count(forward.bytes, flops[0]), _count(backward.bytes, flops[1])

    leaves = _leaves(layer)
    try:
        with counted_launches("sm_90") as seen, _Operators() as forward:
            output = layer.ours(*leaves)
        grads = _empty_like(output)
        with counted_launches("sm_90") as seen_backward, _Operators() as backward:
            torch.autograd.backward(output, grads)
    except UnsupportedError as error:
        return Row(layer.name, theirs, None, str(error).splitlines()[-1].strip())
    ours = (
        _count([launch.bytes for launch in seen] + forward.bytes, flops[0]),
        _count([launch.bytes for launch in seen_backward] + backward.bytes, flops[1]),
    )
    return Row(layer.name, theirs, ours)


def _block(x, w, b):
    return F.max_pool2d(F.relu(F.conv2d(x, w, b, padding=1)), 2)


def _fused_block(x, w, b):
    options = {"activation": "relu", "pool": ("max", 2), "backend": "triton"}
    return FF.conv2d(x, w, b, padding=1, **options)


def _causal(x, w, b):
    return F.silu(F.conv1d(F.pad(x, (3, 0)), w, b, groups=w.shape[0]))


def _attention(q, k, v):
    # What scaled_dot_product_attention selects on a GPU; on meta tensors it selects plain math.
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]


def _lstm(x, w_ih, w_hh, b):
    return FF.lstm(x, None, [w_ih, w_hh, b, b], activation="relu", backend="triton")[0]


def _lstm_loop(x, w_ih, w_hh, b):
    """A variant as PyTorch's users write it: one matrix product per step, the gates around it."""
    h = c = x.new_zeros(x.shape[1], w_hh.shape[1])
    projected, outputs = F.linear(x, w_ih, b), []
    for step in projected.unbind(0):
        i, f, g, o = (step + F.linear(h, w_hh, b)).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.relu()
        h = o.sigmoid() * c.relu()
        outputs.append(h)
    return torch.stack(outputs)


def _lstm_cell(x, h, c, w_ih, w_hh, b):
    return FF.lstm_cell(x, (h, c), w_ih, w_hh, b, b, backend="triton")


def _eager_lstm_cell(x, h, c, w_ih, w_hh, b):
    """What torch.lstm_cell runs on a GPU: two matrix products and a fused elementwise kernel."""
    gates = F.linear(x, w_ih), F.linear(h, w_hh)
    return torch.ops.aten._thnn_fused_lstm_cell(*gates, c, b, b)[:2]


LAYERS = (
    Layer(
        "conv 3x3 + bias + relu + 2x2 max-pool, 32x64x56x56 -> 128",
        _fused_block,
        _block,
        ((32, 64, 56, 56), (128, 64, 3, 3), (128,)),
        channels_last=True,
        goal=(1, 3),
    ),
    Layer(
        "conv 3x3 + bias + gelu, 32x256x14x14 -> 256",
        lambda x, w, b: FF.conv2d(x, w, b, padding=1, activation="gelu", backend="triton"),
        lambda x, w, b: F.gelu(F.conv2d(x, w, b, padding=1)),
        ((32, 256, 14, 14), (256, 256, 3, 3), (256,)),
        channels_last=True,
        goal=(1, 3),
    ),
    Layer(
        "causal depthwise conv1d + bias + silu, 8x2048x4096",
        lambda x, w, b: FF.causal_conv1d(
            x, w, b, groups=2048, activation="silu", backend="triton"
        ),
        _causal,
        ((8, 2048, 4096), (2048, 1, 4), (2048,)),
        goal=(1, 3),
    ),
    Layer(
        "linear + bias + gelu, 4096x1024 -> 4096",
        lambda x, w, b: FF.linear(x, w, b, activation="gelu", backend="triton"),
        lambda x, w, b: F.gelu(F.linear(x, w, b)),
        ((4096, 1024), (4096, 1024), (4096,)),
    ),
    Layer(
        "feed-forward gelu + residual, 4096x1024, hidden 4096",
        lambda x, a, b, c, d: FF.feed_forward(
            x, a, b, c, d, activation="gelu", residual=x, backend="triton"
        ),
        lambda x, a, b, c, d: F.linear(F.gelu(F.linear(x, a, b)), c, d) + x,
        ((4096, 1024), (4096, 1024), (4096,), (1024, 4096), (1024,)),
        goal=(2, None),
    ),
    Layer(
        "feed-forward SwiGLU + residual, 4096x4096, hidden 11008",
        lambda x, g, u, d: FF.feed_forward(
            x, u, None, d, None, activation="silu", gate_weight=g, residual=x, backend="triton"
        ),
        lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d) + x,
        ((4096, 4096), (11008, 4096), (11008, 4096), (4096, 11008)),
        goal=(2, None),
    ),
    Layer(
        "residual + layer norm, 4096x1024",
        lambda x, r, w, b: FF.add_layer_norm(x, r, (1024,), w, b, backend="triton"),
        lambda x, r, w, b: F.layer_norm(x + r, (1024,), w, b),
        ((4096, 1024), (4096, 1024), (1024,), (1024,)),
    ),
    Layer(
        "LSTM with relu, 100 steps of 64, hidden 64, against a loop",
        _lstm,
        _lstm_loop,
        ((100, 64, 64), (256, 64), (256, 64), (256,)),
    ),
    Layer(
        "LSTM step (cell), 64 x 1024, hidden 1024",
        _lstm_cell,
        _eager_lstm_cell,
        ((64, 1024), (64, 1024), (64, 1024), (4096, 1024), (4096, 1024), (4096,)),
        goal=(1, None),
    ),
    Layer(
        "causal attention, 4x16x2048x128",
        lambda q, k, v: FF.scaled_dot_product_attention(q, k, v, is_causal=True, backend="triton"),
        _attention,
        ((4, 16, 2048, 128),) * 3,
        goal=(1, 3),
    ),
)
