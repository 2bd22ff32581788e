"""The activations an epilogue can apply, as plain PyTorch: forward and derivative.

All use torch.nn.functional's default parameters. The derivative functions take the gradient of the
activation's output and the pre-activation; relu alone is differentiated from its output, which
lets the fused ops drop the pre-activation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten

FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
}

_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu6": lambda g, x: _aten.hardtanh_backward(g, x, 0.0, 6.0),
    "leaky_relu": lambda g, x: _aten.leaky_relu_backward(g, x, 0.01, False),
    "elu": lambda g, x: _aten.elu_backward(g, 1.0, 1.0, 1.0, False, x),
    "gelu": lambda g, x: _aten.gelu_backward(g, x),
    "gelu_tanh": lambda g, x: _aten.gelu_backward(g, x, approximate="tanh"),
    "silu": lambda g, x: _aten.silu_backward(g, x),
    "sigmoid": lambda g, x: _aten.sigmoid_backward(g, torch.sigmoid(x)),
    "tanh": lambda g, x: _aten.tanh_backward(g, torch.tanh(x)),
    "hardswish": lambda g, x: _aten.hardswish_backward(g, x),
    # Not aten's: that one multiplies by 1/6 rounded to float32, in float64 too.
    "hardsigmoid": lambda g, x: torch.where((x > -3) & (x < 3), g / 6, 0.0),
    "mish": lambda g, x: _aten.mish_backward(g, x),
}

NAMES = tuple(FORWARD)
CHOICES = (None, *NAMES)


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that values of ``dtype`` are accumulated in: float64 for itself, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def needs_preactivation(activation: str | None) -> bool:
    """Whether the backward reads the pre-activation (rather than nothing, or the output)."""
    return activation not in (None, "relu")


def apply(activation: str | None, x: Tensor) -> Tensor:
    """The activation of ``x``; ``x`` itself for None."""
    return x if activation is None else FORWARD[activation](x)


def apply_backward(
    activation: str | None, grad: Tensor, preactivation: Tensor | None, output: Tensor | None
) -> Tensor:
    """Gradient of the pre-activation, in ``grad``'s dtype, from whichever tensor it needs."""
    if activation is None:
        return grad
    if activation == "relu":
        return _aten.threshold_backward(grad, output.to(grad.dtype), 0)
    return _BACKWARD[activation](grad, preactivation.to(grad.dtype))
