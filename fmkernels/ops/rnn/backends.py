"""The backends of the recurrent ops, best first.

``supports`` is asked with the input, the names of the extras in schema.py that the call uses, the
LSTM's options, the wider of its cell and hidden state (0 for the others), and the sizes of a whole
sequence's recurrence (None for a cell, and for packing).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import SUPPORTED, Backend, Support
from fmkernels.ops._native_support import native_cpu_support, native_ops_support
from fmkernels.ops._triton.support import triton_backend
from fmkernels.ops.rnn import cuda, reference, schema  # schema defines the ops

_ops = torch.ops.fmkernels


def _cpu(kind: str) -> Backend:
    names = [f"{kind}_{part}" for part in ("forward", "backward", "pack_weight")]
    native = native_ops_support(*names)

    def supports(
        input: Tensor,
        extras: tuple[str, ...] = (),
        options: schema.LSTMOptions = schema.PLAIN_LSTM,
        width: int = 0,
        sizes: schema.Sizes | None = None,
    ) -> Support:
        return native_cpu_support(input, native)

    forward, backward, pack = (getattr(_ops, name).default for name in names)
    return Backend(supports=supports, forward=forward, backward=backward, pack=pack)


def _triton(kind: str) -> Backend:
    return triton_backend(
        "fmkernels.ops.rnn.triton", _triton_supports, f"{kind}_forward", f"{kind}_backward"
    )


def _triton_supports(
    input: Tensor,
    extras: tuple[str, ...] = (),
    options: schema.LSTMOptions = schema.PLAIN_LSTM,
    width: int = 0,
    sizes: schema.Sizes | None = None,
) -> Support:
    if input.dtype == torch.float64:
        return Support(False, "runs in float32, bfloat16 and float16; got torch.float64")
    if options.layer_norm or schema.PROJECTION in extras:
        most = _most_resident_features(input)
        if width > most:
            return Support(
                False,
                "layer norm and projections need the recurrent weights on one multiprocessor: up "
                f"to {most} features of {input.dtype}, got {width}",
            )
    return SUPPORTED


def _most_resident_features(input: Tensor) -> int:
    """The widest hidden size in triton_configs.SEQUENCE, which only triton can read."""
    if input.device.type == "cpu":
        return 64  # the interpreter
    widest = 64 if torch.version.hip is not None else 128
    return widest if input.element_size() == 2 else widest // 2


def _cuda(cell: str) -> Backend:
    def supports(
        input: Tensor,
        extras: tuple[str, ...] = (),
        options: schema.LSTMOptions = schema.PLAIN_LSTM,
        width: int = 0,
        sizes: schema.Sizes | None = None,
    ) -> Support:
        if extras and extras != (schema.LENGTHS,):
            return Support(False, f"has no {', '.join(set(extras) - {schema.LENGTHS})}")
        if options[1:] != schema.PLAIN_LSTM[1:]:
            return Support(False, "has no variants of the LSTM")
        return cuda.recurrence_supports(input, cell, sizes)

    return Backend(
        supports=supports,
        forward=getattr(cuda, f"{cell}_forward"),
        backward=getattr(cuda, f"{cell}_backward"),
        yields_to=cuda.recurrence_yields_to,
    )


def _reference_supports(
    input: Tensor,
    extras: tuple[str, ...] = (),
    options: schema.LSTMOptions = schema.PLAIN_LSTM,
    width: int = 0,
    sizes: schema.Sizes | None = None,
) -> Support:
    return SUPPORTED


# Layers and cells on the CPU without options and a graph.
LAYER, STEP = _ops.rnn_inference.default, _ops.rnn_step.default

LSTM = {
    "cpu": _cpu("lstm"),
    "cuda": _cuda("lstm"),
    "triton": _triton("lstm"),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.lstm_forward,
        backward=reference.lstm_backward,
    ),
}
GRU = {
    "cpu": _cpu("gru"),
    "cuda": _cuda("gru"),
    "triton": _triton("gru"),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.gru_forward,
        backward=reference.gru_backward,
    ),
}
RNN = {
    "cpu": _cpu("rnn"),
    "triton": _triton("rnn"),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.rnn_forward,
        backward=reference.rnn_backward,
    ),
}
