"""Weights packed once, for inference: the part that all freezable layers share.

A frozen layer keeps what the kernels read in a layout of their own, as non-persistent buffers, and
the identity of the tensors it was made from: data pointer, version counter, dtype. Each forward
compares them and packs again when one has changed (``load_state_dict``, an in-place update,
``.to(dtype)``). A write that neither moves the data nor bumps the version (``param.data[...] = ``,
a fused optimizer, a NumPy view) goes unnoticed. With ``FMKERNELS_CHECK_FROZEN=1`` set when a layer
is frozen, every call packs and raises on a difference.

While torch.compile traces, the packed tensors are left aside: a graph cannot see a data pointer,
and would keep using a stale weight.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fmkernels._dispatch import current_precision, precision


class Freezable(nn.Module):
    """Mixin for layers whose weights can be packed; put it before the torch.nn class.

    A subclass calls :meth:`_init_frozen` with the names of its buffers at the end of its
    constructor, implements :meth:`_packing_sources` and :meth:`_compute_packing`, and reads
    :meth:`_packed` in ``forward``.
    """

    _frozen_sources: list[tuple] | None
    _frozen_names: tuple[str, ...]
    _checks_each_call: bool
    _packing_precision: str

    def _init_frozen(self, names: Sequence[str] = ("_packed_weight",)) -> None:
        """Declare the buffers that packing fills; the layer starts unfrozen."""
        self._frozen_sources = None
        self._checks_each_call = False
        self._packing_precision = "fast"
        self._frozen_names = tuple(names)
        for name in self._frozen_names:
            self.register_buffer(name, None, persistent=False)

    def _packing_sources(self) -> Sequence[Tensor]:
        """The tensors that the packed ones are made from."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it packs")

    def _compute_packing(self) -> Sequence[Tensor | None]:
        """Freshly packed tensors, one per declared buffer; None where there is nothing to pack."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it packs")

    @property
    def is_frozen(self) -> bool:
        """Whether forward reads packed weights."""
        return self._frozen_sources is not None

    def _pack(self) -> None:
        """Freeze: pack the current weights."""
        # Normal tensors even if the caller is in inference mode: they outlive it.
        with torch.inference_mode(False), torch.no_grad():
            sources = self._source_identity()
            for name, packed in zip(self._frozen_names, self._compute_packing(), strict=True):
                setattr(self, name, packed)
        self._frozen_sources = sources
        self._packing_precision = current_precision()
        # Looked up here: reading the environment on each call would cost more than the comparison.
        self._checks_each_call = os.environ.get("FMKERNELS_CHECK_FROZEN") == "1"

    def _unpack(self) -> None:
        """Unfreeze: drop the packed weights."""
        self._frozen_sources = None
        for name in self._frozen_names:
            setattr(self, name, None)

    def _packed(self) -> tuple[Tensor | None, ...]:
        """The packed tensors, up to date; all None unless frozen."""
        if self._frozen_sources is None or torch.compiler.is_compiling():
            return (None,) * len(self._frozen_names)
        if self._source_identity() != self._frozen_sources:
            with precision(self._packing_precision):
                self._pack()
        elif self._checks_each_call:
            self._check_packed()
        buffers = self._buffers
        return tuple([buffers[name] for name in self._frozen_names])

    def _check_packed(self) -> None:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            precision(self._packing_precision),
        ):
            fresh = self._compute_packing()
        for name, packed in zip(self._frozen_names, fresh, strict=True):
            current = getattr(self, name)
            if not _same(packed, current):
                raise RuntimeError(
                    f"{type(self).__name__} is frozen, and a weight was written without autograd "
                    "noticing (.data, NumPy, a fused optimizer): freeze it again after that"
                )

    def _source_identity(self) -> list[tuple]:
        sources = self._packing_sources()
        try:
            return [(t.data_ptr(), t._version, t.dtype) for t in sources]
        except RuntimeError:
            # Inference tensors have no version counter, and cannot change outside inference mode.
            return [
                (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in sources
            ]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal bit by bit (NaN equals itself), or both None."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def parameters_of(module: nn.Module, names: Sequence[str]) -> list[Tensor | None]:
    """By name; plain ones without the detour by getattr, which takes longer than a look-up."""
    table = module._parameters
    return [table[name] if name in table else getattr(module, name) for name in names]


def children_of(module: nn.Module, names: Sequence[str]) -> list[nn.Module | None]:
    """The same of submodules."""
    table = module._modules
    return [table[name] if name in table else getattr(module, name) for name in names]


def buffers_of(module: nn.Module, names: Sequence[str]) -> list[Tensor | None]:
    """The same of buffers."""
    table = module._buffers
    return [table[name] if name in table else getattr(module, name) for name in names]


def adopt(layer: nn.Module, module: nn.Module) -> None:
    """Make ``layer`` hold ``module``'s very Parameters and buffers, and its training flag.

    Raises:
        ValueError: a parameter of the layer is not a plain parameter of ``module`` (it is
            computed by a parametrization, or the modules do not match).
    """
    for name in layer._parameters:
        if name not in module._parameters:
            raise ValueError(
                f"module has no parameter {name!r} to share (is it parametrized?), got {module!r}"
            )
    layer._parameters.update(module._parameters)
    layer._buffers.update(module._buffers)
    layer.training = module.training
