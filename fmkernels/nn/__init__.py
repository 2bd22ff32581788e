"""Layers: subclasses of the torch.nn classes whose forward is one functional call."""

from fmkernels.nn.attention import MultiheadAttention
from fmkernels.nn.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
)
from fmkernels.nn.conv_block import ConvBlock1d, ConvBlock2d
from fmkernels.nn.feed_forward import FeedForward
from fmkernels.nn.linear import Linear
from fmkernels.nn.norm import LayerNorm, RMSNorm
from fmkernels.nn.rnn import GRU, LSTM, RNN
from fmkernels.nn.rnn_cells import GRUCell, LSTMCell, RNNCell
from fmkernels.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvBlock1d",
    "ConvBlock2d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "FeedForward",
    "GRUCell",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "RNNCell",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
