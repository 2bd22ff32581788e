"""The feed-forward block of a Transformer as a layer of its own, plain and gated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fmkernels import _checks as check
from fmkernels.functional.feed_forward import feed_forward
from fmkernels.nn._frozen import Freezable, children_of, parameters_of
from fmkernels.nn._fuse import activation_name, dropout_p, fused_feed_forward, is_hooked
from fmkernels.nn.linear import Linear
from fmkernels.ops import _activations
from fmkernels.ops.feed_forward.autograd import pack_feed_forward_weight


class FeedForward(Freezable):
    """``linear2(dropout(activation(linear1(x))))``: Vaswani et al. 2017, section 3.3.

    Gated: ``linear2(dropout(activation(gate(x)) * linear1(x)))``, Shazeer 2020; with ``"silu"``
    that is SwiGLU, with ``"gelu"`` GeGLU.

    Args:
        d_model: features of input and output.
        dim_feedforward: features in between.
        activation: a name as in :func:`fmkernels.functional.linear`.
        dropout: probability of zeroing a feature in between, in training.
        bias, device, dtype: as in torch.nn.Linear.
        gated: whether there is a ``gate``.
        backend: as in :func:`fmkernels.functional.feed_forward`.

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
        gated: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check.choice("activation", activation, _activations.NAMES)
        self.activation = activation
        kwargs = {"device": device, "dtype": dtype, "backend": backend}
        self.linear1 = Linear(d_model, dim_feedforward, bias, **kwargs)
        self.gate = Linear(d_model, dim_feedforward, bias, **kwargs) if gated else None
        self.dropout = nn.Dropout(dropout)
        self.linear2 = Linear(dim_feedforward, d_model, bias, **kwargs)
        self._init_parts()

    def _init_parts(self) -> None:
        if self.gate is not None:
            # Their weights are packed side by side, here.
            self.linear1._packs_alone = self.gate._packs_alone = False
        self._init_frozen()

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
        layer = cls.from_linears(first, last, name, backend=backend)
        layer.dropout.p = dropouts[0].p if dropouts else 0.0
        return layer.train(module.training)

    @classmethod
    def from_linears(
        cls,
        linear1: nn.Linear,
        linear2: nn.Linear,
        activation: str,
        gate: nn.Linear | None = None,
        *,
        backend: str | None = None,
    ) -> FeedForward:
        """A block without dropout that shares the Parameters of plain linear layers."""
        layer = cls(
            linear1.in_features,
            linear1.out_features,
            activation,
            device="meta",
            gated=gate is not None,
            backend=backend,
        )
        layer.linear1 = Linear.from_torch(linear1, backend=backend)
        layer.linear2 = Linear.from_torch(linear2, backend=backend)
        layer.gate = None if gate is None else Linear.from_torch(gate, backend=backend)
        layer._init_parts()
        return layer.train(linear1.training)

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Apply the block; ``residual`` (..., d_model) is added to it, in linear2's kernel."""
        linears = linear1, gate, linear2 = children_of(self, ("linear1", "gate", "linear2"))
        (dropout,) = children_of(self, ("dropout",))
        if gate is None:
            return fused_feed_forward(input, linear1, self.activation, dropout, linear2, residual)
        p = dropout_p(dropout)
        if p is None or any(type(part) is not Linear or is_hooked(part) for part in linears):
            hidden = _activations.apply(self.activation, gate(input)) * linear1(input)
            output = linear2(dropout(hidden))
            return output if residual is None else residual + output
        gate_weight, gate_bias = parameters_of(gate, ("weight", "bias"))
        return feed_forward(
            input,
            *parameters_of(linear1, ("weight", "bias")),
            *parameters_of(linear2, ("weight", "bias")),
            activation=self.activation,
            gate_weight=gate_weight,
            gate_bias=gate_bias,
            dropout_p=p,
            residual=residual,
            backend=linear1.backend,
            packed_weights=(*self._packed(), *linear2._packed()),
        )

    def _packing_sources(self) -> tuple[Tensor, ...]:
        return () if self.gate is None else (self.linear1.weight, self.gate.weight)

    def _compute_packing(self) -> tuple[Tensor | None]:
        if self.gate is None:
            return (None,)
        weights = (self.linear1.weight, self.gate.weight)
        return (pack_feed_forward_weight(*weights, self.linear1.backend),)
