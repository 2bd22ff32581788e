"""Layer and RMS normalisation: torch.nn's, on this package's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmkernels import functional as F
from fmkernels._dispatch import check_backend_name
from fmkernels.nn._frozen import adopt, parameters_of
from fmkernels.ops.norm import quick


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm`: same constructor, state_dict and results.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in torch.nn.LayerNorm.
        backend: as in :func:`fmkernels.functional.layer_norm`.

    Shape:
        input and output ``(..., *normalized_shape)``.

    Raises:
        ValueError: unknown backend.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.backend = None if backend is None else check_backend_name(backend)

    @classmethod
    def from_torch(cls, module: nn.LayerNorm, *, backend: str | None = None) -> LayerNorm:
        """A layer that shares ``module``'s Parameters and training flag; its hooks stay behind."""
        layer = cls(
            module.normalized_shape,
            module.eps,
            module.elementwise_affine,
            module.bias is not None,
            device="meta",
            backend=backend,
        )
        adopt(layer, module)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = parameters_of(self, ("weight", "bias"))
        results = quick.norm(
            input, None, self.normalized_shape, weight, bias, False, self.eps, False, self.backend
        )
        if results is not None:
            return results[0]
        return F.layer_norm(
            input, self.normalized_shape, weight, bias, self.eps, backend=self.backend
        )

    def forward_sum(self, input: Tensor, residual: Tensor, dropout_p: float) -> tuple:
        """Normalised ``dropout(input) + residual``, and that sum, in one pass."""
        weight, bias = parameters_of(self, ("weight", "bias"))
        return F.add_layer_norm(
            input,
            residual,
            self.normalized_shape,
            weight,
            bias,
            self.eps,
            dropout_p=dropout_p,
            return_sum=True,
            backend=self.backend,
        )


class RMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm`: same constructor, state_dict and results.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in torch.nn.RMSNorm.
        backend: as in :func:`fmkernels.functional.rms_norm`.

    Shape:
        input and output ``(..., *normalized_shape)``.

    Raises:
        ValueError: unknown backend.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.backend = None if backend is None else check_backend_name(backend)

    @classmethod
    def from_torch(cls, module: nn.RMSNorm, *, backend: str | None = None) -> RMSNorm:
        """A layer that shares ``module``'s Parameters and training flag; its hooks stay behind."""
        layer = cls(
            module.normalized_shape,
            module.eps,
            module.elementwise_affine,
            device="meta",
            backend=backend,
        )
        adopt(layer, module)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        (weight,) = parameters_of(self, ("weight",))
        return F.rms_norm(input, self.normalized_shape, weight, self.eps, backend=self.backend)
