"""What lstm, lstm_cell, attention and their layers refuse, and that nothing else goes wrong.

Each refusal names the argument. The fuzz tests draw shapes, dtypes and options freely: a call
either gives a result of the right shape or raises one of the three documented kinds of exception.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fmkernels.functional as FF
import fmkernels.nn as fnn
from fmkernels import testing
from fmkernels.ops.attention.backends import SDPA
from fmkernels.ops.attention.schema import Options
from fmkernels.ops.rnn.backends import LSTM

REFUSALS = (TypeError, ValueError, RuntimeError)
RNN_BACKENDS = testing.available_backends(LSTM, torch.zeros(1, 1, 1))
ATTENTION_BACKENDS = testing.available_backends(SDPA, torch.zeros(1, 1, 1, 1), Options())

meta = {"device": "meta"}


def lstm_arguments():
    """Two layers, two directions, 3 features, 4 hidden."""
    weights = []
    for width in (3, 8):
        for _ in range(2):
            weights += [
                torch.randn(16, width),
                torch.randn(16, 4),
                torch.randn(16),
                torch.randn(16),
            ]
    return {
        "input": torch.randn(5, 2, 3),
        "hx": (torch.randn(4, 2, 4), torch.randn(4, 2, 4)),
        "weights": weights,
        "num_layers": 2,
        "bidirectional": True,
    }


def with_weight(index, weight):
    weights = lstm_arguments()["weights"]
    weights[index] = weight
    return weights


STATE = torch.randn(4, 2, 4)

LSTM_REFUSALS = {
    "input_type": ({"input": [1.0]}, TypeError, "input must be a Tensor"),
    "input_dtype": ({"input": torch.ones(5, 2, 3, dtype=torch.int64)}, TypeError, "input must be"),
    "input_sparse": (
        {"input": torch.randn(5, 2, 3).to_sparse()},
        TypeError,
        "input must be a den",
    ),
    "input_rank": ({"input": torch.randn(2, 5, 2, 3)}, ValueError, "input must have 2 or 3"),
    "input_vector": ({"input": torch.randn(3)}, ValueError, "input must have 2 or 3"),
    "input_features": ({"input": torch.randn(5, 2, 6)}, ValueError, r"weights\[0\]"),
    "no_steps": ({"input": torch.randn(0, 2, 3)}, ValueError, "input must have at least one step"),
    "hx_type": ({"hx": STATE}, TypeError, "hx must be None or a tuple"),
    "hx_count": ({"hx": (STATE,)}, TypeError, "hx must be None or a tuple"),
    "hx_shape": ({"hx": (STATE, STATE[:2])}, ValueError, r"hx\[1\] must have shape"),
    "hx_batch": ({"hx": (STATE[:, :1], STATE)}, ValueError, r"hx\[0\] must have shape"),
    "hx_dtype": ({"hx": (STATE, STATE.double())}, TypeError, r"hx\[1\] must have the dtype"),
    "hx_device": ({"hx": (STATE.to("meta"), STATE)}, RuntimeError, r"hx\[0\] must be on"),
    "weights_type": ({"weights": STATE}, ValueError, "weights must be a list of tensors"),
    "weights_count": (
        {"weights": [torch.randn(16, 4)] * 15},
        ValueError,
        "weights must hold 16 tensors",
    ),
    "w_hh_shape": (
        {"weights": with_weight(1, torch.randn(15, 4))},
        ValueError,
        r"weights\[1\] must have shape \(4 \* H, H\)",
    ),
    "w_hh_empty": (
        {"weights": with_weight(1, torch.randn(0, 0))},
        ValueError,
        r"weights\[1\] must not be empty",
    ),
    "w_ih_second_layer": (
        {"weights": with_weight(8, torch.randn(16, 3))},
        ValueError,
        r"weights\[8\] must have shape \(16, 8\)",
    ),
    "bias_shape": (
        {"weights": with_weight(2, torch.randn(4))},
        ValueError,
        r"weights\[2\] must have shape \(16,\)",
    ),
    "weight_none": (
        {"weights": with_weight(3, None)},
        TypeError,
        r"weights\[3\] must be a Tensor",
    ),
    "weight_dtype": (
        {"weights": with_weight(5, torch.randn(16, 4).half())},
        TypeError,
        r"weights\[5\] must have the dtype",
    ),
    "weight_device": (
        {"weights": with_weight(4, torch.empty(16, 3, **meta))},
        RuntimeError,
        r"weights\[4\] must be on the device",
    ),
    "layers": ({"num_layers": 0}, ValueError, "num_layers must be in"),
    "layers_type": ({"num_layers": 2.0}, TypeError, "num_layers must be an int"),
    "layers_huge": ({"num_layers": 2**40}, ValueError, "num_layers must be in"),
    "flag": ({"bidirectional": 1}, TypeError, "bidirectional must be a bool"),
    "dropout": ({"dropout": 1.5}, ValueError, "dropout must be in"),
    "dropout_nan": ({"dropout": float("nan")}, ValueError, "dropout must be in"),
    "dropout_type": ({"dropout": "half"}, TypeError, "dropout must be a number"),
    "packed_count": ({"packed_weights": [None]}, ValueError, "packed_weights must hold"),
    "packed_type": ({"packed_weights": [None, STATE]}, TypeError, r"packed_weights\[1\] must be"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of"),
}


@pytest.mark.parametrize("case", LSTM_REFUSALS.values(), ids=LSTM_REFUSALS.keys())
def test_lstm_refuses(case):
    change, error, message = case
    arguments = lstm_arguments()
    FF.lstm(**arguments)
    with pytest.raises(error, match=message):
        FF.lstm(**arguments | change)


def cell_arguments():
    return {
        "input": torch.randn(2, 3),
        "hx": (torch.randn(2, 4), torch.randn(2, 4)),
        "w_ih": torch.randn(16, 3),
        "w_hh": torch.randn(16, 4),
        "b_ih": torch.randn(16),
        "b_hh": torch.randn(16),
    }


CELL_REFUSALS = {
    "input_rank": ({"input": torch.randn(1, 2, 3)}, ValueError, "input must have 1 or 2"),
    "input_features": ({"input": torch.randn(2, 5)}, ValueError, "w_ih must have shape"),
    "input_bool": ({"input": torch.ones(2, 3) > 0}, TypeError, "input must be"),
    "hx": ({"hx": (torch.randn(2, 4), torch.randn(1, 4))}, ValueError, r"hx\[1\] must have shape"),
    "hx_numbers": ({"hx": (0.0, 0.0)}, TypeError, r"hx\[0\] must be a Tensor"),
    "w_ih": ({"w_ih": torch.randn(12, 3)}, ValueError, "w_ih must have shape"),
    "w_hh": ({"w_hh": torch.randn(4, 16)}, ValueError, "w_hh must have shape"),
    "w_hh_vector": ({"w_hh": torch.randn(16)}, ValueError, "w_hh must have 2 dimensions"),
    "b_ih": ({"b_ih": torch.randn(4, 4)}, ValueError, "b_ih must have shape"),
    "b_hh_device": ({"b_hh": torch.empty(16, **meta)}, RuntimeError, "b_hh must be on the device"),
    "b_hh_dtype": ({"b_hh": torch.randn(16).double()}, TypeError, "b_hh must have the dtype"),
}


@pytest.mark.parametrize("case", CELL_REFUSALS.values(), ids=CELL_REFUSALS.keys())
def test_lstm_cell_refuses(case):
    change, error, message = case
    arguments = cell_arguments()
    FF.lstm_cell(**arguments)
    with pytest.raises(error, match=message):
        FF.lstm_cell(**arguments | change)


def attention_arguments():
    return {
        "query": torch.randn(2, 4, 5, 8),
        "key": torch.randn(2, 4, 7, 8),
        "value": torch.randn(2, 4, 7, 6),
    }


def mask(*shape, dtype=torch.float32):
    return {"attn_mask": torch.zeros(shape, dtype=dtype)}


ATTENTION_REFUSALS = {
    "query_type": ({"query": None}, TypeError, "query must be a Tensor"),
    "query_dtype": ({"query": torch.ones(2, 4, 5, 8).int()}, TypeError, "query must be"),
    "query_vector": ({"query": torch.randn(8)}, ValueError, "query must have at least 2"),
    "key_dtype": ({"key": torch.randn(2, 4, 7, 8).double()}, TypeError, "key must have the dtype"),
    "key_device": ({"key": torch.empty(2, 4, 7, 8, **meta)}, RuntimeError, "key must be on the"),
    "key_width": ({"key": torch.randn(2, 4, 7, 9)}, ValueError, "key must have the query's 8"),
    "value_length": (
        {"value": torch.randn(2, 4, 6, 6)},
        ValueError,
        "value must have the key's 7",
    ),
    "heads": ({"key": torch.randn(2, 2, 7, 8)}, ValueError, "leading dimensions of query, key"),
    "batch": ({"value": torch.randn(3, 4, 7, 6)}, ValueError, "leading dimensions of query, key"),
    "gqa_heads": (
        {"key": torch.randn(2, 3, 7, 8), "enable_gqa": True},
        ValueError,
        "key must have a number of heads that divides",
    ),
    "gqa_no_heads": (
        {"value": torch.randn(2, 0, 7, 6), "enable_gqa": True},
        ValueError,
        "value must have a number of heads that divides",
    ),
    "gqa_rank": (
        {"query": torch.randn(5, 8), "enable_gqa": True},
        ValueError,
        "query must have at least 3",
    ),
    "gqa_batch": (
        {"key": torch.randn(3, 4, 7, 8), "enable_gqa": True},
        ValueError,
        "leading dimensions of query, key",
    ),
    "mask_and_causal": (
        mask(5, 7) | {"is_causal": True},
        ValueError,
        "attn_mask must be None when is_causal",
    ),
    "mask_type": ({"attn_mask": 0.0}, TypeError, "attn_mask must be a Tensor"),
    "mask_dtype": (mask(5, 7, dtype=torch.int64), TypeError, "attn_mask must be bool, float32"),
    "mask_wider": (mask(5, 7, dtype=torch.float64), TypeError, "attn_mask must be bool, float32"),
    "mask_half": (mask(5, 7, dtype=torch.float16), TypeError, "attn_mask must be bool, float32"),
    "mask_shape": (mask(5, 6), ValueError, "attn_mask must have at least 2 dimensions and broad"),
    "mask_heads": (mask(3, 5, 7), ValueError, "attn_mask must have at least 2 dimensions and br"),
    "mask_rank": (mask(7), ValueError, "attn_mask must have at least 2 dimensions and broadcast"),
    "mask_high_rank": (mask(1, 2, 4, 5, 7), ValueError, "attn_mask must have at least 2 dimens"),
    "mask_empty": (mask(0, 7), ValueError, "attn_mask must have at least 2 dimensions and broad"),
    "mask_device": (
        {"attn_mask": torch.empty(5, 7, **meta)},
        RuntimeError,
        "attn_mask must be on the device",
    ),
    "dropout": ({"dropout_p": -0.1}, ValueError, "dropout_p must be in"),
    "dropout_type": ({"dropout_p": None}, TypeError, "dropout_p must be a number"),
    "scale_type": ({"scale": "1"}, TypeError, "scale must be a number"),
    "causal_type": ({"is_causal": None}, TypeError, "is_causal must be a bool"),
    "gqa_type": ({"enable_gqa": 1}, TypeError, "enable_gqa must be a bool"),
    "lse_type": ({"return_lse": 1}, TypeError, "return_lse must be a bool"),
    "backend": ({"backend": "gpu"}, ValueError, "must be one of"),
}


@pytest.mark.parametrize("case", ATTENTION_REFUSALS.values(), ids=ATTENTION_REFUSALS.keys())
def test_attention_refuses(case):
    change, error, message = case
    arguments = attention_arguments()
    FF.scaled_dot_product_attention(**arguments)
    with pytest.raises(error, match=message):
        FF.scaled_dot_product_attention(**arguments | change)


TOKENS = torch.randn(2, 5, 8)

LAYER_REFUSALS = {
    "query_rank": ((TOKENS[None],) * 3, {}, ValueError, "query must have 2 or 3"),
    "query_width": ((TOKENS[..., :6],) * 3, {}, ValueError, "query must have 8 features"),
    "key_rank": ((TOKENS, TOKENS[0], TOKENS), {}, ValueError, "key must have 3 dimensions"),
    "key_batch": ((TOKENS, TOKENS[:1], TOKENS[:1]), {}, ValueError, "key must have the query's"),
    "value_length": ((TOKENS, TOKENS, TOKENS[:, :4]), {}, ValueError, "value must have the key's"),
    "causal_alone": ((TOKENS,) * 3, {"is_causal": True}, ValueError, "attn_mask must be given"),
    "mask_shape": ((TOKENS,) * 3, mask(5, 4), ValueError, "attn_mask must have shape"),
    "mask_heads": ((TOKENS,) * 3, mask(2, 5, 5), ValueError, "attn_mask must have shape"),
    "mask_rank": ((TOKENS,) * 3, mask(5), ValueError, "attn_mask must have 2 or 3 dimensions"),
    "mask_dtype": (
        (TOKENS,) * 3,
        mask(5, 5, dtype=torch.uint8),
        TypeError,
        "attn_mask must be a bool or floating-point tensor",
    ),
    "padding_shape": (
        (TOKENS,) * 3,
        {"key_padding_mask": torch.zeros(5, 2) > 0},
        ValueError,
        "key_padding_mask must have shape",
    ),
    "padding_type": (
        (TOKENS,) * 3,
        {"key_padding_mask": [False] * 5},
        TypeError,
        "key_padding_mask must be a bool or floating-point tensor",
    ),
    "dtype": ((TOKENS.double(),) * 3, {}, TypeError, "weight must have the dtype of input"),
}


@pytest.mark.parametrize("case", LAYER_REFUSALS.values(), ids=LAYER_REFUSALS.keys())
def test_multihead_attention_refuses(case):
    inputs, options, error, message = case
    layer = fnn.MultiheadAttention(8, 2, batch_first=True)
    layer(TOKENS, TOKENS, TOKENS)
    with pytest.raises(error, match=message):
        layer(*inputs, **options)


def test_lstm_layer_refuses():
    layer = fnn.LSTM(3, 4)
    with pytest.raises(ValueError, match="input must have 2 or 3 dimensions"):
        layer(torch.randn(1, 2, 3, 3))
    with pytest.raises(ValueError, match=r"weights\[0\] must have shape"):
        layer(torch.randn(5, 2, 4))
    with pytest.raises(
        TypeError, match=r"weights\[1\] must have|weights\[0\] must have the dtype"
    ):
        layer(torch.randn(5, 2, 3).double())
    with pytest.raises(ValueError, match=r"hx\[0\] must have shape"):
        layer(torch.randn(5, 2, 3), (torch.zeros(1, 4), torch.zeros(1, 4)))


# --- fuzz

sizes = st.integers(0, 4)
dtypes = st.sampled_from(testing.DTYPES)
odd_dtypes = st.one_of(dtypes, st.sampled_from([torch.int64, torch.bool, torch.complex64]))
layouts = st.sampled_from(["contiguous", "transposed", "expanded", "strided", "offset"])


def draw_tensor(draw, shape, dtype, noisy):
    """A tensor of about this shape and dtype; exactly it unless ``noisy``."""
    shape = list(shape)
    if noisy and draw(st.integers(0, 9)) == 0:
        change = draw(st.sampled_from(["size", "drop", "add", "dtype", "device"]))
        if change == "size" and shape:
            shape[draw(st.integers(0, len(shape) - 1))] = draw(sizes)
        elif change == "drop":
            shape = shape[1:]
        elif change == "add":
            shape = [draw(sizes), *shape]
        elif change == "dtype":
            dtype = draw(odd_dtypes)
        else:
            return torch.empty(shape, dtype=dtype, device="meta")
    tensor = torch.ones(shape).to(dtype)
    if len(shape) < 2 or not dtype.is_floating_point:
        return tensor
    return testing.in_layout(tensor, draw(layouts))


def served(backend, dtype):
    """Whether a backend takes a dtype: Triton's kernels of these families have no float64."""
    return backend != "triton" or dtype is not torch.float64


@st.composite
def lstm_calls(draw):
    steps, batch, features, hidden = (draw(sizes) for _ in range(4))
    layers, directions = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    batch_first, biases, noisy = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    dtype = draw(dtypes)

    def tensor(*shape):
        return draw_tensor(draw, shape, dtype, noisy)

    leading = (batch, steps) if batch_first else (steps, batch)
    weights = []
    for layer in range(layers):
        width = features if layer == 0 else directions * hidden
        for _ in range(directions):
            weights += [tensor(4 * hidden, width), tensor(4 * hidden, hidden)]
            weights += [tensor(4 * hidden), tensor(4 * hidden)] if biases else []
    hx = None
    if draw(st.booleans()):
        hx = tuple(tensor(layers * directions, batch, hidden) for _ in range(2))
    call = {
        "input": tensor(*leading, features),
        "hx": hx,
        "weights": weights,
        "has_biases": biases,
        "num_layers": layers,
        "dropout": draw(st.sampled_from([0.0, 0.5, 1.0, -1.0])) if noisy else 0.5,
        "training": draw(st.booleans()),
        "bidirectional": directions == 2,
        "batch_first": batch_first,
    }
    valid = not noisy and steps > 0 and features > 0 and hidden > 0
    state = (layers * directions, batch, hidden)
    return call, valid, ((*leading, directions * hidden), state, state)


@pytest.mark.parametrize("backend", RNN_BACKENDS)
@settings(max_examples=150)
@given(drawn=lstm_calls())
def test_fuzz_lstm(backend, drawn):
    call, valid, shapes = drawn
    valid = valid and served(backend, call["input"].dtype)
    try:
        results = FF.lstm(**call, backend=backend)
    except REFUSALS as error:
        assert not valid, error
        assert str(error)
        return
    if valid:
        assert [tuple(result.shape) for result in results] == list(shapes)
    if call["input"].device.type == "cpu":
        assert all(result.isfinite().all() for result in results)


@st.composite
def attention_calls(draw):
    batch, heads, queries, keys, width, value_width = (draw(sizes) for _ in range(6))
    noisy, dtype = draw(st.booleans()), draw(dtypes)
    shared = heads
    enable_gqa = draw(st.booleans())
    if enable_gqa:
        heads, shared = draw(st.sampled_from([(4, 2), (3, 1), (2, 2)]))

    def tensor(*shape):
        return draw_tensor(draw, shape, dtype, noisy)

    attn_mask, is_causal = None, draw(st.booleans())
    if not is_causal and draw(st.booleans()):
        full = (batch, heads, queries, keys)
        shape = [draw(st.sampled_from([1, size])) for size in full][draw(st.integers(0, 2)) :]
        attn_mask = draw_tensor(draw, shape, draw(st.sampled_from([torch.bool, dtype])), noisy)
    call = {
        "query": tensor(batch, heads, queries, width),
        "key": tensor(batch, shared, keys, width),
        "value": tensor(batch, shared, keys, value_width),
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "enable_gqa": enable_gqa,
        "scale": draw(st.sampled_from([None, 0.5, 2, -1.0])),
    }
    return call, not noisy, (batch, heads, queries, value_width)


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
@settings(max_examples=300)
@given(drawn=attention_calls())
def test_fuzz_attention(backend, drawn):
    call, valid, shape = drawn
    valid = valid and served(backend, call["query"].dtype)
    try:
        output, lse = FF.scaled_dot_product_attention(**call, return_lse=True, backend=backend)
    except REFUSALS as error:
        assert not valid, error
        assert str(error)
        return
    assert tuple(lse.shape) == tuple(output.shape[:-1])
    if valid:
        assert tuple(output.shape) == shape
        # Values are ones, so every query that sees a key gets ones.
        sees = lse != float("-inf")
        torch.testing.assert_close(output, sees.unsqueeze(-1).expand(shape).to(output.dtype))
