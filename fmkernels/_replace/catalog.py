"""Which torch layers have a counterpart here, and which instances of them can be exchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from fmkernels import nn as fnn
from fmkernels._checks import FLOAT_DTYPES
from fmkernels._replace import hub

FAMILIES = ("conv", "rnn", "attention", "linear")

_LAYERS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
    nn.Conv3d: "conv",
    nn.ConvTranspose1d: "conv",
    nn.ConvTranspose2d: "conv",
    nn.ConvTranspose3d: "conv",
    nn.RNN: "rnn",
    nn.LSTM: "rnn",
    nn.GRU: "rnn",
    nn.RNNCell: "rnn",
    nn.LSTMCell: "rnn",
    nn.GRUCell: "rnn",
    nn.MultiheadAttention: "attention",
    nn.TransformerEncoderLayer: "attention",
    nn.TransformerDecoderLayer: "attention",
    nn.Linear: "linear",
    nn.Bilinear: "linear",
    nn.LayerNorm: "linear",
    nn.RMSNorm: "linear",
}
# A subclass of these with a forward of its own is another kind of norm, not a layer to report.
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_QUANTIZED = {kind.__name__: family for kind, family in _LAYERS.items()}

# The parts of a layer that are exchanged with it; its other parts are taken over as they are.
_PARTS = (nn.MultiheadAttention, NonDynamicallyQuantizableLinear, nn.Linear, nn.LayerNorm)

# A subclass may define these and still compute what its base computes; the dunder names that are
# not methods are what Python itself puts into a class.
_HARMLESS = {
    "__init__",
    "__repr__",
    "extra_repr",
    "reset_parameters",
    "__annotate__",
    "__annotate_func__",
    "__annotations__",
    "__annotations_cache__",
    "__constants__",
    "__doc__",
    "__firstlineno__",
    "__module__",
    "__qualname__",
    "__static_attributes__",
}
_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def is_ours(module: nn.Module) -> bool:
    """Whether ``module`` is a layer of this package already (the reference models are not: they
    hold layers)."""
    package = fnn.__name__.split(".")[0]
    return type(module).__module__.startswith((f"{package}.nn.", f"{package}._replace."))


def family_of(module: nn.Module) -> str | None:
    """The family that ``module`` belongs to, replaceable or not; None for all other modules."""
    base = base_of(module)
    if base is not None:
        other_norm = base in _NORMS and type(module).forward is not base.forward
        return None if other_norm and not is_ours(module) else _LAYERS[base]
    if (family := hub.family_of(module)) is not None:
        return family
    if isinstance(module, torch.jit.ScriptModule):
        return _QUANTIZED.get(getattr(module, "original_name", ""))
    if type(module).__module__.startswith(("torch.ao.", "torchao.")):
        return _QUANTIZED.get(type(module).__name__)
    return None


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The torch layer class that ``module`` is an instance of."""
    return next((kind for kind in type(module).__mro__ if kind in _LAYERS), None)


def counterpart_of(base: type[nn.Module]) -> type[nn.Module] | None:
    """This package's layer for a torch layer class, or None."""
    kind = getattr(fnn, base.__name__, None)
    return kind if hasattr(kind, "from_torch") else None


def make(module: nn.Module, **options: Any) -> nn.Module:
    """The layer to put in the place of ``module``; options as of its ``from_torch``."""
    base = base_of(module)
    if base is None:
        return hub.counterpart(module, **options)
    return counterpart_of(base).from_torch(module, **options)


def why_kept(module: nn.Module) -> str:
    """Why ``module``, which belongs to a family, cannot be replaced; empty if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript"
    if type(module).__module__.startswith(("torch.ao.", "torchao.")):
        return "it is quantized, or prepared for quantization"
    if isinstance(module, LazyModuleMixin):
        return "its parameters are not initialised yet: run one batch through the model first"
    if parametrize.is_parametrized(module) and not _takes_parametrizations(module):
        names = ", ".join(module.parametrizations)
        return f"its {names} is computed by a parametrization"
    if type(module) is NonDynamicallyQuantizableLinear:
        return "its MultiheadAttention reads its parameters and never calls it"
    base = base_of(module)
    if base is None:
        reason = hub.why_kept(module)
        return reason or ("it has state_dict hooks" if _has_state_hooks(module) else "")
    if counterpart_of(base) is None:
        return f"fmkernels has no {base.__name__} layer"
    special = "" if parametrize.is_parametrized(module) else _why_special(module, base)
    reason = special or _why_parameters(module)
    if reason:
        return reason
    for path, part in module.named_modules():
        if path and (reason := _why_part(part)):
            return f"its {path}: {reason}"
    return ""


def _takes_parametrizations(module: nn.Module) -> bool:
    """A convolution whose weight is computed (torch.nn.utils.parametrizations) stays so."""
    computed = set(module.parametrizations) <= {"weight", "bias"}
    plain = type(module).__mro__[1] is base_of(module)
    return family_of(module) == "conv" and computed and plain


def _why_special(module: nn.Module, base: type[nn.Module]) -> str:
    if "forward" in vars(module):
        return "its forward is overridden on the instance"
    for kind in type(module).__mro__:
        if kind is base:
            break
        overridden = sorted(set(vars(kind)) - _HARMLESS)
        if overridden:
            return f"its class {kind.__name__} defines {', '.join(overridden)}"
    if any(isinstance(value, Tensor) for value in vars(module).values()):
        return "its weight is computed before each call (weight_norm, spectral_norm or pruning)"
    return "it has state_dict hooks" if _has_state_hooks(module) else ""


def _has_state_hooks(module: nn.Module) -> bool:
    return any(vars(module).get(name) for name in _STATE_HOOKS)


def _why_parameters(module: nn.Module) -> str:
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            return f"its {name} is on the meta device"
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
        if parameter.dtype not in FLOAT_DTYPES:
            return f"its {name} is {str(parameter.dtype).removeprefix('torch.')}"
    return ""


def _why_part(part: nn.Module) -> str:
    """Why a layer of several parts cannot be replaced because of this part."""
    if type(part) not in _PARTS or has_call_hooks(part):
        return ""
    return _why_special(part, type(part)) or _why_parameters(part)


def has_call_hooks(module: nn.Module) -> bool:
    """Whether someone observes or changes what goes in or comes out of ``module``."""
    return any(vars(module).get(name) for name in _CALL_HOOKS)
