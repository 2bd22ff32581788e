"""Functional interface: the signatures of torch.nn.functional plus keyword-only extras."""

from fmkernels.functional.attention import (
    AttentionStatistics,
    attention_statistics,
    attention_with_weights,
    scaled_dot_product_attention,
)
from fmkernels.functional.cached_attention import attention_with_kv_cache
from fmkernels.functional.conv import (
    causal_conv1d,
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from fmkernels.functional.feed_forward import feed_forward
from fmkernels.functional.linear import linear
from fmkernels.functional.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fmkernels.functional.packed_attention import varlen_attention
from fmkernels.functional.pool import avg_pool2d, max_pool2d
from fmkernels.functional.rnn import gru, lstm, rnn
from fmkernels.functional.rnn_cells import gru_cell, lstm_cell, rnn_relu_cell, rnn_tanh_cell

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "AttentionStatistics",
    "attention_statistics",
    "attention_with_kv_cache",
    "attention_with_weights",
    "avg_pool2d",
    "causal_conv1d",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "feed_forward",
    "layer_norm",
    "gru",
    "gru_cell",
    "linear",
    "lstm",
    "lstm_cell",
    "max_pool2d",
    "rms_norm",
    "rnn",
    "rnn_relu_cell",
    "rnn_tanh_cell",
    "scaled_dot_product_attention",
    "varlen_attention",
]
