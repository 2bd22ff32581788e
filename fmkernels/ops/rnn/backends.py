"""The backends of the recurrent ops, best first.

``supports`` is asked with the input, the names of the extras in schema.py that the call uses, and
for the LSTM its options.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import SUPPORTED, Backend, Support
from fmkernels.ops._native_support import native_cpu_support, native_ops_support
from fmkernels.ops.rnn import reference, schema  # schema defines the ops

_ops = torch.ops.fmkernels


def _cpu(kind: str) -> Backend:
    names = [f"{kind}_{part}" for part in ("forward", "backward", "pack_weight")]
    native = native_ops_support(*names)

    def supports(
        input: Tensor,
        extras: tuple[str, ...] = (),
        options: schema.LSTMOptions = schema.PLAIN_LSTM,
    ) -> Support:
        if extras:
            return Support(False, f"has no {', '.join(extras)} yet")
        if options[1:] != schema.PLAIN_LSTM[1:]:
            return Support(False, "has no variants of the LSTM yet")
        return native_cpu_support(input, native)

    forward, backward, pack = (getattr(_ops, name).default for name in names)
    return Backend(supports=supports, forward=forward, backward=backward, pack=pack)


def _reference_supports(
    input: Tensor, extras: tuple[str, ...] = (), options: schema.LSTMOptions = schema.PLAIN_LSTM
) -> Support:
    return SUPPORTED


LSTM = {
    "cpu": _cpu("lstm"),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.lstm_forward,
        backward=reference.lstm_backward,
    ),
}
GRU = {
    "cpu": _cpu("gru"),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.gru_forward,
        backward=reference.gru_backward,
    ),
}
RNN = {
    "cpu": _cpu("rnn"),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.rnn_forward,
        backward=reference.rnn_backward,
    ),
}
