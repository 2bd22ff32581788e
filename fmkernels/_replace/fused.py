"""The modules that a fused chain leaves behind.

A chain such as ``conv -> bn -> + x -> relu -> pool`` becomes one fused layer at the convolution's
place, which is given what is added as its second argument.
The other members stay where they were, as modules that hand their input on, so every parameter and
buffer keeps its owner and its name: the state_dict does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmkernels import functional as F
from fmkernels import nn as fnn
from fmkernels._dispatch import autocast_enabled
from fmkernels._replace import steps
from fmkernels.functional.conv import Pool, conv_output_shape
from fmkernels.nn._frozen import adopt
from fmkernels.nn.conv import everyday_call
from fmkernels.ops import _activations
from fmkernels.ops.conv import quick


def summand(value: Any) -> Any:
    """``value``, unless it is the None by which layers are told that there is no residual.

    Raises:
        TypeError: as the sum itself would.
    """
    if value is None:
        raise TypeError("unsupported operand type(s) for +: 'Tensor' and 'NoneType'")
    return value


class FusedConv2d(fnn.ConvBlock2d, nn.Conv2d):
    """``pool(activation(norm(conv(x)) + residual))`` with a batch norm that lives elsewhere in the
    model, if there is one.

    Holds the convolution's parameters itself. The batch norm stays registered at its own place;
    this layer only refers to it, and reads its parameters, statistics and training flag on every
    call, so both modes behave as the separate modules do. A deepcopy or pickle of the whole model
    refers to the copied batch norm.

    ``residual_sum`` says how the residual was added, a key of :data:`steps.SUMS`; None: not at
    all. A layer with a sum that is called without a residual does what came before the sum, and
    nothing else: that is what the module around it returned.
    """

    residual_sum: str | None = None

    @classmethod
    def from_chain(
        cls,
        module: nn.Conv2d,
        norm: FusedBatchNorm2d | None,
        *,
        residual_sum: str | None = None,
        activation: str | None = None,
        pool: Pool | None = None,
    ) -> FusedConv2d:
        """The fused layer for ``module``, whose Parameters it shares, followed by ``norm``."""
        layer = cls.__new__(cls)
        nn.Conv2d.__init__(
            layer,
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.bias is not None,
            module.padding_mode,
            device="meta",
        )
        # In a tuple, because a module held directly would be registered as a submodule.
        layer._norm = (norm,)
        layer.residual_sum = residual_sum
        layer._init_epilogue(activation, pool, None)
        adopt(layer, module)
        return layer

    @property
    def conv(self) -> nn.Conv2d:
        return self

    @property
    def norm(self) -> nn.BatchNorm2d | None:
        return self._norm[0]

    def forward(self, input: Tensor, residual: Any = None) -> Tensor:
        if self.residual_sum is None:
            return super().forward(input, residual)
        if residual is None:
            return self._block(input, None, None, None)
        # A tensor that the kernels cannot add as it is comes back as None, and is looked at below.
        if isinstance(residual, Tensor):
            output = everyday_call(self.frozen_layer(True), input, residual)
            if output is not None:
                return output
        conv = (self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        shape = conv_output_shape(2, input, self.weight, *conv)
        if _fits(residual, shape, input):
            return self._block(input, residual, self.activation, self.pool)
        output = steps.SUMS[self.residual_sum](self._block(input, None, None, None), residual)
        output = _activations.apply(self.activation, output)
        return output if self.pool is None else steps.POOLS[self.pool[0]](output, *self.pool[1:])

    def frozen_layer(self, has_residual: bool) -> quick.Layer | None:
        if self.residual_sum is None or has_residual:
            return super().frozen_layer(has_residual)
        return self._everyday_layer(None, None, self._packed())

    def extra_repr(self) -> str:
        extras = ["batch norm"] if self.norm is not None else []
        if self.residual_sum is not None:
            extras.append(f"residual_sum={self.residual_sum!r}")
        if self.activation is not None:
            extras.append(f"activation={self.activation!r}")
        if self.pool is not None:
            extras.append(f"pool={self.pool!r}")
        return ", ".join([nn.Conv2d.extra_repr(self), *extras])


class FusedLinear(fnn.Linear):
    """``activation(linear(x) + residual)``; ``residual_sum`` is as in :class:`FusedConv2d`."""

    residual_sum: str

    @classmethod
    def from_chain(
        cls, module: nn.Linear, *, residual_sum: str, activation: str | None = None
    ) -> FusedLinear:
        """The fused layer for ``module``, whose Parameters it shares."""
        layer = cls.from_torch(module, activation=activation)
        layer.residual_sum = residual_sum
        return layer

    def forward(self, input: Tensor, residual: Any = None) -> Tensor:
        (packed_weight,) = self._packed()
        fits = _fits(residual, (*input.shape[:-1], self.out_features), input)
        output = F.linear(
            input,
            self.weight,
            self.bias,
            activation=self.activation if fits else None,
            residual=residual if fits else None,
            packed_weight=packed_weight,
        )
        if fits or residual is None:
            return output
        return _activations.apply(self.activation, steps.SUMS[self.residual_sum](output, residual))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, residual_sum={self.residual_sum!r}"


def _fits(residual: Any, shape: Sequence[int], input: Tensor) -> bool:
    """Whether the kernels can add ``residual`` to a layer's output of this shape.

    Anything else, such as a number, or a tensor that is broadcast or promotes the sum to another
    dtype, is added by torch.
    """
    if not isinstance(residual, Tensor) or residual.layout is not torch.strided:
        return False
    dtype, device = input.dtype, input.device
    if dtype is not torch.float64 and autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    same_kind = residual.dtype is dtype and residual.device == device
    return same_kind and tuple(residual.shape) == tuple(shape)


class FusedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that a preceding :class:`FusedConv2d` applies; called, it is the identity.

    Parameters, statistics and training flag live here as in the original, so freezing its
    statistics with ``.eval()`` or training its weight works as before.
    """

    fused_into: str

    @classmethod
    def from_torch(cls, module: nn.BatchNorm2d, fused_into: str) -> FusedBatchNorm2d:
        """Shares ``module``'s parameters and buffers."""
        layer = cls.__new__(cls)
        # Every attribute as it is, whichever the torch version has; the tables are copies.
        tables = ("_parameters", "_buffers", "_modules")
        vars(layer).update(vars(module))
        vars(layer).update({table: dict(vars(module)[table]) for table in tables})
        layer.fused_into = fused_into
        return layer

    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fused into {self.fused_into}"


class FusedAway(nn.Module):
    """Stands where an activation or a pooling stood that a preceding layer now applies.

    Attributes:
        original: repr of the module that stood here.
        fused_into: path of the layer that does its work.
    """

    def __init__(self, original: nn.Module, fused_into: str) -> None:
        super().__init__()
        self.original = repr(original)
        self.fused_into = fused_into
        self.training = original.training

    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        return f"{self.original} fused into {self.fused_into}"
