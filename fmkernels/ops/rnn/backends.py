"""The backends of the LSTM op, best first."""

from __future__ import annotations

import torch
from torch import Tensor

from fmkernels._dispatch import SUPPORTED, Backend, Support
from fmkernels.ops._native_support import native_cpu_support, native_ops_support
from fmkernels.ops.rnn import reference, schema  # noqa: F401 - schema defines the ops

_NATIVE = native_ops_support("lstm_forward", "lstm_backward", "lstm_pack_weight")


def _cpu_supports(input: Tensor) -> Support:
    return native_cpu_support(input, _NATIVE)


def _reference_supports(input: Tensor) -> Support:
    return SUPPORTED


LSTM = {
    "cpu": Backend(
        supports=_cpu_supports,
        forward=torch.ops.fmkernels.lstm_forward.default,
        backward=torch.ops.fmkernels.lstm_backward.default,
        pack=torch.ops.fmkernels.lstm_pack_weight.default,
    ),
    "reference": Backend(
        supports=_reference_supports,
        forward=reference.lstm_forward,
        backward=reference.lstm_backward,
    ),
}
