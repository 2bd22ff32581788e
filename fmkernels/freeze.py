"""Pack the weights of a model's layers once, for inference."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from fmkernels.nn._frozen import Freezable

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def freeze(module: AnyModule) -> AnyModule:
    """Pack the weights of every fmkernels layer in ``module``, so that calls need not.

    >>> model.load_state_dict(torch.load("weights.pt"))
    >>> fmkernels.replace(model.eval())
    >>> fmkernels.freeze(model)

    The parameters stay, and the state_dict does not change. A layer packs again by itself when its
    weight is written in a way that autograd sees: an optimizer step, ``load_state_dict``, an
    in-place operation, ``to``. It cannot see writes through ``param.data``, NumPy or a fused
    optimizer: call ``freeze`` again after those. If ``FMKERNELS_CHECK_FROZEN=1`` is set in the
    environment when a model is frozen, each call compares, and raises RuntimeError where a weight
    is stale.

    Args:
        module: a layer or any module that contains layers. Its mode does not change. Without any
            layer of this package in it a warning is given.

    Returns:
        ``module``.
    """
    found = False
    for layer in _layers(module):
        layer._pack()
        found = True
    if not found:
        warnings.warn(
            f"{type(module).__name__} contains no fmkernels layer to freeze: call "
            "fmkernels.replace on it first",
            stacklevel=2,
        )
    return module


def unfreeze(module: AnyModule) -> AnyModule:
    """Drop the packed weights of every layer in ``module``; the inverse of :func:`freeze`.

    Returns:
        ``module``.
    """
    for layer in _layers(module):
        layer._unpack()
    return module


def _layers(module: nn.Module) -> Iterator[Freezable]:
    return (layer for layer in module.modules() if isinstance(layer, Freezable))
