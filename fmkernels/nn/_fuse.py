"""Runs layers with the activation, dropout or sum that follows them in one kernel, where it may.

Fusing skips the call of the modules involved, so it is done only where nobody could tell: the
modules are plain ones and carry no hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from fmkernels.functional.feed_forward import feed_forward
from fmkernels.functional.linear import linear
from fmkernels.nn._frozen import parameters_of
from fmkernels.nn.linear import Linear
from fmkernels.nn.norm import LayerNorm

ActivationFunction = Callable[[Tensor], Tensor]

_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    TF.relu: "relu",
    torch.relu: "relu",
    TF.gelu: "gelu",
    TF.silu: "silu",
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
}


def activation_name(activation: str | ActivationFunction) -> str | None:
    """The name under which the linear kernel applies ``activation``, or None if it cannot."""
    if isinstance(activation, str):
        return activation
    if isinstance(activation, nn.Module):
        if is_hooked(activation):
            return None
        if type(activation) is nn.ReLU:
            return "relu"
        if type(activation) is nn.GELU:
            return "gelu" if activation.approximate == "none" else "gelu_tanh"
        return "silu" if type(activation) is nn.SiLU else None
    return _ACTIVATION_FUNCTIONS.get(activation)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_inactive(dropout: nn.Module) -> bool:
    """Whether ``dropout`` passes its input on unchanged, and nobody watches it do so."""
    return (
        type(dropout) is nn.Dropout
        and (not dropout.training or dropout.p == 0.0)
        and not is_hooked(dropout)
    )


def dropout_p(dropout: nn.Module) -> float | None:
    """The probability with which ``dropout`` acts now; None if only calling it can tell."""
    if is_inactive(dropout):
        return 0.0
    return dropout.p if type(dropout) is nn.Dropout and not is_hooked(dropout) else None


def _fusable(module: nn.Module, residual: Tensor | None) -> bool:
    """Whether ``module`` is this package's bare Linear, which may take the residual as well.

    Under autocast a residual is added apart: the kernel would round it to autocast's dtype, torch
    adds it in its own.
    """
    return (
        type(module) is Linear
        and not is_hooked(module)
        and module.activation is None
        and (residual is None or not torch.is_autocast_enabled(residual.device.type))
    )


def fused_linear(
    module: nn.Module,
    input: Tensor,
    activation: ActivationFunction | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(module(input))`` or ``residual + module(input)``, in one kernel where possible.

    It is possible for this package's Linear without hooks.
    """
    name = None if activation is None else activation_name(activation)
    if _fusable(module, residual) and (activation is None or name is not None):
        (packed_weight,) = module._packed()
        weight, bias = parameters_of(module, ("weight", "bias"))
        return linear(
            input,
            weight,
            bias,
            activation=name,
            residual=residual,
            backend=module.backend,
            packed_weight=packed_weight,
        )
    output = module(input)
    if activation is not None:
        output = activation(output)
    return output if residual is None else residual + output


def fused_feed_forward(
    input: Tensor,
    linear1: nn.Module,
    activation: ActivationFunction | str,
    dropout: nn.Module,
    linear2: nn.Module,
    residual: Tensor | None,
) -> Tensor:
    """``residual + linear2(dropout(activation(linear1(input))))``, in one op where possible."""
    name, p = activation_name(activation), dropout_p(dropout)
    if (
        _fusable(linear1, None)
        and _fusable(linear2, residual)
        and linear1.backend == linear2.backend
        and name is not None
        and p is not None
    ):
        return feed_forward(
            input,
            *parameters_of(linear1, ("weight", "bias")),
            *parameters_of(linear2, ("weight", "bias")),
            activation=name,
            dropout_p=p,
            residual=residual,
            backend=linear1.backend,
            packed_weights=(*linear1._packed(), *linear2._packed()),
        )
    hidden = fused_linear(linear1, input, activation=activation)
    return fused_linear(linear2, dropout(hidden), residual=residual)


def fused_sum_norm(
    input: Tensor, residual: Tensor, dropout: nn.Module, norm: nn.Module
) -> tuple[Tensor, Tensor]:
    """``norm(s)`` and ``s = residual + dropout(input)``, in one op where possible."""
    p = dropout_p(dropout)
    if type(norm) is LayerNorm and not is_hooked(norm) and p is not None:
        return norm.forward_sum(input, residual, p)
    total = residual + dropout(input)
    return norm(total), total


def shared_linear(module: nn.Module, backend: str | None) -> nn.Module:
    """This package's Linear around a plain torch one's Parameters; anything else as it is."""
    plain = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if type(module) in plain and not is_hooked(module):
        return Linear.from_torch(module, backend=backend)
    return module


def shared_norm(module: nn.Module, backend: str | None) -> nn.Module:
    """This package's LayerNorm around a plain torch one's Parameters; anything else as it is."""
    if type(module) is nn.LayerNorm and not is_hooked(module):
        return LayerNorm.from_torch(module, backend=backend)
    return module
