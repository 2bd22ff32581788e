"""Transformer layers: torch.nn's, with fused attention and feed-forward.

torch's own layers switch in evaluation to a "fast path" that reads the parameters of their
children and calls one internal op. These layers never do: their forward is the same in training
and evaluation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from fmkernels import _checks as check
from fmkernels.nn._frozen import adopt
from fmkernels.nn._fuse import (
    ActivationFunction,
    activation_name,
    fused_linear,
    is_hooked,
    is_inactive,
    shared_linear,
)
from fmkernels.nn.attention import MultiheadAttention, forward_nested
from fmkernels.nn.linear import Linear
from fmkernels.ops import _activations


def _feed_forward(
    input: Tensor,
    linear1: nn.Module,
    activation: ActivationFunction,
    dropout: nn.Module,
    linear2: nn.Module,
    last_dropout: nn.Module,
    residual: Tensor | None,
) -> Tensor:
    """``residual + last_dropout(linear2(dropout(activation(linear1(input)))))``."""
    hidden = fused_linear(linear1, input, activation=activation)
    if not is_inactive(dropout):
        hidden = dropout(hidden)
    if is_inactive(last_dropout):
        return fused_linear(linear2, hidden, residual=residual)
    output = last_dropout(linear2(hidden))
    return output if residual is None else residual + output


def _attend(
    attention: nn.Module,
    dropout: nn.Module,
    query: Tensor,
    memory: Tensor,
    residual: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """``residual + dropout(attention(query, memory, memory))``."""
    options = {
        "attn_mask": attn_mask,
        "key_padding_mask": key_padding_mask,
        "need_weights": False,
        "is_causal": is_causal,
    }
    if isinstance(attention, MultiheadAttention) and is_inactive(dropout):
        return attention(query, memory, memory, residual=residual, **options)[0]
    return residual + dropout(attention(query, memory, memory, **options)[0])


def _share_children(layer: nn.Module, module: nn.Module, backend: str | None) -> None:
    """Give ``layer`` the children of ``module``, with this package's in the place of torch's."""
    for name, child in module._modules.items():
        if type(child) is nn.MultiheadAttention and not is_hooked(child):
            child = MultiheadAttention.from_torch(child, backend=backend)
        layer._modules[name] = None if child is None else shared_linear(child, backend)
    adopt(layer, module)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """:class:`torch.nn.TransformerEncoderLayer`: same constructor, state_dict and results.

    ``x + attention(norm(x))`` then ``x + linear2(activation(linear1(norm(x))))`` with
    ``norm_first``, and with the norms after the sums otherwise. The activation runs in linear1's
    kernel and each sum in the kernel of the projection before it, unless dropout acts in between.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype: as in torch.nn.TransformerEncoderLayer. Of the
            activations relu, gelu, silu, sigmoid and tanh (functions or modules) are fused.
        backend: handed to the attention and the linear layers.

    Raises:
        ValueError: unknown backend.
        UnsupportedError: from forward, when the explicit backend cannot serve the call.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | ActivationFunction = TF.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        _share_children(self, self, backend)

    @classmethod
    def from_torch(
        cls, module: nn.TransformerEncoderLayer, *, backend: str | None = None
    ) -> TransformerEncoderLayer:
        """A layer that shares ``module``'s Parameters and training flag; its hooks stay behind."""
        layer = cls(
            module.linear1.in_features,
            module.self_attn.num_heads,
            module.linear1.out_features,
            batch_first=module.self_attn.batch_first,
            norm_first=module.norm_first,
            device="meta",
            backend=backend,
        )
        layer.activation = module.activation
        _share_children(layer, module, backend)
        return layer

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """See :meth:`torch.nn.TransformerEncoderLayer.forward`."""
        if src.is_nested:
            if src_mask is not None or src_key_padding_mask is not None:
                raise ValueError("src_mask and src_key_padding_mask must be None for a nested src")
            return forward_nested(
                lambda padded, ignored: self(padded, src_key_padding_mask=ignored), src
            )
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            normed = self.norm1(src)
            x = _attend(self.self_attn, self.dropout1, normed, normed, src, *masks)
            return self._feed_forward(self.norm2(x), x)
        x = self.norm1(_attend(self.self_attn, self.dropout1, src, src, src, *masks))
        return self.norm2(self._feed_forward(x, x))

    def _feed_forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return _feed_forward(
            input,
            self.linear1,
            self.activation,
            self.dropout,
            self.linear2,
            self.dropout2,
            residual,
        )


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """:class:`torch.nn.TransformerDecoderLayer`: same constructor, state_dict and results.

    Self-attention, attention to the encoder's output and feed-forward, fused as in
    :class:`TransformerEncoderLayer`.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype: as in torch.nn.TransformerDecoderLayer.
        backend: handed to the attention and the linear layers.

    Raises:
        ValueError: unknown backend.
        UnsupportedError: from forward, when the explicit backend cannot serve the call.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | ActivationFunction = TF.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        _share_children(self, self, backend)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Not torch's, which after a copy puts relu in the place of an activation that is a module.
        nn.Module.__setstate__(self, state)

    @classmethod
    def from_torch(
        cls, module: nn.TransformerDecoderLayer, *, backend: str | None = None
    ) -> TransformerDecoderLayer:
        """A layer that shares ``module``'s Parameters and training flag; its hooks stay behind."""
        layer = cls(
            module.linear1.in_features,
            module.self_attn.num_heads,
            module.linear1.out_features,
            batch_first=module.self_attn.batch_first,
            norm_first=module.norm_first,
            device="meta",
            backend=backend,
        )
        layer.activation = module.activation
        _share_children(layer, module, backend)
        return layer

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """See :meth:`torch.nn.TransformerDecoderLayer.forward`."""
        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        other = (memory_mask, memory_key_padding_mask, memory_is_causal)
        x = tgt
        if self.norm_first:
            normed = self.norm1(x)
            x = _attend(self.self_attn, self.dropout1, normed, normed, x, *own)
            x = _attend(self.multihead_attn, self.dropout2, self.norm2(x), memory, x, *other)
            return self._feed_forward(self.norm3(x), x)
        x = self.norm1(_attend(self.self_attn, self.dropout1, x, x, x, *own))
        x = self.norm2(_attend(self.multihead_attn, self.dropout2, x, memory, x, *other))
        return self.norm3(self._feed_forward(x, x))

    def _feed_forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return _feed_forward(
            input,
            self.linear1,
            self.activation,
            self.dropout,
            self.linear2,
            self.dropout3,
            residual,
        )


class FeedForward(nn.Module):
    """``linear2(dropout(activation(linear1(x))))``: Vaswani et al. 2017, section 3.3.

    Args:
        d_model: features of input and output.
        dim_feedforward: features in between.
        activation: a name as in :func:`fmkernels.functional.linear`; it runs in linear1's kernel.
        dropout: probability of zeroing a feature in between, in training.
        bias, device, dtype: as in torch.nn.Linear.
        backend: as in :func:`fmkernels.functional.linear`.

    Shape:
        input and output ``(..., d_model)``.

    Raises:
        ValueError: unknown activation or backend.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int,
        activation: str = "relu",
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check.choice("activation", activation, _activations.NAMES)
        self.activation = activation
        self.linear1 = Linear(
            d_model, dim_feedforward, bias, device, dtype, activation=activation, backend=backend
        )
        self.dropout = nn.Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias, device, dtype, backend=backend)

    @classmethod
    def from_torch(cls, module: nn.Sequential, *, backend: str | None = None) -> FeedForward:
        """Share the Parameters of a ``Sequential(Linear, activation[, Dropout], Linear)``.

        Raises:
            ValueError: ``module`` is not of that form, or its activation cannot be fused.
        """
        children = list(module)
        dropouts = [child for child in children if type(child) is nn.Dropout]
        parts = [child for child in children if type(child) is not nn.Dropout]
        name = activation_name(parts[1]) if len(parts) == 3 else None
        fits = (
            name is not None
            and type(parts[0]) is type(parts[2]) is nn.Linear
            and len(dropouts) <= 1
            and (not dropouts or children[2] is dropouts[0])
        )
        if not fits:
            raise ValueError(
                "module must be Sequential(Linear, activation[, Dropout], Linear) with one of "
                f"relu, gelu and silu, got {module}"
            )
        first, last = parts[0], parts[2]
        layer = cls(
            first.in_features,
            first.out_features,
            name,
            dropouts[0].p if dropouts else 0.0,
            device="meta",
            backend=backend,
        )
        layer.linear1 = Linear.from_torch(first, activation=name, backend=backend)
        layer.linear2 = Linear.from_torch(last, backend=backend)
        return layer.train(module.training)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Apply the block; ``residual`` (..., d_model) is added to it, in linear2's kernel."""
        hidden = self.dropout(self.linear1(input))
        return fused_linear(self.linear2, hidden, residual=residual)
