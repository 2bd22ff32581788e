"""Functional interface: the signatures of torch.nn.functional plus keyword-only extras."""

from fmkernels.functional.attention import scaled_dot_product_attention
from fmkernels.functional.conv import conv1d, conv2d, max_pool2d
from fmkernels.functional.linear import linear
from fmkernels.functional.rnn import lstm, lstm_cell

__all__ = [
    "conv1d",
    "conv2d",
    "linear",
    "lstm",
    "lstm_cell",
    "max_pool2d",
    "scaled_dot_product_attention",
]
