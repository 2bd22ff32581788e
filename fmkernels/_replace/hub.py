"""Layers of Hugging Face's transformers: which can be replaced, by what, and their attention.

Nothing here imports transformers: a model made of its layers has. Layers are recognised by name
and form, and then compared: a counterpart must compute what the layer computes on random numbers.
Attention is not exchanged module by module; transformers lets it be registered under a name
(``AttentionInterface``), which a model's configuration then selects.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fmkernels import functional as F
from fmkernels._replace import hub_layers
from fmkernels.ops import _activations

IMPLEMENTATION = "fmkernels"
# Attention that computes what ours does: the weights of "eager" are on request only.
_REPLACEABLE = ("eager", "sdpa")
_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def family_of(module: nn.Module) -> str | None:
    """The family of a transformers layer that has a counterpart here, else None."""
    if uses_interface(module):
        return "attention"
    return "linear" if _kind(module) else None


def counterpart(module: nn.Module, activation: str | None = None) -> nn.Module:
    """The layer to put in the place of one that :func:`family_of` calls linear."""
    kind = _kind(module)
    if kind == "conv1d":
        return hub_layers.Conv1D(module, activation)
    if kind == "rms_norm":
        return hub_layers.RMSNorm(module, _eps(module))
    return hub_layers.GatedMLP(module, activation_of(module.act_fn))


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer of transformers' own kind."""
    return _kind(module) == "conv1d"


def why_kept(module: nn.Module) -> str:
    """Why a layer of the linear family cannot be replaced; empty if it can."""
    if "forward" in vars(module):
        return "its forward is overridden on the instance"
    if any(parameter.is_meta for parameter in module.parameters()):
        return "its weight is on the meta device"
    if not all(parameter.is_floating_point() for parameter in module.parameters()):
        return "its weight is quantized"
    kind = _kind(module)
    if kind == "gated_mlp":
        parts = [module.gate_proj, module.up_proj, module.down_proj]
        if any(type(part) is not nn.Linear for part in parts):
            return "its projections are not plain Linear layers"
        if activation_of(module.act_fn) is None:
            return f"its activation {type(module.act_fn).__name__} is none that is fused"
    return "" if _agrees(module) else "it computes something else than its name says"


def width_of(module: nn.Module) -> int:
    """The number of input features of one of these layers, or of its counterpart."""
    if hasattr(module, "up_proj"):
        return module.up_proj.in_features
    return module.nx if hasattr(module, "nx") else module.weight.numel()


def _kind(module: nn.Module) -> str | None:
    kind = type(module)
    if not kind.__module__.startswith("transformers."):
        return None
    if kind.__name__ == "Conv1D":
        return "conv1d"
    if kind.__name__.endswith("RMSNorm") and set(module._parameters) == {"weight"}:
        return "rms_norm" if _eps(module) is not None and module.weight.dim() == 1 else None
    if set(module._modules) == _GATED and not module._parameters:
        return "gated_mlp"
    return None


def _eps(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return None


@torch.no_grad()
def _agrees(module: nn.Module) -> bool:
    """Whether the counterpart computes what ``module`` does, on a few random rows."""
    parameter = next(module.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rows = torch.randn(3, width_of(module)).to(parameter.device, parameter.dtype)
    expected, actual = type(module).forward(module, rows), counterpart(module)(rows)
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    tolerance = 16 * torch.finfo(expected.dtype).eps
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return bool((expected - actual).abs().max() <= tolerance * scale)


def activation_of(module: nn.Module) -> str | None:
    """The name of the activation that one of transformers' activation modules computes."""
    if type(module).__module__ != "transformers.activations":
        names = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
        return names.get(type(module))
    points = torch.linspace(-16, 16, 321, dtype=torch.float64)
    try:
        values = type(module).forward(module, points)
    except Exception:  # one with parameters, or made for another shape or dtype
        return None
    for name in _activations.NAMES:
        if torch.allclose(values, _activations.apply(name, points), rtol=1e-9, atol=1e-12):
            return name
    return None


# ------------------------------------------------------------------------------------ attention


def uses_interface(module: nn.Module) -> bool:
    """Whether ``module`` looks its attention function up in transformers' registry."""
    kind = type(module)
    if not kind.__module__.startswith("transformers.") or not hasattr(module, "config"):
        return False
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def why_attention_kept(module: nn.Module) -> str:
    """Why the attention of ``module`` cannot be selected by name; empty if it can."""
    current = getattr(module.config, "_attn_implementation", None)
    if current == IMPLEMENTATION:
        return "already an fmkernels layer"
    if current not in (None, *_REPLACEABLE):
        return f"its configuration selects the attention {current!r}"
    if getattr(module.config, "output_attentions", False):
        return "its configuration asks for the attention weights (output_attentions)"
    return ""


class Selection:
    """Selects this package's attention in the configurations of ``modules``, until :meth:`undo`.

    A model and its parts share configuration objects, so all of them change together.
    """

    def __init__(self, model: nn.Module, modules: list[nn.Module]) -> None:
        self._before: list[tuple[Any, Any]] = []
        if not modules:
            return
        _register()
        wanted = {id(module.config) for module in modules}
        holders = [*modules, *model.modules()]
        seen: set[int] = set()
        for holder in holders:
            config = getattr(holder, "config", None)
            if not hasattr(config, "_attn_implementation_internal") or id(config) in seen:
                continue
            # The model builds the masks for the attention that its own configuration selects.
            if id(config) not in wanted and why_attention_kept(holder):
                continue
            seen.add(id(config))
            self._before.append((config, config._attn_implementation_internal))
            config._attn_implementation_internal = IMPLEMENTATION

    def undo(self) -> None:
        for config, before in self._before:
            if config._attn_implementation_internal == IMPLEMENTATION:
                config._attn_implementation_internal = before


def _register() -> None:
    attention = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    masks = sys.modules["transformers.masking_utils"]
    attention.register(IMPLEMENTATION, attention_forward)
    # Masks as for sdpa: bool, or None where causality or nothing at all has to be said.
    masks.ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, masks.sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the signature of transformers' ``AttentionInterface``.

    Args:
        module: the attention layer; its ``is_causal`` counts where the argument is None.
        query: ``(B, Hq, Sq, D)``; key, value: ``(B, Hkv, Sk, D)``, Hkv dividing Hq.
        attention_mask: bool (True: take part) or added to the scores, or None.
        position_bias: added to the scores too.
        softcap, s_aux: as ``softcap`` and ``sinks`` of
            :func:`fmkernels.functional.scaled_dot_product_attention`.

    Returns:
        output ``(B, Sq, Hq, D)``; weights ``(B, Hq, Sq, Sk)`` if ``output_attentions``, or None.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    length, keys = query.size(2), key.size(2)
    causal = bool(is_causal) and attention_mask is None and length > 1
    if causal and keys > length:  # the rest of a static cache is empty
        key, value = key[:, :, :length], value[:, :, :length]
        position_bias = None if position_bias is None else position_bias[..., :length]
        keys = length
    mask = attention_mask
    if position_bias is not None:
        mask = _with_bias(position_bias, mask, causal, length, keys)
        causal = False
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    options = {
        "attn_mask": mask,
        "dropout_p": dropout,
        "is_causal": causal,
        "scale": scaling,
        "enable_gqa": key.size(1) != query.size(1),
        "softcap": softcap,
        "sinks": s_aux,
    }
    if output_attentions:
        output, weights = F.attention_with_weights(query, key, value, **options)
        return output.transpose(1, 2).contiguous(), weights
    output = F.scaled_dot_product_attention(query, key, value, **options)
    return output.transpose(1, 2).contiguous(), None


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool, length: int, keys: int) -> Tensor:
    if causal:
        mask = torch.ones(length, keys, dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    if mask.dtype is torch.bool:
        return bias.masked_fill(~mask, float("-inf"))
    return bias + mask
