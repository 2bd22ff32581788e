"""The recurrent ops on Triton kernels: the launchers, with the signatures of reference/.

Before the loop, W_ih x of all steps is one product; the loop is one launch (``*_sequence_*``)
where the recurrent weights fit a multiprocessor, else one launch per step; after it, the gradients
of the input and of the weights are products over all steps at once.
"""

from __future__ import annotations

from fmkernels.ops.rnn.triton_lstm_layer import lstm_backward, lstm_forward
from fmkernels.ops.rnn.triton_simple_layer import (
    gru_backward,
    gru_forward,
    rnn_backward,
    rnn_forward,
)

__all__ = [
    "gru_backward",
    "gru_forward",
    "lstm_backward",
    "lstm_forward",
    "rnn_backward",
    "rnn_forward",
]
