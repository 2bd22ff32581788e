"""Layers: subclasses of the torch.nn classes whose forward is one functional call."""

from fmkernels.nn.attention import MultiheadAttention
from fmkernels.nn.conv import Conv1d, Conv2d, ConvBlock2d
from fmkernels.nn.linear import Linear
from fmkernels.nn.rnn import LSTM, LSTMCell
from fmkernels.nn.transformer import (
    FeedForward,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)

__all__ = [
    "LSTM",
    "Conv1d",
    "Conv2d",
    "ConvBlock2d",
    "FeedForward",
    "LSTMCell",
    "Linear",
    "MultiheadAttention",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
