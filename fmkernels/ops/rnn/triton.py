"""The recurrent ops on Triton kernels: the launchers, with the signatures of reference/.

Before the loop, W_ih x of all steps is one product; the loop is one launch (``*_sequence_*``)
where the recurrent weights fit a multiprocessor, else one launch per step (``*_step_*``); after
it, the gradients of the input and of the weights are products over all steps at once.

The files, from the launchers down ("simple": the GRU and the plain layer, which have one state):

* ``triton_lstm``, ``triton_simple``: launchers; ``triton_layer``: what they share;
* ``triton_configs``: launch configurations, and which sizes the sequence kernels take;
* ``triton_sequence_lstm``, ``triton_sequence_simple``: kernels of whole sequences;
* ``triton_step_lstm``, ``triton_step_simple``: kernels of one step; ``triton_step``: their
  products and tiles;
* ``triton_tiles``, ``triton_math``: device helpers of all kernels.
"""

from __future__ import annotations

from fmkernels.ops.rnn.triton_lstm import lstm_backward, lstm_forward
from fmkernels.ops.rnn.triton_simple import (
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
