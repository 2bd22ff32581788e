"""Convolution layers with a fused epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fmkernels import _checks
from fmkernels import functional as F
from fmkernels._dispatch import check_backend_name
from fmkernels.functional.conv import IntOrTuple, Pool, check_pool, padding_edges, pool2d
from fmkernels.nn._frozen import Freezable, adopt
from fmkernels.ops import _activations
from fmkernels.ops.conv.autograd import pack_conv2d_weight


class _FusedConv(Freezable):
    """What Conv1d and Conv2d share: the extras, packing, and building from a torch layer."""

    _dims: int

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
        layer = cls(
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
            activation=activation,
            pool=pool,
            backend=backend,
        )
        adopt(layer, module)
        return layer

    def _packing_sources(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def _compute_packing(self) -> tuple[Tensor | None]:
        return (pack_conv(self, self.backend),)

    def extra_repr(self) -> str:
        extras = "" if self.activation is None else f", activation={self.activation!r}"
        if self.pool is not None:
            extras += f", pool={self.pool!r}"
        return super().extra_repr() + extras


class Conv2d(_FusedConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with an optional activation and pooling in the same kernel.

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

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTuple,
        stride: IntOrTuple = 1,
        padding: IntOrTuple | str = 0,
        dilation: IntOrTuple = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        pool: Pool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._init_extras(activation, pool, backend)

    def forward(self, input: Tensor) -> Tensor:
        (packed_weight,) = self._packed()
        return F.conv2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            padding_mode=self.padding_mode,
            activation=self.activation,
            pool=self.pool,
            backend=self.backend,
            packed_weight=packed_weight,
        )


class Conv1d(_FusedConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with an optional activation in the same kernel, pooling after it.

    ``y = pool(activation(conv1d(x, weight) + bias))``; same parameters, state_dict and
    initialisation.

    Args:
        in_channels ... dtype: as in torch.nn.Conv1d.
        activation, pool, backend: as in :func:`fmkernels.functional.conv1d`.

    Shape:
        input (N, C, L) or (C, L).

    Raises:
        TypeError, ValueError: invalid activation, pool or backend.
    """

    _dims = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTuple,
        stride: IntOrTuple = 1,
        padding: IntOrTuple | str = 0,
        dilation: IntOrTuple = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        pool: Pool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._init_extras(activation, pool, backend)

    def forward(self, input: Tensor) -> Tensor:
        (packed_weight,) = self._packed()
        return F.conv1d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            padding_mode=self.padding_mode,
            activation=self.activation,
            pool=self.pool,
            backend=self.backend,
            packed_weight=packed_weight,
        )


class ConvBlock2d(Freezable, nn.Module):
    """Convolution, optional batch norm, activation and pooling, fused as far as the mode allows.

    ``y = pool(activation(norm(conv(x))))``. In evaluation the norm is folded into a per-channel
    scale and shift, and the whole block is one kernel. In training with a norm, the convolution is
    followed by PyTorch's batch norm (running statistics are updated as PyTorch does), activation
    and pooling; without a norm, training is one kernel too.

    Args:
        in_channels ... dtype: as in torch.nn.Conv2d.
        norm: None or ``"batch"`` (torch.nn.BatchNorm2d with its defaults).
        activation, pool, backend: as in :func:`fmkernels.functional.conv2d`.

    Attributes:
        conv: the torch.nn.Conv2d that holds the convolution's parameters.
        norm: the torch.nn.BatchNorm2d, or None.

    Shape:
        input (N, C, H, W); the output has the input's memory format.

    Raises:
        TypeError, ValueError: invalid norm, activation, pool or backend.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTuple,
        stride: IntOrTuple = 1,
        padding: IntOrTuple | str = 0,
        dilation: IntOrTuple = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        norm: str | None = None,
        activation: str | None = None,
        pool: Pool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _checks.choice("norm", norm, (None, "batch"))
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        norm_layer = None
        if norm is not None:
            norm_layer = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        self._init_block(conv, norm_layer, activation, pool, backend)

    @classmethod
    def from_torch(
        cls,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d | None = None,
        *,
        activation: str | None = None,
        pool: Pool | None = None,
        backend: str | None = None,
    ) -> ConvBlock2d:
        """A block that holds these layers as they are; conv gives the training flag."""
        if norm is not None and norm.num_features != conv.out_channels:
            raise ValueError(
                f"norm must have conv's {conv.out_channels} channels, got {norm.num_features}"
            )
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block._init_block(conv, norm, activation, pool, backend)
        block.training = conv.training
        return block

    def _init_block(
        self,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d | None,
        activation: str | None,
        pool: Pool | None,
        backend: str | None,
    ) -> None:
        _checks.choice("activation", activation, _activations.CHOICES)
        check_pool(pool, 2)
        self.conv = conv
        self.norm = norm
        self.activation = activation
        self.pool = pool
        self.backend = None if backend is None else check_backend_name(backend)
        self._init_frozen(("_packed_weight", "_folded_scale", "_folded_shift"))

    def forward(self, input: Tensor) -> Tensor:
        packed_weight, scale, shift = self._packed()
        if self.norm is None:
            return self._conv(input, packed_weight, None, None, self.activation, self.pool)
        if _uses_batch_statistics(self.norm):
            output = self.norm(self._conv(input, packed_weight, None, None, None, None))
            output = _activations.apply(self.activation, output)
            return output if self.pool is None else pool2d(output, self.pool, backend=self.backend)
        if scale is None or self._norm_needs_graph():
            scale, shift = _fold_batch_norm(self.norm, self.conv.weight.dtype)
        return self._conv(input, packed_weight, scale, shift, self.activation, self.pool)

    def _conv(
        self,
        input: Tensor,
        packed_weight: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        activation: str | None,
        pool: Pool | None,
    ) -> Tensor:
        conv = self.conv
        return F.conv2d(
            input,
            conv.weight,
            conv.bias,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            padding_mode=conv.padding_mode,
            activation=activation,
            scale=scale,
            shift=shift,
            pool=pool,
            backend=self.backend,
            packed_weight=packed_weight,
        )

    def _norm_needs_graph(self) -> bool:
        parameters = (self.norm.weight, self.norm.bias)
        return torch.is_grad_enabled() and any(
            p is not None and p.requires_grad for p in parameters
        )

    def _packing_sources(self) -> tuple[Tensor, ...]:
        norm = self.norm
        if norm is None:
            return (self.conv.weight,)
        folded = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return (self.conv.weight, *(t for t in folded if t is not None))

    def _compute_packing(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        scale = shift = None
        if self.norm is not None and self.norm.running_mean is not None:
            scale, shift = _fold_batch_norm(self.norm, self.conv.weight.dtype)
        return pack_conv(self.conv, self.backend), scale, shift

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, pool={self.pool!r}"


def pack_conv(conv: nn.Conv1d | nn.Conv2d, backend: str | None) -> Tensor | None:
    """The weight, packed for the call that forward makes; None: nothing to pack."""
    weight, stride, dilation = conv.weight, conv.stride, conv.dilation
    edges = padding_edges(conv.padding, conv.kernel_size, stride, dilation)
    # What F.pad adds beforehand is no padding to the kernel (see functional.conv).
    in_kernel = conv.padding_mode == "zeros" and all(before == after for before, after in edges)
    padding = tuple(before if in_kernel else 0 for before, _ in edges)
    if len(stride) == 1:
        weight = weight.unsqueeze(2)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    return pack_conv2d_weight(weight, stride, padding, dilation, conv.groups, backend)


def _uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """As torch's batch norm decides: in training, or for lack of running statistics."""
    return norm.training or norm.running_mean is None


def _fold_batch_norm(norm: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``norm(x) = scale * x + shift`` in evaluation, computed in at least float32."""
    opmath = _activations.opmath_dtype(norm.running_var.dtype)
    scale = torch.rsqrt(norm.running_var.to(opmath) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return scale.to(dtype), shift.to(dtype)
