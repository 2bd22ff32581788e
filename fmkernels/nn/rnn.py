"""LSTM layers: torch.nn's, with the whole sequence in one kernel per layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fmkernels._dispatch import (
    UnsupportedError,
    check_backend_name,
    current_backend,
    record_decision,
)
from fmkernels.functional.rnn import lstm, lstm_cell
from fmkernels.nn._frozen import Freezable, adopt
from fmkernels.ops.rnn.autograd import pack_lstm_weights
from fmkernels.ops.rnn.backends import LSTM as BACKENDS


class LSTM(Freezable, nn.LSTM):
    """:class:`torch.nn.LSTM`: same constructor, parameters, state_dict, initialisation, results.

    Each layer runs its whole sequence, in both directions, as one op. ``proj_size`` and
    :class:`~torch.nn.utils.rnn.PackedSequence` inputs are left to torch's own LSTM, which
    :func:`fmkernels.last_decisions` shows.

    torch.compile breaks its graph at every ``torch.nn.LSTM``, and at this subclass with it, unless
    ``torch._dynamo.config.allow_rnn`` is set. With it this layer traces as one op per layer; the
    functions in :mod:`fmkernels.functional` trace without.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype: as in torch.nn.LSTM.
        backend: as in :func:`fmkernels.functional.lstm`.

    Shape:
        As torch.nn.LSTM: input ``(T, B, I)``, ``(B, T, I)`` with ``batch_first`` or ``(T, I)``;
        returns ``(output, (h_n, c_n))``.

    Raises:
        ValueError: unknown backend, or a torch.nn.LSTM argument out of range.
        UnsupportedError: from forward, when the explicit backend cannot serve the call.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.backend = None if backend is None else check_backend_name(backend)
        self._init_frozen([f"_packed_weight_l{layer}" for layer in range(num_layers)])

    @classmethod
    def from_torch(cls, module: nn.LSTM, *, backend: str | None = None) -> LSTM:
        """A layer that shares ``module``'s Parameters and training flag; its hooks stay behind."""
        layer = cls(
            module.input_size,
            module.hidden_size,
            module.num_layers,
            module.bias,
            module.batch_first,
            module.dropout,
            module.bidirectional,
            module.proj_size,
            device="meta",
            backend=backend,
        )
        adopt(layer, module)
        # The base class also keeps its parameters in a list, which adopting them does not refresh.
        layer._init_flat_weights()
        return layer

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """See :meth:`torch.nn.LSTM.forward`."""
        if isinstance(input, PackedSequence):
            return self._torch_forward(input, hx, "takes no PackedSequence")
        if self.proj_size > 0:
            return self._torch_forward(input, hx, "has no projection (proj_size > 0)")
        output, h_n, c_n = lstm(
            input,
            hx,
            self._weights(),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            packed_weights=self._packed(),
            backend=self.backend,
        )
        return output, (h_n, c_n)

    def _torch_forward(self, input: Any, hx: Any, reason: str) -> Any:
        requested = self.backend or current_backend()
        if requested != "auto":
            lines = [f"lstm: backend {requested!r} cannot serve this call"]
            lines += [f"  {name}: {reason}" for name in BACKENDS]
            raise UnsupportedError("\n".join(lines))
        record_decision("lstm", "torch", tuple((name, reason) for name in BACKENDS))
        return super().forward(input, hx)

    def _weights(self) -> list[Tensor]:
        # By name and not from the base class's list, which parametrizations and
        # torch.func.functional_call leave stale.
        return [getattr(self, name) for name in self._flat_weights_names]

    def _packing_sources(self) -> list[Tensor]:
        return self._weights()

    def _compute_packing(self) -> list[Tensor | None]:
        if self.proj_size > 0:
            return [None] * self.num_layers
        weights = self._weights()
        per_layer = len(weights) // self.num_layers
        return [
            pack_lstm_weights(
                weights[layer * per_layer : (layer + 1) * per_layer], self.bias, self.backend
            )
            for layer in range(self.num_layers)
        ]


class LSTMCell(nn.LSTMCell):
    """:class:`torch.nn.LSTMCell` as one kernel: same parameters, state_dict and results.

    Args:
        input_size, hidden_size, bias, device, dtype: as in torch.nn.LSTMCell.
        backend: as in :func:`fmkernels.functional.lstm_cell`.

    Shape:
        input ``(B, I)`` or ``(I)``; hx None or a pair of ``(B, H)`` or ``(H)``; returns
        ``(h, c)``.

    Raises:
        ValueError: unknown backend.
        UnsupportedError: from forward, when the explicit backend cannot serve the call.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.backend = None if backend is None else check_backend_name(backend)

    @classmethod
    def from_torch(cls, module: nn.LSTMCell, *, backend: str | None = None) -> LSTMCell:
        """A layer that shares ``module``'s Parameters and training flag; its hooks stay behind."""
        layer = cls(
            module.input_size, module.hidden_size, module.bias, device="meta", backend=backend
        )
        adopt(layer, module)
        return layer

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`torch.nn.LSTMCell.forward`."""
        return lstm_cell(
            input,
            hx,
            self.weight_ih,
            self.weight_hh,
            self.bias_ih,
            self.bias_hh,
            backend=self.backend,
        )
