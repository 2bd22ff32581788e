"""Multi-head attention: torch.nn's, with fused projections and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from fmkernels import _checks as check
from fmkernels._dispatch import check_backend_name
from fmkernels.functional.attention import (
    attention_with_weights,
    scaled_dot_product_attention,
)
from fmkernels.functional.linear import linear
from fmkernels.nn._frozen import Freezable, adopt, children_of, parameters_of
from fmkernels.nn._fuse import fused_linear, shared_linear
from fmkernels.nn.linear import Linear
from fmkernels.ops.linear.autograd import pack_linear_weight


def forward_nested(forward: Callable[[Tensor, Tensor], Tensor], nested: Tensor) -> Tensor:
    """``forward(padded, key_padding_mask)`` on a nested tensor ``(B, S*, E)``; nested again.

    torch.nn.TransformerEncoder hands nested tensors to its layers in evaluation, when it is given
    a padding mask.
    """
    lengths = [sequence.size(0) for sequence in nested.unbind()]
    padded = nested.to_padded_tensor(0.0)
    positions = torch.arange(padded.size(1), device=padded.device)
    ignored = positions >= torch.tensor(lengths, device=padded.device).unsqueeze(1)
    output = forward(padded, ignored)
    return torch.nested.as_nested_tensor(
        [sequence[:length] for sequence, length in zip(output, lengths, strict=True)]
    )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A torch.nn mask (True: ignore) as a term that is added to the scores."""
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return mask


def _check_mask_type(name: str, mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or not (mask.dtype is torch.bool or mask.is_floating_point()):
        raise TypeError(
            f"{name} must be a bool or floating-point tensor, got {check.describe(mask)}"
        )


class MultiheadAttention(Freezable, nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention`: same constructor, parameters, state_dict and results.

    Vaswani et al. 2017, section 3.2.2. Self-attention projects query, key and value in one
    product, and the attention kernel reads the heads from where that product left them. Where the
    weights are wanted (``need_weights=True``, torch's default), their mean over the heads is added
    up without holding those of single heads.

    A query that sees no key attends to nothing: its output before the output projection, and its
    weights, are 0 (torch: NaN with ``need_weights``, 0 without).

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first,
            device, dtype: as in torch.nn.MultiheadAttention.
        backend: as in :func:`fmkernels.functional.scaled_dot_product_attention`; the projections
            use it too.

    Raises:
        ValueError: unknown backend, or a torch.nn.MultiheadAttention argument out of range.
        UnsupportedError: from forward, when the explicit backend cannot serve the call.
    """

    _PACKED = (
        "_packed_in_proj",
        "_packed_q_proj",
        "_packed_kv_proj",
        "_packed_k_proj",
        "_packed_v_proj",
    )

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self.backend = None if backend is None else check_backend_name(backend)
        # Shares the parameters just made: one seed initialises this layer and torch's alike.
        self.out_proj = Linear.from_torch(self.out_proj, backend=backend)
        # A torch.nn.TransformerEncoderLayer around this layer would bypass its forward in
        # evaluation if this were true; forward looks at in_proj_weight instead.
        self._qkv_same_embed_dim = False
        self._init_frozen(self._PACKED)

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    @classmethod
    def from_torch(
        cls, module: nn.MultiheadAttention, *, backend: str | None = None
    ) -> MultiheadAttention:
        """A layer that shares ``module``'s Parameters and training flag; its hooks stay behind."""
        layer = cls(
            module.embed_dim,
            module.num_heads,
            module.dropout,
            module.in_proj_bias is not None,
            module.bias_k is not None,
            module.add_zero_attn,
            module.kdim,
            module.vdim,
            module.batch_first,
            device="meta",
            backend=backend,
        )
        layer.out_proj = shared_linear(module.out_proj, backend)
        adopt(layer, module)
        return layer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`torch.nn.MultiheadAttention.forward`.

        Args:
            query: ``(Sq, B, E)``, ``(B, Sq, E)`` with ``batch_first``, or ``(Sq, E)``.
            key: the same with Sk positions and ``kdim`` features; value: with ``vdim`` features.
            key_padding_mask: ``(B, Sk)`` or ``(Sk)``; bool (True: ignore) or float (added).
            attn_mask: ``(Sq, Sk)`` or ``(B * num_heads, Sq, Sk)``, likewise.
            is_causal: the hint that attn_mask is the causal mask, which must then be given.
            residual: shaped like the output and added to it, in the same kernel if possible.

        Returns:
            output, shaped like query; and None or the weights ``(B, Sq, Sk)``
            (``(B, num_heads, Sq, Sk)`` unless ``average_attn_weights``).
        """
        if query.is_nested:
            return self._forward_nested(query, key, value, key_padding_mask, attn_mask), None
        self_attention, shared = query is key and key is value, key is value
        batched = query.dim() == 3
        self._check_inputs(query, key, value)
        batch_dim, length_dim = (0, 1) if self.batch_first else (1, 0)
        if not batched:
            query, key, value = (t.unsqueeze(batch_dim) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(batch_dim)

        bias_k, bias_v = parameters_of(self, ("bias_k", "bias_v"))
        extra_keys = int(bias_k is not None) + int(self.add_zero_attn)
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with the is_causal hint")
        # Only where the mask is exactly what the kernel's causal flag means.
        causal = is_causal and key_padding_mask is None and not need_weights and extra_keys == 0
        mask = None
        if not causal and not (attn_mask is key_padding_mask is None):
            mask = self._merge_masks(
                attn_mask,
                key_padding_mask,
                query.size(batch_dim),
                query.size(length_dim),
                key.size(length_dim),
                extra_keys,
                query.dtype,
            )

        q, k, v = self._project(query, key, value, self_attention, shared)
        if extra_keys:
            k, v = self._append_keys(k, bias_k), self._append_keys(v, bias_v)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            average = bool(average_attn_weights)
            output, weights = attention_with_weights(
                q, k, v, mask, dropout_p, average=average, backend=self.backend
            )
        else:
            output = scaled_dot_product_attention(
                q, k, v, mask, dropout_p, causal, backend=self.backend
            )
        (out_proj,) = children_of(self, ("out_proj",))
        output = output.permute(0, 2, 1, 3) if self.batch_first else output.permute(2, 0, 1, 3)
        output = fused_linear(out_proj, output.flatten(2), residual=residual)
        if not batched:
            output = output.squeeze(batch_dim)
            weights = None if weights is None else weights.squeeze(0)
        return output, weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        check.tensor("query", query)
        check.rank("query", query, 2, 3)
        batch_dim = 0 if self.batch_first else 1
        operands = [("query", query, self.embed_dim)]
        if not (query is key is value and self.kdim == self.vdim == self.embed_dim):
            operands += [("key", key, self.kdim), ("value", value, self.vdim)]
        for name, operand, width in operands:
            check.tensor(name, operand)
            check.rank(name, operand, query.dim())
            if operand.size(-1) != width:
                raise ValueError(
                    f"{name} must have {width} features, got {check.describe(operand)}"
                )
            if query.dim() == 3 and operand.size(batch_dim) != query.size(batch_dim):
                raise ValueError(
                    f"{name} must have the query's batch of {query.size(batch_dim)}, "
                    f"got {check.describe(operand)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value must have the key's positions {tuple(key.shape[:-1])}, "
                f"got {check.describe(value)}"
            )

    def _merge_masks(
        self,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        batch: int,
        length: int,
        keys: int,
        extra_keys: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """The masks given, one at least, as one for the attention function: four-dimensional, True
        means take part."""
        masks = []
        if attn_mask is not None:
            _check_mask_type("attn_mask", attn_mask)
            check.rank("attn_mask", attn_mask, 2, 3)
            if attn_mask.dim() == 2:
                check.shape("attn_mask", attn_mask, (length, keys), "queries, keys")
                attn_mask = attn_mask[None, None]
            else:
                expected = (batch * self.num_heads, length, keys)
                check.shape("attn_mask", attn_mask, expected, "batch * num_heads, queries, keys")
                attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
            masks.append(attn_mask)
        if key_padding_mask is not None:
            _check_mask_type("key_padding_mask", key_padding_mask)
            check.shape("key_padding_mask", key_padding_mask, (batch, keys), "batch, keys")
            masks.append(key_padding_mask[:, None, None, :])
        if extra_keys:
            masks = [TF.pad(mask, (0, extra_keys)) for mask in masks]
        if all(mask.dtype is torch.bool for mask in masks):
            ignored = masks[0] if len(masks) == 1 else masks[0] | masks[1]
            return ~ignored
        terms = [_additive(mask, dtype) for mask in masks]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, self_attention: bool, shared: bool
    ) -> tuple[Tensor, ...]:
        """The three projections ``(B, heads, S, D)``; views into one product where inputs
        coincide."""
        width, backend = self.embed_dim, self.backend
        packed_all, packed_q, packed_kv, packed_k, packed_v = self._packed()
        weight, bias = parameters_of(self, ("in_proj_weight", "in_proj_bias"))
        if weight is not None and self_attention:
            qkv = linear(query, weight, bias, backend=backend, packed_weight=packed_all)
            return self._split_heads(qkv, 3)
        b_q = b_kv = b_k = b_v = None
        if bias is not None:
            b_q, b_kv = bias.split([width, 2 * width])
            b_k, b_v = b_kv.chunk(2)
        if weight is None:
            w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        else:
            w_q, w_kv = weight.split([width, 2 * width])
            w_k, w_v = w_kv.chunk(2)
        q = linear(query, w_q, b_q, backend=backend, packed_weight=packed_q)
        if weight is not None and shared:
            kv = linear(key, w_kv, b_kv, backend=backend, packed_weight=packed_kv)
            return *self._split_heads(q, 1), *self._split_heads(kv, 2)
        k = linear(key, w_k, b_k, backend=backend, packed_weight=packed_k)
        v = linear(value, w_v, b_v, backend=backend, packed_weight=packed_v)
        return tuple(self._split_heads(projected, 1)[0] for projected in (q, k, v))

    def _split_heads(self, projected: Tensor, count: int) -> tuple[Tensor, ...]:
        """``(B, heads, S, D)`` of each of ``count`` projections that lie side by side, views of
        the ``(B, S, count * E)`` or ``(S, B, count * E)`` tensor."""
        order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        heads = projected.unflatten(-1, (count, self.num_heads, self.head_dim)).unbind(2)
        return tuple([one.permute(order) for one in heads])

    def _append_keys(self, projected: Tensor, bias: Tensor | None) -> Tensor:
        """``projected`` with the learned position and the position of zeros, where asked for."""
        batch, heads, _, width = projected.shape
        parts = [projected]
        if bias is not None:
            bias = bias.to(projected.dtype).reshape(1, heads, 1, width)
            parts.append(bias.expand(batch, -1, -1, -1))
        if self.add_zero_attn:
            parts.append(projected.new_zeros(batch, heads, 1, width))
        return torch.cat(parts, dim=2)

    def forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> Tensor:
        if query is not key or key is not value or not self.batch_first:
            raise TypeError("query may be nested only in self-attention with batch_first")
        if key_padding_mask is not None or attn_mask is not None:
            raise ValueError("key_padding_mask and attn_mask must be None for a nested query")
        return forward_nested(
            lambda padded, ignored: self(padded, padded, padded, ignored, need_weights=False)[0],
            query,
        )

    def _packing_sources(self) -> list[Tensor]:
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [weight for weight in parameters_of(self, names) if weight is not None]

    def _compute_packing(self) -> list[Tensor | None]:
        weight = self.in_proj_weight
        if weight is None:
            q, k, v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            parts = [None, q, None, k, v]
        else:
            # Self-attention and attention to a memory; keys and values from two tensors are rare.
            parts = [weight, weight[: self.embed_dim], weight[self.embed_dim :], None, None]
        return [None if w is None else pack_linear_weight(w, self.backend) for w in parts]
