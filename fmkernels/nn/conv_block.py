"""Convolution, norm, activation, residual and pooling as one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fmkernels import _checks
from fmkernels import functional as F
from fmkernels._dispatch import check_backend_name
from fmkernels.functional._conv_arguments import Pool, check_pool, check_window, parse_pool
from fmkernels.functional.conv import conv_with_statistics
from fmkernels.nn._frozen import Freezable, buffers_of, parameters_of
from fmkernels.nn.conv import everyday_call, everyday_layer, pack_conv
from fmkernels.ops import _activations
from fmkernels.ops.conv import quick
from fmkernels.ops.conv.autograd_norm import norm as norm_image

_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d}
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d}

Norm = str | tuple[str, int] | nn.Module | None


class _ConvBlock(Freezable, nn.Module):
    _dims: int

    def __init__(
        self,
        *arguments: Any,
        norm: Norm = None,
        activation: str | None = None,
        pool: Pool | None = None,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        conv = _CONVS[self._dims](*arguments, device=device, dtype=dtype, **options)
        norm_layer = self._norm_layer(norm, conv.out_channels, device, dtype)
        self._init_block(conv, norm_layer, activation, pool, backend)

    @classmethod
    def from_torch(
        cls,
        conv: nn.modules.conv._ConvNd,
        norm: nn.Module | None = None,
        *,
        activation: str | None = None,
        pool: Pool | None = None,
        backend: str | None = None,
    ) -> _ConvBlock:
        """A block that holds these layers as they are; conv gives the training flag."""
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        norm = cls._norm_layer(norm, conv.out_channels, None, None)
        block._init_block(conv, norm, activation, pool, backend)
        block.training = conv.training
        return block

    @classmethod
    def _norm_layer(
        cls, norm: Norm, channels: int, device: Any, dtype: torch.dtype | None
    ) -> nn.Module | None:
        batch_norm = _BATCH_NORMS[cls._dims]
        if norm is None:
            return None
        if isinstance(norm, (batch_norm, nn.GroupNorm)):
            held = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
            if held != channels:
                raise ValueError(f"norm must have conv's {channels} channels, got {held}")
            return norm
        if isinstance(norm, tuple) and len(norm) == 2 and norm[0] == "group":
            groups = _checks.integer("norm[1]", norm[1], 1)
            if channels % groups:
                raise ValueError(f"norm[1] must divide the {channels} channels, got {groups}")
            return nn.GroupNorm(groups, channels, device=device, dtype=dtype)
        if norm != "batch":
            raise ValueError(
                f"norm must be None, 'batch', ('group', number of groups), a "
                f"{batch_norm.__name__} or a GroupNorm, got {_checks.describe(norm)}"
            )
        return batch_norm(channels, device=device, dtype=dtype)

    def _init_block(
        self,
        conv: nn.modules.conv._ConvNd,
        norm: nn.Module | None,
        activation: str | None,
        pool: Pool | None,
        backend: str | None,
    ) -> None:
        self.conv = conv
        self.norm = norm
        self._init_epilogue(activation, pool, backend)

    def _init_epilogue(
        self, activation: str | None, pool: Pool | None, backend: str | None
    ) -> None:
        _checks.choice("activation", activation, _activations.CHOICES)
        check_pool(pool, self._dims)
        self.activation = activation
        self.pool = pool
        self.backend = None if backend is None else check_backend_name(backend)
        self._init_frozen(("_packed_weight", "_folded_scale", "_folded_shift"))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._block(input, residual, self.activation, self.pool)

    def _block(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str | None,
        pool: Pool | None,
    ) -> Tensor:
        norm, packed = self.norm, self._packed()
        layer = self._everyday_layer(activation, pool, packed)
        output = everyday_call(layer, input, residual)
        if output is not None:
            return output
        packed_weight, scale, shift = packed
        if norm is not None and _uses_statistics_of_input(norm):
            mean = variance = None
            if isinstance(norm, nn.GroupNorm):
                conv = self._conv(input, packed_weight)
            else:
                conv, mean, variance = self._conv_with_statistics(input, packed_weight)
            return self._norm_of(conv, residual, activation, pool, mean, variance)
        if norm is not None and (scale is None or _needs_graph(norm)):
            scale, shift = _fold_batch_norm(norm, input.dtype)
        return self._conv(
            input,
            packed_weight,
            scale=scale,
            shift=shift,
            residual=residual,
            activation=activation,
            pool=pool,
        )

    def frozen_layer(self, has_residual: bool) -> quick.Layer | None:
        """The block for a chain of convolutions, if it is frozen."""
        return self._everyday_layer(self.activation, self.pool, self._packed())

    def _everyday_layer(
        self, activation: str | None, pool: Pool | None, packed: tuple[Tensor | None, ...]
    ) -> quick.Layer | None:
        """The block as one op without a graph, if it is frozen."""
        norm, (packed_weight, scale, shift) = self.norm, packed
        # What the norm was folded into has no graph, whichever of its parameters want one.
        folded = scale is not None and not norm.training and not torch.is_grad_enabled()
        if norm is not None and not folded:
            return None
        return everyday_layer(
            self.conv, packed_weight, scale, shift, activation, pool, self.backend
        )

    def _conv(self, input: Tensor, packed_weight: Tensor | None, **epilogue: Any) -> Tensor:
        return _FUNCTIONS[self._dims](
            input, *self._conv_arguments(), **self._conv_options(packed_weight), **epilogue
        )

    def _conv_with_statistics(
        self, input: Tensor, packed_weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return conv_with_statistics(
            self._dims, input, *self._conv_arguments(), **self._conv_options(packed_weight)
        )

    def _conv_arguments(self) -> tuple[Any, ...]:
        conv = self.conv
        parameters = parameters_of(conv, ("weight", "bias"))
        return *parameters, conv.stride, conv.padding, conv.dilation, conv.groups

    def _conv_options(self, packed_weight: Tensor | None) -> dict[str, Any]:
        return {
            "padding_mode": self.conv.padding_mode,
            "backend": self.backend,
            "packed_weight": packed_weight,
        }

    def _norm_of(
        self,
        conv: Tensor,
        residual: Tensor | None,
        activation: str | None,
        pool: Pool | None,
        mean: Tensor | None,
        variance: Tensor | None,
    ) -> Tensor:
        """Norm, residual, activation and pool of the convolution's output, by its statistics,
        which for a batch norm may be known already."""
        norm, unbatched = self.norm, conv.dim() == self._dims + 1
        if residual is not None:
            _checks.tensor("residual", residual)
            _checks.shape("residual", residual, conv.shape, "the conv's output")
            residual = residual.unsqueeze(0) if unbatched else residual
        kind, window = parse_pool(pool, self._dims)
        if kind is not None:
            check_window("pool: the conv's output", conv.shape[-self._dims :], window, False)
        conv = conv.unsqueeze(0) if unbatched else conv
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 0
        count = conv.numel() // max(1, conv.shape[1])
        if groups == 0 and count == 1 and norm.training:
            raise ValueError(
                "input must give more than one value per channel in training, got "
                f"{_checks.describe(conv)} after the convolution"
            )
        output, mean, variance = norm_image(
            conv,
            norm.weight,
            norm.bias,
            residual,
            groups,
            norm.eps,
            activation,
            kind,
            () if kind is None else (*window[0], *window[1], *window[2]),
            self.backend,
            mean,
            variance,
        )
        if groups == 0 and count > 0:
            _update_running_statistics(norm, mean, variance, count)
        return output.squeeze(0) if unbatched else output

    def _packing_sources(self) -> list[Tensor]:
        norm = self.norm
        sources = parameters_of(self.conv, ("weight",))
        if _has_running_statistics(norm):
            sources += parameters_of(norm, ("weight", "bias"))
            sources += buffers_of(norm, ("running_mean", "running_var"))
            if sources[1] is None or sources[2] is None:  # not affine
                sources = [t for t in sources if t is not None]
        return sources

    def _compute_packing(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        scale = shift = None
        if _has_running_statistics(self.norm):
            scale, shift = _fold_batch_norm(self.norm, self.conv.weight.dtype)
        return pack_conv(self.conv, self.backend), scale, shift

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, pool={self.pool!r}"


class ConvBlock2d(_ConvBlock):
    """Convolution, norm, residual, activation and pooling, fused as far as the mode allows.

    ``y = pool(activation(norm(conv(x)) + residual))``

    In evaluation a batch norm is folded into a per-channel scale and shift (float32 for 16-bit
    layers), and the whole block is one kernel; so it is in training without a norm, or with a
    batch norm in evaluation mode ("frozen"), whose weight and bias still get gradients. With
    batch statistics, and with a group norm, the block is the convolution followed by one op for
    all the rest, whose backward needs the convolution's output and, for a max-pool, a byte per
    output: neither the normalised values nor those before the pool are kept. On the CPU the
    convolution gathers a batch norm's statistics on the way, while its output is in the cache.
    Running statistics, momentum and num_batches_tracked are updated as torch's batch norm updates
    them.

    Args:
        in_channels ... padding_mode, device, dtype: as in torch.nn.Conv2d.
        norm: None, ``"batch"``, ``("group", number of groups)``, or a torch.nn.BatchNorm2d or
            torch.nn.GroupNorm to be used as it is.
        activation, pool, backend: as in :func:`fmkernels.functional.conv2d`.

    Attributes:
        conv: the torch.nn.Conv2d that holds the convolution's parameters.
        norm: the norm layer, or None.

    Shape:
        input (N, C, H, W), residual shaped like the convolution's output; the output has the
        input's memory format.

    Raises:
        TypeError, ValueError: an invalid argument of the constructor or of forward.
    """

    _dims = 2


class ConvBlock1d(_ConvBlock):
    """:class:`ConvBlock2d` for inputs (N, C, L): torch.nn.Conv1d and torch.nn.BatchNorm1d."""

    _dims = 1


def _has_running_statistics(norm: nn.Module | None) -> bool:
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return False
    return buffers_of(norm, ("running_mean",))[0] is not None


def _uses_statistics_of_input(norm: nn.Module) -> bool:
    """As torch decides: always for group norm; in training, or for lack of running statistics."""
    return norm.training or not _has_running_statistics(norm)


def _needs_graph(norm: nn.Module) -> bool:
    parameters = (norm.weight, norm.bias) if torch.is_grad_enabled() else ()
    return any(p is not None and p.requires_grad for p in parameters)


def _fold_batch_norm(norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``norm(x) = scale * x + shift`` in evaluation, in the dtype of ``dtype``'s sums."""
    opmath = _activations.opmath_dtype(norm.running_var.dtype)
    scale = torch.rsqrt(norm.running_var.to(opmath) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    wide = _activations.opmath_dtype(dtype)
    return scale.to(wide), shift.to(wide)


@torch.no_grad()
def _update_running_statistics(
    norm: nn.Module, mean: Tensor, variance: Tensor, count: int
) -> None:
    """What torch's batch norm does in training; ``count`` values per channel."""
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None:
        return
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the average over all batches
            momentum = 1.0 / norm.num_batches_tracked.to(mean.dtype)
    unbiased = variance * (count / (count - 1))
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        wide = running.to(value.dtype)
        running.copy_(wide * (1 - momentum) + value * momentum)
