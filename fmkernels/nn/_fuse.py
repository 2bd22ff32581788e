"""Runs linear layers with the activation or the sum that follows them in one kernel, where it may.

Fusing skips the call of the modules involved, so it is done only where nobody could tell: the
modules are plain ones and carry no hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from fmkernels.functional.linear import linear
from fmkernels.nn.linear import Linear

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


def fused_linear(
    module: nn.Module,
    input: Tensor,
    activation: ActivationFunction | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(module(input))`` or ``residual + module(input)``, in one kernel where possible.

    It is possible for this package's Linear without hooks. A residual under autocast is added
    apart: the kernel would round it to autocast's dtype, torch adds it in its own.
    """
    name = None if activation is None else activation_name(activation)
    cast = torch.is_autocast_enabled(input.device.type)
    if (
        type(module) is Linear
        and not is_hooked(module)
        and module.activation is None
        and (activation is None or name is not None)
        and (residual is None or not cast)
    ):
        (packed_weight,) = module._packed()
        return linear(
            input,
            module.weight,
            module.bias,
            activation=name,
            residual=residual,
            backend=module.backend,
            packed_weight=packed_weight,
        )
    output = module(input)
    if activation is not None:
        output = activation(output)
    return output if residual is None else residual + output


def shared_linear(module: nn.Module, backend: str | None) -> nn.Module:
    """This package's Linear around a plain torch one's Parameters; anything else as it is."""
    plain = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if type(module) in plain and not is_hooked(module):
        return Linear.from_torch(module, backend=backend)
    return module
