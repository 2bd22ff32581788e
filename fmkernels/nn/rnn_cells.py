"""LSTMCell, GRUCell and RNNCell: torch.nn's, with one step in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fmkernels._dispatch import check_backend_name
from fmkernels.functional.rnn_cells import gru_cell, lstm_cell, rnn_relu_cell, rnn_tanh_cell
from fmkernels.nn._frozen import Freezable, adopt, parameters_of
from fmkernels.ops.rnn.autograd import pack_weights


class _Cell(Freezable, nn.RNNCellBase):
    """What the three cells share."""

    backend: str | None
    _KIND: str

    def _init_cell(self, backend: str | None) -> None:
        self.backend = None if backend is None else check_backend_name(backend)
        self._init_frozen()

    @classmethod
    def from_torch(cls, module: nn.RNNCellBase, *, backend: str | None = None):
        """A layer that shares ``module``'s Parameters and training flag; its hooks stay behind."""
        options = {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNNCell) else {}
        layer = cls(
            module.input_size,
            module.hidden_size,
            bias=module.bias,
            device="meta",
            backend=backend,
            **options,
        )
        adopt(layer, module)
        return layer

    def _weights(self) -> list[Tensor | None]:
        """Of the inputs, of the state, and their biases or None."""
        return parameters_of(self, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

    def _packing_sources(self) -> list[Tensor]:
        weights = self._weights()
        return weights if self.bias else weights[:2]

    def _compute_packing(self) -> list[Tensor | None]:
        sources = self._packing_sources()
        return [pack_weights(self._KIND, sources, 1, self.bias, False, self.backend)]

    def _step(self, function: Any, input: Tensor, hx: Any) -> Any:
        return function(
            input,
            hx,
            *self._weights(),
            packed_weight=self._packed()[0],
            backend=self.backend,
        )


class LSTMCell(_Cell, nn.LSTMCell):
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

    _KIND = "lstm"

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
        self._init_cell(backend)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`torch.nn.LSTMCell.forward`."""
        return self._step(lstm_cell, input, hx)


class GRUCell(_Cell, nn.GRUCell):
    """:class:`torch.nn.GRUCell` as one kernel: same parameters, state_dict and results.

    Args:
        input_size, hidden_size, bias, device, dtype: as in torch.nn.GRUCell.
        backend: as in :func:`fmkernels.functional.gru_cell`.

    Shape:
        input ``(B, I)`` or ``(I)``; hx None or ``(B, H)`` or ``(H)``; returns h.

    Raises:
        ValueError: unknown backend.
        UnsupportedError: from forward, when the explicit backend cannot serve the call.
    """

    _KIND = "gru"

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
        self._init_cell(backend)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """See :meth:`torch.nn.GRUCell.forward`."""
        return self._step(gru_cell, input, hx)


class RNNCell(_Cell, nn.RNNCell):
    """:class:`torch.nn.RNNCell` as one kernel: same parameters, state_dict and results.

    Args:
        input_size, hidden_size, bias, nonlinearity, device, dtype: as in torch.nn.RNNCell.
        backend: as in :func:`fmkernels.functional.rnn_tanh_cell`.

    Shape:
        As :class:`GRUCell`.

    Raises:
        ValueError: unknown backend or nonlinearity.
        UnsupportedError: from forward, when the explicit backend cannot serve the call.
    """

    _KIND = "rnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        if nonlinearity not in _RNN_CELLS:
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)
        self._init_cell(backend)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """See :meth:`torch.nn.RNNCell.forward`."""
        return self._step(_RNN_CELLS[self.nonlinearity], input, hx)


_RNN_CELLS = {"tanh": rnn_tanh_cell, "relu": rnn_relu_cell}
