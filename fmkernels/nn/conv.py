"""Convolution layers with a fused epilogue."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fmkernels import _checks
from fmkernels import functional as F
from fmkernels._dispatch import check_backend_name
from fmkernels.functional._conv_arguments import (
    Pool,
    check_pool,
    padding_edges,
    transposed_edges,
)
from fmkernels.functional.conv import layer_options
from fmkernels.nn._frozen import Freezable, adopt, parameters_of
from fmkernels.ops import _activations
from fmkernels.ops.conv import quick
from fmkernels.ops.conv.autograd import pack_conv_weight
from fmkernels.ops.conv.geometry import ConvOptions


class _FusedConv(Freezable):
    """What all convolution layers share: the extras, packing, and building from a torch layer."""

    _dims: int

    def __init__(
        self,
        *arguments: Any,
        activation: str | None = None,
        pool: Pool | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._init_extras(activation, pool, backend)

    def _init_extras(self, activation: str | None, pool: Pool | None, backend: str | None) -> None:
        _checks.choice("activation", activation, _activations.CHOICES)
        check_pool(pool, self._dims)
        self.activation = activation
        self.pool = pool
        self.backend = None if backend is None else check_backend_name(backend)
        self._init_frozen()

    @classmethod
    def from_torch(
        cls,
        module: nn.modules.conv._ConvNd,
        *,
        activation: str | None = None,
        pool: Pool | None = None,
        backend: str | None = None,
    ) -> _FusedConv:
        """A layer that shares ``module``'s Parameters and training flag; its hooks stay behind."""
        transposed = {"output_padding": module.output_padding} if module.transposed else {}
        layer = cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            dilation=module.dilation,
            groups=module.groups,
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
            device="meta",
            activation=activation,
            pool=pool,
            backend=backend,
            **transposed,
        )
        if parametrize.is_parametrized(module):
            _adopt_parametrized(layer, module)
        else:
            adopt(layer, module)
        return layer

    def _extras(self, packed_weight: Tensor | None) -> dict[str, Any]:
        """The keywords of the functional call that all layers pass."""
        return {
            "padding_mode": self.padding_mode,
            "activation": self.activation,
            "pool": self.pool,
            "backend": self.backend,
            "packed_weight": packed_weight,
        }

    def _everyday_layer(self, packed_weight: Tensor | None) -> quick.Layer | None:
        return everyday_layer(
            self, packed_weight, None, None, self.activation, self.pool, self.backend
        )

    def _packing_sources(self) -> list[Tensor]:
        return parameters_of(self, ("weight",))

    def _compute_packing(self) -> tuple[Tensor | None]:
        return (pack_conv(self, self.backend),)

    def extra_repr(self) -> str:
        extras = "" if self.activation is None else f", activation={self.activation!r}"
        if self.pool is not None:
            extras += f", pool={self.pool!r}"
        return super().extra_repr() + extras


def _adopt_parametrized(layer: _FusedConv, module: nn.Module) -> None:
    """As adopt(), for a module whose weight or bias is computed by torch's parametrizations.

    The layer computes them by the very same ones. As torch does it, its class becomes one of its
    own with properties of their names.
    """
    for name in module.parametrizations:
        del layer._parameters[name]
    adopt(layer, module)
    layer._modules["parametrizations"] = module.parametrizations
    kind, inherited = type(layer), vars(type(module))
    names = (*module.parametrizations, "__getstate__", "__deepcopy__")
    members = {name: inherited[name] for name in names if name in inherited}
    layer.__class__ = type(f"Parametrized{kind.__name__}", (kind,), members)


class _ForwardConv(_FusedConv):
    def forward(self, input: Tensor) -> Tensor:
        (packed_weight,) = self._packed()
        output = everyday_call(self._everyday_layer(packed_weight), input)
        if output is not None:
            return output
        return self._function(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            **self._extras(packed_weight),
        )

    def frozen_layer(self, has_residual: bool) -> quick.Layer | None:
        """The layer for a chain of convolutions, if it is frozen."""
        (packed_weight,) = self._packed()
        return None if has_residual else self._everyday_layer(packed_weight)


class _TransposedConv(_FusedConv):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        (packed_weight,) = self._packed()
        if output_size is None:
            output = everyday_call(self._everyday_layer(packed_weight), input)
            if output is not None:
                return output
        output_padding = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            self._dims,
            self.dilation,
        )
        return self._function(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
            **self._extras(packed_weight),
        )


class Conv1d(_ForwardConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with an activation and a pool in the same kernel.

    ``y = pool(activation(conv1d(x, weight) + bias))``; same parameters, state_dict and
    initialisation.

    Args:
        in_channels ... dtype: as in torch.nn.Conv1d.
        activation, pool, backend: as in :func:`fmkernels.functional.conv1d`.

    Shape:
        input (N, C, L) or (C, L); the output has the input's memory format.

    Raises:
        TypeError, ValueError: invalid activation, pool or backend.
    """

    _dims = 1
    _function = staticmethod(F.conv1d)


class Conv2d(_ForwardConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with an activation and a pool in the same kernel.

    ``y = pool(activation(conv2d(x, weight) + bias))``; same parameters, state_dict and
    initialisation.

    Args:
        in_channels ... dtype: as in torch.nn.Conv2d.
        activation, pool, backend: as in :func:`fmkernels.functional.conv2d`.

    Shape:
        input (N, C, H, W) or (C, H, W); the output has the input's memory format.

    Raises:
        TypeError, ValueError: invalid activation, pool or backend.
    """

    _dims = 2
    _function = staticmethod(F.conv2d)


class Conv3d(_ForwardConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` with an activation and a pool in the same kernel.

    ``y = pool(activation(conv3d(x, weight) + bias))``; same parameters, state_dict and
    initialisation.

    Args:
        in_channels ... dtype: as in torch.nn.Conv3d.
        activation, pool, backend: as in :func:`fmkernels.functional.conv3d`.

    Shape:
        input (N, C, D, H, W) or (C, D, H, W); the output has the input's memory format.

    Raises:
        TypeError, ValueError: invalid activation, pool or backend.
    """

    _dims = 3
    _function = staticmethod(F.conv3d)


class ConvTranspose1d(_TransposedConv, nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` with an activation and a pool in the same kernel.

    ``y = pool(activation(conv_transpose1d(x, weight) + bias))``; same parameters, state_dict and
    initialisation. forward takes torch's ``output_size`` too.

    Args:
        in_channels ... dtype: as in torch.nn.ConvTranspose1d.
        activation, pool, backend: as in :func:`fmkernels.functional.conv_transpose1d`.

    Shape:
        input (N, C, L) or (C, L); the output has the input's memory format.

    Raises:
        TypeError, ValueError: invalid activation, pool or backend.
    """

    _dims = 1
    _function = staticmethod(F.conv_transpose1d)


class ConvTranspose2d(_TransposedConv, nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` with an activation and a pool in the same kernel.

    ``y = pool(activation(conv_transpose2d(x, weight) + bias))``; same parameters, state_dict and
    initialisation. forward takes torch's ``output_size`` too.

    Args:
        in_channels ... dtype: as in torch.nn.ConvTranspose2d.
        activation, pool, backend: as in :func:`fmkernels.functional.conv_transpose2d`.

    Shape:
        input (N, C, H, W) or (C, H, W); the output has the input's memory format.

    Raises:
        TypeError, ValueError: invalid activation, pool or backend.
    """

    _dims = 2
    _function = staticmethod(F.conv_transpose2d)


class ConvTranspose3d(_TransposedConv, nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` with an activation and a pool in the same kernel.

    ``y = pool(activation(conv_transpose3d(x, weight) + bias))``; same parameters, state_dict and
    initialisation. forward takes torch's ``output_size`` too.

    Args:
        in_channels ... dtype: as in torch.nn.ConvTranspose3d.
        activation, pool, backend: as in :func:`fmkernels.functional.conv_transpose3d`.

    Shape:
        input (N, C, D, H, W) or (C, D, H, W); the output has the input's memory format.

    Raises:
        TypeError, ValueError: invalid activation, pool or backend.
    """

    _dims = 3
    _function = staticmethod(F.conv_transpose3d)


# The attributes that everyday_layer reads, for whoever keeps its result.
LAYER_ATTRIBUTES = ("activation", "pool", "backend")
CONV_ATTRIBUTES = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def everyday_layer(
    conv: nn.modules.conv._ConvNd,
    packed_weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    pool: Pool | None,
    backend: str | None,
) -> quick.Layer | None:
    """A frozen layer for :mod:`fmkernels.ops.conv.quick`, without the way through the functional
    interface, which takes longer than a small convolution; None where that is needed.
    """
    if packed_weight is None:
        return None
    options = layer_options(
        len(conv.kernel_size),
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.padding_mode,
        activation,
        pool,
        conv.output_padding if conv.transposed else None,
    )
    if options is None:
        return None
    weight, bias = parameters_of(conv, ("weight", "bias"))
    return quick.Layer(weight, bias, scale, shift, packed_weight, options, backend)


def everyday_call(
    layer: quick.Layer | None, input: Tensor, residual: Tensor | None = None
) -> Tensor | None:
    """A single :func:`everyday_layer`."""
    if layer is None:
        return None
    weight, bias, scale, shift, packed_weight, options, backend = layer
    return quick.conv(input, weight, bias, scale, shift, residual, packed_weight, options, backend)


def pack_conv(conv: nn.modules.conv._ConvNd, backend: str | None) -> Tensor | None:
    """The weight, packed for the call that forward makes; None: nothing to pack."""
    stride, dilation = conv.stride, conv.dilation
    if conv.transposed:
        edges = transposed_edges(conv.padding, conv.output_padding, stride, dilation)
    else:
        edges = padding_edges(conv.padding, conv.kernel_size, stride, dilation)
    options = ConvOptions(stride, edges, dilation, conv.groups, conv.transposed, conv.padding_mode)
    return pack_conv_weight(conv.weight, options, backend)
