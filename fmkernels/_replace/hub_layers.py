"""Counterparts of layers that Hugging Face's transformers defines, with the same parameters.

They are made from the original and share its Parameters; attributes that other code reads (such as
``nf``) move along in :mod:`fmkernels._replace.swap`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmkernels import functional as F
from fmkernels.nn import Linear
from fmkernels.nn._frozen import Freezable, adopt
from fmkernels.ops.feed_forward.autograd import pack_feed_forward_weight
from fmkernels.ops.linear.autograd import pack_linear_weight


class Conv1D(Freezable):
    """GPT-2's linear layer, whose weight is (in_features, out_features)."""

    def __init__(self, module: nn.Module, activation: str | None = None) -> None:
        super().__init__()
        self.nf, self.nx = module.nf, module.nx
        self.activation = activation
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self._init_frozen()
        adopt(self, module)

    def forward(self, x: Tensor) -> Tensor:
        (packed,) = self._packed()
        return F.linear(
            x, self.weight.t(), self.bias, activation=self.activation, packed_weight=packed
        )

    def _packing_sources(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def _compute_packing(self) -> tuple[Tensor | None]:
        return (pack_linear_weight(self.weight.t(), None),)

    def extra_repr(self) -> str:
        extras = "" if self.activation is None else f", activation={self.activation!r}"
        return f"nf={self.nf}, nx={self.nx}{extras}"


class RMSNorm(nn.Module):
    """Llama's RMS norm: the result has the dtype that input and weight promote to."""

    def __init__(self, module: nn.Module, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", None)
        adopt(self, module)

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        return F.rms_norm(hidden_states.to(dtype), self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class GatedMLP(Freezable):
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` as one op."""

    def __init__(self, module: nn.Module, activation: str) -> None:
        super().__init__()
        self.activation = activation
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, Linear.from_torch(getattr(module, name)))
        # Their weights are packed side by side, here.
        self.gate_proj._packs_alone = self.up_proj._packs_alone = False
        self.act_fn = module.act_fn
        self._init_frozen()
        self.training = module.training

    def forward(self, x: Tensor) -> Tensor:
        return F.feed_forward(
            x,
            self.up_proj.weight,
            self.up_proj.bias,
            self.down_proj.weight,
            self.down_proj.bias,
            activation=self.activation,
            gate_weight=self.gate_proj.weight,
            gate_bias=self.gate_proj.bias,
            packed_weights=(*self._packed(), *self.down_proj._packed()),
        )

    def _packing_sources(self) -> tuple[Tensor, ...]:
        return (self.up_proj.weight, self.gate_proj.weight)

    def _compute_packing(self) -> tuple[Tensor | None]:
        return (pack_feed_forward_weight(self.up_proj.weight, self.gate_proj.weight, None),)
