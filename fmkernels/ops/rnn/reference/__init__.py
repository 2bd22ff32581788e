"""The rnn family in plain PyTorch: forward and a hand-written backward, without autograd.

Same signatures as the ops in schema.py, for any device and any floating dtype. Sums, and states
that are not rounded at each step, are carried in float32 for the half precisions and in the
input's own dtype otherwise.
"""

from fmkernels.ops.rnn.reference.gru import gru_backward, gru_forward
from fmkernels.ops.rnn.reference.lstm import lstm_backward, lstm_forward
from fmkernels.ops.rnn.reference.rnn import rnn_backward, rnn_forward

__all__ = [
    "gru_backward",
    "gru_forward",
    "lstm_backward",
    "lstm_forward",
    "rnn_backward",
    "rnn_forward",
]
