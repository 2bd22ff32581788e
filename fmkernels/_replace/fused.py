"""The modules that a fused chain leaves behind.

A chain such as ``conv -> bn -> relu -> pool`` becomes one fused layer at the convolution's place.
The other members stay where they were, as modules that hand their input on, so every parameter and
buffer keeps its owner and its name: the state_dict does not change.
"""

from __future__ import annotations

from torch import Tensor, nn

from fmkernels import nn as fnn
from fmkernels.functional.conv import Pool
from fmkernels.nn._frozen import adopt


class FusedConv2d(fnn.ConvBlock2d, nn.Conv2d):
    """``pool(activation(norm(conv(x))))`` with a batch norm that lives elsewhere in the model.

    Holds the convolution's parameters itself. The batch norm stays registered at its own place;
    this layer only refers to it, and reads its parameters, statistics and training flag on every
    call, so both modes behave as the separate modules do. A deepcopy or pickle of the whole model
    refers to the copied batch norm.
    """

    @classmethod
    def from_chain(
        cls,
        module: nn.Conv2d,
        norm: FusedBatchNorm2d,
        *,
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
        layer._init_epilogue(activation, pool, None)
        adopt(layer, module)
        return layer

    @property
    def conv(self) -> nn.Conv2d:
        return self

    @property
    def norm(self) -> nn.BatchNorm2d:
        return self._norm[0]

    def extra_repr(self) -> str:
        extras = ["batch norm"]
        if self.activation is not None:
            extras.append(f"activation={self.activation!r}")
        if self.pool is not None:
            extras.append(f"pool={self.pool!r}")
        return ", ".join([nn.Conv2d.extra_repr(self), *extras])


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
