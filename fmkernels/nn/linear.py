"""Linear with a fused activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fmkernels import _checks
from fmkernels import functional as F
from fmkernels._dispatch import check_backend_name
from fmkernels.nn._frozen import Freezable, adopt, parameters_of
from fmkernels.ops import _activations
from fmkernels.ops.linear import quick
from fmkernels.ops.linear.autograd import pack_linear_weight


class Linear(Freezable, nn.Linear):
    """:class:`torch.nn.Linear` with an optional activation in the same kernel.

    ``y = activation(x @ weight.T + bias)``; same parameters, state_dict and initialisation.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        activation: a name as in :func:`fmkernels.functional.linear`, or None.
        backend: as in :func:`fmkernels.functional.linear`.

    Shape:
        input (..., in_features), output (..., out_features).

    Raises:
        ValueError: unknown activation or backend.
    """

    # False for a part of a layer that packs its weight together with another one.
    _packs_alone = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        _checks.choice("activation", activation, _activations.CHOICES)
        self.activation = activation
        self.backend = None if backend is None else check_backend_name(backend)
        self._init_frozen()

    @classmethod
    def from_torch(
        cls, module: nn.Linear, *, activation: str | None = None, backend: str | None = None
    ) -> Linear:
        """A layer that shares ``module``'s Parameters and training flag; its hooks stay behind."""
        layer = cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            device="meta",
            activation=activation,
            backend=backend,
        )
        adopt(layer, module)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        (packed_weight,) = self._packed()
        weight, bias = parameters_of(self, ("weight", "bias"))
        output = quick.linear(
            input, weight, bias, None, packed_weight, self.activation, self.backend
        )
        if output is not None:
            return output
        return F.linear(
            input,
            weight,
            bias,
            activation=self.activation,
            backend=self.backend,
            packed_weight=packed_weight,
        )

    def _packing_sources(self) -> list[Tensor]:
        return parameters_of(self, ("weight",))

    def _compute_packing(self) -> tuple[Tensor | None]:
        if not self._packs_alone:
            return (None,)
        return (pack_linear_weight(self.weight, self.backend),)

    def extra_repr(self) -> str:
        extras = "" if self.activation is None else f", activation={self.activation!r}"
        return super().extra_repr() + extras
