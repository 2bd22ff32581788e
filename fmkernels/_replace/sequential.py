"""The forward of a Sequential whose convolutions run as one op, or take a residual.

Frozen convolutions that follow one another, with nothing but fused-away members in between, are
one call of the native library, which keeps what lies between them in the cache
(csrc/cpu/conv_chain.cpp). Which those are is looked up on every call, so members may be exchanged,
unfrozen or given hooks at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fmkernels import nn as fnn
from fmkernels._replace.fused import FusedAway, FusedBatchNorm2d
from fmkernels.ops.conv import quick

_CONVS = (fnn.Conv2d, fnn.ConvBlock2d)
_IDENTITIES = (FusedAway, FusedBatchNorm2d)
# A member and what it is given besides its input; None: nothing.
_Call = tuple[nn.Module, Any]


@dataclass(frozen=True)
class SequentialForward:
    """See above.

    Attributes:
        member: name of the member that takes the residual which the Sequential itself is given;
            None: it is given none.
        names: of all members. Another one after ``member`` would follow the sum instead of
            preceding it.
    """

    member: str | None
    names: tuple[str, ...]

    def __call__(self, module: nn.Sequential, input: Tensor, residual: Any = None) -> Any:
        if residual is not None and tuple(module._modules) != self.names:
            raise RuntimeError(
                f"{type(module).__name__} had the members {', '.join(self.names)} when "
                "fmkernels.replace fused a sum into one of them, and has changed since: undo the "
                "replacement, and replace again"
            )
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or _watched_globally():
            for name, layer in module._modules.items():
                given = residual is not None and name == self.member
                input = layer(input, residual) if given else layer(input)
            return input
        chain: list[_Call] = []
        for layer, given in _flattened(self.calls(module, residual)):
            if type(layer) in _IDENTITIES and not _is_watched(layer):
                continue
            follows = isinstance(layer, _CONVS) and not _is_watched(layer)
            if not follows:
                input, chain = _run(chain, input), []
            chain.append((layer, given))
            if not follows or given is not None:
                input, chain = _run(chain, input), []
        return _run(chain, input)

    def calls(self, module: nn.Sequential, residual: Any) -> Iterator[_Call]:
        """What the Sequential calls, in order."""
        for name, layer in module._modules.items():
            yield layer, residual if name == self.member else None


def forward_of(module: nn.Module) -> SequentialForward | None:
    """The one that ``module`` was given, if any."""
    forward = getattr(type(module), "_fmkernels_forward", None)
    return forward if isinstance(forward, SequentialForward) else None


def is_plain(module: nn.Module) -> bool:
    """Whether calling ``module`` is calling its members, one after the other."""
    forward = forward_of(module)
    plain = (
        type(module).forward is nn.Sequential.forward if forward is None else not forward.member
    )
    return plain and "forward" not in vars(module)


def _flattened(calls: Iterator[_Call]) -> Iterator[_Call]:
    """The same with the calls of Sequentials among them in their place."""
    for layer, given in calls:
        inner = None
        if isinstance(layer, nn.Sequential) and not _is_watched(layer):
            inner = forward_of(layer)
            if inner is None and is_plain(layer):
                inner = SequentialForward(None, ())
        if inner is None:
            yield layer, given
        else:
            yield from _flattened(inner.calls(layer, given))


def _run(chain: list[_Call], input: Any) -> Any:
    """A single call, or convolutions of which the last alone may be given a residual."""
    if len(chain) > 1 and isinstance(input, Tensor):
        residual = chain[-1][1]
        if residual is None or isinstance(residual, Tensor):
            layers = _frozen_layers(chain)
            output = None if layers is None else quick.chain(input, layers, residual)
            if output is not None:
                return output
    for layer, given in chain:
        input = layer(input) if given is None else layer(input, given)
    return input


def _frozen_layers(chain: list[_Call]) -> list[quick.Layer] | None:
    layers = []
    for layer, given in chain:
        frozen = layer.frozen_layer(given is not None)
        if frozen is None:
            return None
        layers.append(frozen)
    return layers


def _is_watched(module: nn.Module) -> bool:
    """Whether a call of ``module``, without a graph, does more than its class's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _watched_globally() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
