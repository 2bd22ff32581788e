"""Which backend ``"auto"`` chooses for a layer on its device and in its dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fmkernels._dispatch import Decision, decision_count, decisions_since, use_backend
from fmkernels._replace import hub, hub_layers
from fmkernels._replace.fused import FusedConv2d
from fmkernels._replace.measure import in_evaluation


def decisions_of(layer: nn.Module) -> list[Decision]:
    """What was decided while ``layer`` ran once on the smallest input that it accepts."""
    inputs = _smallest_inputs(layer)
    before = decision_count()
    norm = layer.norm if isinstance(layer, FusedConv2d) else None
    observed = [layer] if norm is None else [layer, norm]
    with in_evaluation(*observed), torch.no_grad(), use_backend("auto"):
        if getattr(layer, "residual_sum", None) is not None:
            inputs = (*inputs, torch.zeros_like(layer.forward(*inputs)))
            before = decision_count()
        # Not __call__: hooks are for the user's own data.
        layer.forward(*inputs)
    return decisions_since(before)


def attention_decisions_of(module: nn.Module) -> list[Decision]:
    """The same for attention that ``module`` looks up by name."""
    parameter = next(module.parameters())
    token = torch.zeros(1, 1, 1, 8, dtype=parameter.dtype, device=parameter.device)
    before = decision_count()
    with torch.no_grad(), use_backend("auto"):
        hub.attention_forward(module, token, token, token, None)
    return decisions_since(before)


def _smallest_inputs(layer: nn.Module) -> tuple[Any, ...]:
    def zeros(*shape: int) -> Tensor:
        # A norm need not have parameters.
        parameter = next(layer.parameters(), torch.empty(0))
        return torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)

    if isinstance(layer, nn.modules.conv._ConvNd):
        # Two images, as a batch norm without running statistics refuses a single value.
        return (zeros(2, layer.in_channels, *_smallest_image(layer)),)
    if isinstance(layer, nn.Linear):
        return (zeros(1, layer.in_features),)
    if isinstance(layer, nn.RNNBase):
        return (zeros(1, 1, layer.input_size),)
    if isinstance(layer, nn.RNNCellBase):
        return (zeros(1, layer.input_size),)
    if isinstance(layer, nn.MultiheadAttention):
        widths = (layer.embed_dim, layer.kdim, layer.vdim)
        return tuple(zeros(1, 1, width) for width in widths) + (None, False)
    if isinstance(layer, nn.TransformerEncoderLayer):
        return (zeros(1, 1, layer.linear1.in_features),)
    if isinstance(layer, nn.TransformerDecoderLayer):
        token = zeros(1, 1, layer.linear1.in_features)
        return token, token
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return (zeros(1, *layer.normalized_shape),)
    if isinstance(layer, hub_layers.Conv1D | hub_layers.RMSNorm | hub_layers.GatedMLP):
        return (zeros(1, hub.width_of(layer)),)
    raise TypeError(f"no example input is known for a {type(layer).__name__}")


def _smallest_image(layer: nn.modules.conv._ConvNd) -> list[int]:
    sizes = []
    pool = getattr(layer, "pool", None)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        window = 1 if pool is None else pool[1][axis]
        size = dilation * (kernel - 1) + 1 + stride * (window - 1)
        # Reflecting and wrapping need more than the padding itself.
        padding = size if isinstance(layer.padding, str) else layer.padding[axis]
        sizes.append(max(size, padding + 1))
    return sizes
