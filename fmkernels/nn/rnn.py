"""LSTM, GRU and RNN layers: torch.nn's, with the whole sequence in one kernel per layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fmkernels._dispatch import check_backend_name
from fmkernels.functional.rnn import gru, lstm, lstm_options, rnn
from fmkernels.nn._dynamo import trace_layers
from fmkernels.nn._frozen import Freezable, adopt, parameters_of
from fmkernels.ops.rnn.autograd import pack_weights


class _Sequence(Freezable, nn.RNNBase):
    """What the three layers share; a subclass says how one call of its function looks."""

    backend: str | None
    _KIND: str

    def _init_sequence(self, backend: str | None) -> None:
        self.backend = None if backend is None else check_backend_name(backend)
        self._init_frozen([f"_packed_weight_l{layer}" for layer in range(self.num_layers)])

    @classmethod
    def from_torch(cls, module: nn.RNNBase, *, backend: str | None = None):
        """A layer that shares ``module``'s Parameters and training flag; its hooks stay behind."""
        options = {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
        if isinstance(module, nn.LSTM):
            options["proj_size"] = module.proj_size
        layer = cls(
            module.input_size,
            module.hidden_size,
            module.num_layers,
            bias=module.bias,
            batch_first=module.batch_first,
            dropout=module.dropout,
            bidirectional=module.bidirectional,
            device="meta",
            backend=backend,
            **options,
        )
        adopt(layer, module)
        # The base class also keeps its parameters in a list, which adopting them does not refresh.
        layer._init_flat_weights()
        return layer

    def _run(
        self, input: Tensor, hx: Any, lengths: Tensor | None, batch_first: bool
    ) -> tuple[Tensor, ...]:
        """output, then the final states, then what is shaped like the output."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it runs")

    def _run_any(
        self, input: Tensor | PackedSequence, hx: Any, lengths: Tensor | None
    ) -> tuple[Any, ...]:
        """:meth:`_run` on a tensor, or on the padded sequences of a PackedSequence."""
        if not isinstance(input, PackedSequence):
            return self._run(input, hx, lengths, self.batch_first)
        if lengths is not None:
            raise ValueError("lengths must be None for a PackedSequence, which has its own")
        batch_sizes, order, back = input.batch_sizes, input.sorted_indices, input.unsorted_indices
        padded, lengths = torch._VF._pad_packed_sequence(
            input.data, batch_sizes, False, 0.0, batch_sizes.size(0)
        )
        if hx is not None:
            hx = self.permute_hidden(hx, order)
        results = self._run(padded, hx, lengths, False)

        def packed(values: Tensor) -> PackedSequence:
            data, _ = torch._VF._pack_padded_sequence(values, lengths, False)
            return PackedSequence(data, batch_sizes, order, back)

        states = 2 if self._KIND == "lstm" else 1
        finals = [_permuted(state, back) for state in results[1 : 1 + states]]
        return (packed(results[0]), *finals, *map(packed, results[1 + states :]))

    def _weight_names(self) -> list[str]:
        """Names of all weights in the order of the functions."""
        return self._flat_weights_names

    def _weights(self) -> list[Tensor]:
        # By name and not from the base class's list, which parametrizations and
        # torch.func.functional_call leave stale.
        return parameters_of(self, self._weight_names())

    def _packing_sources(self) -> list[Tensor]:
        return self._weights()

    def _compute_packing(self) -> list[Tensor | None]:
        weights, directions = self._weights(), 2 if self.bidirectional else 1
        count = len(weights) // self.num_layers
        norm = getattr(self, "layer_norm", False)
        return [
            pack_weights(
                self._KIND, weights[layer * count : (layer + 1) * count], directions, self.bias,
                norm, self.backend,
            )
            for layer in range(self.num_layers)
        ]  # fmt: skip


trace_layers(_Sequence)


def _permuted(state: Tensor, order: Tensor | None) -> Tensor:
    return state if order is None else state.index_select(1, order)


class LSTM(_Sequence, nn.LSTM):
    """:class:`torch.nn.LSTM`: same constructor, parameters, state_dict, initialisation, results.

    Each layer runs its whole sequence, in both directions, as one op. The keyword arguments make
    variants of it that keep its speed; :func:`fmkernels.functional.lstm` has their equations.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype: as in torch.nn.LSTM.
        activation: of g and of the cell on its way out: "tanh", "sigmoid", "relu", "hard_sigmoid"
            (``relu6(x + 3) / 6``) or "identity".
        recurrent_activation: of i, f, o; the same names.
        layer_norm: normalise ``W_ih x``, ``W_hh h`` and the cell on its way out (Ba et al. 2016).
            Adds parameters ``norm_ih_l0`` ``(4H)``, ``norm_hh_l0`` ``(4H)``, ``norm_c_l0`` ``(H)``
            and, with ``bias``, ``bias_c_l0`` ``(H)``, and so on for other layers and for the
            ``_reverse`` direction.
        peephole: let i and f see the old cell and o the new one (Gers and Schmidhuber 2000). Adds
            ``weight_peephole_l0`` ``(3, H)``, rows for i, f, o.
        zoneout: probability with which a feature of h and c keeps its old value (Krueger et al.
            2017); outside of training the expected mixture.
        recurrent_dropout: probability of zeroing a feature of h where it meets ``weight_hh``, in
            training, the same for all steps of a sequence (Gal and Ghahramani 2016).
        return_cell_states: forward also returns the last layer's c of all steps.
        backend: as in :func:`fmkernels.functional.lstm`.

    Shape:
        As torch.nn.LSTM: input ``(T, B, I)``, ``(B, T, I)`` with ``batch_first``, ``(T, I)`` or a
        :class:`~torch.nn.utils.rnn.PackedSequence`; returns ``(output, (h_n, c_n))``, and with
        ``return_cell_states`` ``(output, (h_n, c_n), cell_states)`` with cell_states shaped like
        the output (hidden_size features per direction).

    Raises:
        ValueError: unknown backend or activation, or a number out of range.
        UnsupportedError: from forward, when the explicit backend cannot serve the call.
    """

    _KIND = "lstm"

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
        activation: str = "tanh",
        recurrent_activation: str = "sigmoid",
        layer_norm: bool = False,
        peephole: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        return_cell_states: bool = False,
        backend: str | None = None,
    ) -> None:
        lstm_options(bias, peephole, layer_norm, activation, recurrent_activation, zoneout)
        if not 0.0 <= recurrent_dropout <= 1.0:
            raise ValueError(f"recurrent_dropout must be in [0, 1], got {recurrent_dropout}")
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
        self.activation = activation
        self.recurrent_activation = recurrent_activation
        self.layer_norm = layer_norm
        self.peephole = peephole
        self.zoneout = zoneout
        self.recurrent_dropout = recurrent_dropout
        self.return_cell_states = return_cell_states
        self._extra_shapes = _extra_shapes(hidden_size, bias, peephole, layer_norm)
        for suffix in self._suffixes():
            for name, shape in self._extra_shapes.items():
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(f"{name}_{suffix}", parameter)
        self._names = self._ordered_names()
        if self._extra_shapes:
            self._reset_extra()
        self._init_sequence(backend)

    def _suffixes(self) -> list[str]:
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def _ordered_names(self) -> list[str]:
        if not self._extra_shapes:
            return self._flat_weights_names
        suffixes = self._suffixes()
        count = len(self._flat_weights_names) // len(suffixes)
        names = []
        for index, suffix in enumerate(suffixes):
            names += self._flat_weights_names[index * count : (index + 1) * count]
            names += [f"{name}_{suffix}" for name in self._extra_shapes]
        return names

    def _weight_names(self) -> list[str]:
        return self._names

    def reset_parameters(self) -> None:
        """Initialise as torch.nn.LSTM does; gains of norms to one, their biases to zero."""
        super().reset_parameters()
        if getattr(self, "_extra_shapes", None):
            self._reset_extra()

    def _reset_extra(self) -> None:
        bound = self.hidden_size**-0.5
        for suffix in self._suffixes():
            for name in self._extra_shapes:
                parameter = getattr(self, f"{name}_{suffix}")
                if name.startswith("norm"):
                    nn.init.ones_(parameter)
                elif name == "bias_c":
                    nn.init.zeros_(parameter)
                else:
                    nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        """torch's, and the arguments of variants that differ from their defaults."""
        text = super().extra_repr()
        for name, default in _VARIANTS.items():
            value = getattr(self, name)
            if value != default:
                text += f", {name}={value!r}"
        return text

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """See :meth:`torch.nn.LSTM.forward`.

        Args:
            lengths: int64 ``(B)`` on any device: the steps of each sequence, instead of packing.
                Outputs past the end are zero; h_n and c_n are those of each sequence's last step.
        """
        output, h_n, c_n, *cell_states = self._run_any(input, hx, lengths)
        return (output, (h_n, c_n), *cell_states)

    def _run(self, input, hx, lengths, batch_first):
        return lstm(
            input,
            hx,
            self._weights(),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            batch_first,
            lengths=lengths,
            activation=self.activation,
            recurrent_activation=self.recurrent_activation,
            layer_norm=self.layer_norm,
            peephole=self.peephole,
            zoneout=self.zoneout,
            recurrent_dropout=self.recurrent_dropout,
            return_cell_states=self.return_cell_states,
            packed_weights=self._packed(),
            backend=self.backend,
        )


_VARIANTS = {
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "layer_norm": False,
    "peephole": False,
    "zoneout": 0.0,
    "recurrent_dropout": 0.0,
    "return_cell_states": False,
}


def _extra_shapes(
    hidden: int, bias: bool, peephole: bool, layer_norm: bool
) -> dict[str, tuple[int, ...]]:
    """The parameters of a direction that torch.nn.LSTM does not have, in the function's order."""
    shapes: dict[str, tuple[int, ...]] = {}
    if peephole:
        shapes["weight_peephole"] = (3, hidden)
    if layer_norm:
        shapes |= {"norm_ih": (4 * hidden,), "norm_hh": (4 * hidden,), "norm_c": (hidden,)}
        if bias:
            shapes["bias_c"] = (hidden,)
    return shapes


class GRU(_Sequence, nn.GRU):
    """:class:`torch.nn.GRU`: same constructor, parameters, state_dict, initialisation, results.

    Each layer runs its whole sequence, in both directions, as one op.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as in torch.nn.GRU.
        backend: as in :func:`fmkernels.functional.gru`.

    Shape:
        As torch.nn.GRU: input as for :class:`LSTM`; returns ``(output, h_n)``.

    Raises:
        ValueError: unknown backend, or a torch.nn.GRU argument out of range.
        UnsupportedError: from forward, when the explicit backend cannot serve the call.
    """

    _KIND = "gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
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
            device=device,
            dtype=dtype,
        )
        self._init_sequence(backend)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """See :meth:`torch.nn.GRU.forward`; ``lengths`` as in :meth:`LSTM.forward`."""
        return self._run_any(input, hx, lengths)

    def _run(self, input, hx, lengths, batch_first):
        return gru(
            input,
            hx,
            self._weights(),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            batch_first,
            lengths=lengths,
            packed_weights=self._packed(),
            backend=self.backend,
        )


class RNN(_Sequence, nn.RNN):
    """:class:`torch.nn.RNN`: same constructor, parameters, state_dict, initialisation, results.

    Each layer runs its whole sequence, in both directions, as one op.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout,
            bidirectional, device, dtype: as in torch.nn.RNN.
        backend: as in :func:`fmkernels.functional.rnn`.

    Shape:
        As torch.nn.RNN: input as for :class:`LSTM`; returns ``(output, h_n)``.

    Raises:
        ValueError: unknown backend, or a torch.nn.RNN argument out of range.
        UnsupportedError: from forward, when the explicit backend cannot serve the call.
    """

    _KIND = "rnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            nonlinearity,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self._init_sequence(backend)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """See :meth:`torch.nn.RNN.forward`; ``lengths`` as in :meth:`LSTM.forward`."""
        return self._run_any(input, hx, lengths)

    def _run(self, input, hx, lengths, batch_first):
        return rnn(
            input,
            hx,
            self._weights(),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            batch_first,
            nonlinearity=self.nonlinearity,
            lengths=lengths,
            packed_weights=self._packed(),
            backend=self.backend,
        )
