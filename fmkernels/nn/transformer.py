"""Transformer layers: torch.nn's, with fused attention and feed-forward.

torch's own layers switch in evaluation to a "fast path" that reads the parameters of their
children and calls one internal op. These layers never do: their forward is the same in training
and evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from fmkernels.nn._frozen import adopt, children_of
from fmkernels.nn._fuse import (
    ActivationFunction,
    fused_feed_forward,
    fused_sum_norm,
    is_hooked,
    is_inactive,
    shared_linear,
    shared_norm,
)
from fmkernels.nn.attention import MultiheadAttention, forward_nested

# A sublayer: called with the residual that it is to add itself, or None.
Sublayer = Callable[[Tensor | None], Tensor]


def _residual(sublayer: Sublayer, residual: Tensor, dropout: nn.Module) -> Tensor:
    """``residual + dropout(sublayer)``."""
    if is_inactive(dropout):
        return sublayer(residual)
    return residual + dropout(sublayer(None))


def _residual_norm(
    sublayer: Sublayer, residual: Tensor, dropout: nn.Module, norm: nn.Module
) -> tuple[Tensor, Tensor]:
    """``norm(s)`` and ``s = residual + dropout(sublayer)``.

    Without dropout the sublayer's last product adds the residual; with it the norm does.
    """
    if is_inactive(dropout):
        total = sublayer(residual)
        return norm(total), total
    return fused_sum_norm(sublayer(None), residual, dropout, norm)


def _attention(
    attention: nn.Module,
    query: Tensor,
    memory: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> Sublayer:
    """``attention(query, memory, memory)``."""

    def sublayer(residual: Tensor | None) -> Tensor:
        options = {
            "attn_mask": attn_mask,
            "key_padding_mask": key_padding_mask,
            "need_weights": False,
            "is_causal": is_causal,
        }
        if isinstance(attention, MultiheadAttention):
            return attention(query, memory, memory, residual=residual, **options)[0]
        output = attention(query, memory, memory, **options)[0]
        return output if residual is None else residual + output

    return sublayer


def _share_children(layer: nn.Module, module: nn.Module, backend: str | None) -> None:
    """Give ``layer`` the children of ``module``, with this package's in the place of torch's."""
    for name, child in module._modules.items():
        if type(child) is nn.MultiheadAttention and not is_hooked(child):
            child = MultiheadAttention.from_torch(child, backend=backend)
        if child is not None:
            child = shared_norm(shared_linear(child, backend), backend)
        layer._modules[name] = child
    adopt(layer, module)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """:class:`torch.nn.TransformerEncoderLayer`: same constructor, state_dict and results.

    ``x + attention(norm(x))`` then ``x + linear2(activation(linear1(norm(x))))`` with
    ``norm_first``, and with the norms after the sums otherwise. Activation and the dropout after
    it run in linear1's kernel, each sum in the kernel of the projection before it or, where
    dropout acts in between, dropout and sum in the norm's.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype: as in torch.nn.TransformerEncoderLayer. Of the
            activations relu, gelu, silu, sigmoid and tanh (functions or modules) are fused.
        backend: handed to the attention and the linear layers.

    Raises:
        ValueError: unknown backend.
        UnsupportedError: from forward, when the explicit backend cannot serve the call.
    """

    _PARTS = ("self_attn", "norm1", "norm2", "dropout1", "dropout2")

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
        self_attn, norm1, norm2, dropout1, dropout2 = children_of(self, self._PARTS)
        if self.norm_first:
            normed = norm1(src)
            attend = _attention(self_attn, normed, normed, *masks)
            normed, x = _residual_norm(attend, src, dropout1, norm2)
            return _residual(self._feed_forward(normed), x, dropout2)
        attend = _attention(self_attn, src, src, *masks)
        x, _ = _residual_norm(attend, src, dropout1, norm1)
        return _residual_norm(self._feed_forward(x), x, dropout2, norm2)[0]

    def _feed_forward(self, input: Tensor) -> Sublayer:
        linear1, dropout, linear2 = children_of(self, ("linear1", "dropout", "linear2"))
        return lambda residual: fused_feed_forward(
            input, linear1, self.activation, dropout, linear2, residual
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

    _PARTS = (
        *("self_attn", "multihead_attn", "norm1", "norm2", "norm3"),
        *("dropout1", "dropout2", "dropout3"),
    )

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
        self_attn, multihead_attn, *others = children_of(self, self._PARTS)
        norm1, norm2, norm3, dropout1, dropout2, dropout3 = others
        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        other = (memory_mask, memory_key_padding_mask, memory_is_causal)
        if self.norm_first:
            normed = norm1(tgt)
            attend = _attention(self_attn, normed, normed, *own)
            normed, x = _residual_norm(attend, tgt, dropout1, norm2)
            attend = _attention(multihead_attn, normed, memory, *other)
            normed, x = _residual_norm(attend, x, dropout2, norm3)
            return _residual(self._feed_forward(normed), x, dropout3)
        attend = _attention(self_attn, tgt, tgt, *own)
        x, _ = _residual_norm(attend, tgt, dropout1, norm1)
        attend = _attention(multihead_attn, x, memory, *other)
        x, _ = _residual_norm(attend, x, dropout2, norm2)
        return _residual_norm(self._feed_forward(x), x, dropout3, norm3)[0]

    def _feed_forward(self, input: Tensor) -> Sublayer:
        linear1, dropout, linear2 = children_of(self, ("linear1", "dropout", "linear2"))
        return lambda residual: fused_feed_forward(
            input, linear1, self.activation, dropout, linear2, residual
        )
