"""Triton kernels on elements that lie more than 2**31 elements apart, in Triton's interpreter.

An offset in 32 bits wraps around there as it would on a GPU. The memory between the elements is
never touched, so that it costs nothing. The kernels of convolutions and linear layers take dense
tensors only; theirs are judged by the compiled code (``huge`` in fmkernels/bench/gpu).
"""

from __future__ import annotations

import mmap

import pytest
import torch

from fmkernels import testing
from fmkernels.ops._triton.support import INTERPRETING
from fmkernels.ops.attention.schema import Options
from fmkernels.ops.rnn.schema import PLAIN_LSTM

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.unchecked,
    pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1"),
]
if INTERPRETING:
    from fmkernels.ops.attention import triton as attention
    from fmkernels.ops.attention import triton_cache
    from fmkernels.ops.rnn import triton as rnn
    from fmkernels.ops.rnn import triton_configs

DTYPE = torch.float16
STRIDE = 2**31 + 16


def far(tensor, dim):
    """The same values with STRIDE elements between the first and the second along a dimension."""
    assert tensor.size(dim) == 2 and tensor.dtype is DTYPE
    strides = [STRIDE if d == dim else s for d, s in enumerate(tensor.stride())]
    memory = mmap.mmap(-1, (STRIDE + tensor.numel()) * DTYPE.itemsize, mmap.MAP_PRIVATE)
    view = torch.frombuffer(memory, dtype=DTYPE).as_strided(tensor.shape, strides)
    return view.copy_(tensor)


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output"])
@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "head"])
def test_attention(name, dim):
    tensors = {n: testing.normal(2, 2, 5, 16, dtype=DTYPE) for n in ("query", "key", "value")}
    tensors["grad_output"] = testing.normal(2, 2, 5, 16, dtype=DTYPE)
    options = Options(scale=0.25, window_right=0)

    def run(query, key, value, grad_output):
        output, lse = attention.sdpa_forward(query, key, value, *options)
        needs = (True, True, True, False, False, False)
        operands = (query, key, value, output, lse, *options, *needs)
        return [output, lse, *attention.sdpa_backward(grad_output, None, *operands)[:3]]

    assert_same(run(**tensors | {name: far(tensors[name], dim)}), run(**tensors))


@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "head"])
def test_attention_with_a_cache(dim):
    query, key, value, *new = (testing.normal(2, 2, n, 16, dtype=DTYPE) for n in (1, 9, 9, 1, 1))
    lengths = torch.tensor([8, 3], dtype=torch.int32)

    def run(key, value):
        triton_cache.kv_cache_append(key, value, *new, lengths, None)
        options = (lengths + 1, None, None, None, -1, 0, 0.25, 0.0)
        return [*triton_cache.sdpa_cached(query, key, value, *options), key, value]

    assert_same(run(far(key, dim), far(value, dim)), run(key, value))


@pytest.mark.parametrize("plan", ["sequence", "steps"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("dim", [0, 1], ids=["step", "sequence"])
def test_recurrent_layers(kind, plan, dim, monkeypatch):
    if plan == "steps":
        for table in triton_configs.SEQUENCE.values():
            monkeypatch.setitem(table, "interpret", {})
    hidden, gates = 6, {"lstm": 4, "gru": 3, "rnn": 1}[kind]
    input, grad = (testing.normal(2, 2, hidden, dtype=DTYPE) for _ in range(2))
    h0, c0 = (testing.normal(1, 2, hidden, dtype=DTYPE) for _ in range(2))
    weights = [testing.normal(gates * hidden, hidden, dtype=DTYPE) for _ in range(2)]
    needs = (True, True, True)

    def run(input, grad):
        if kind == "lstm":
            given = (None, None, None, None, *PLAIN_LSTM._replace(has_biases=False), False)
            output, h_n, c_n, _, saved = rnn.lstm_forward(
                input, h0, c0, weights, None, *given, False, True
            )
            *grads, by_weight = rnn.lstm_backward(
                grad, h0, c0, None, input, h0, c0, weights, output, saved, *given, *needs
            )
            return [output, h_n, c_n, *grads, *by_weight]
        if kind == "gru":
            output, h_n, saved = rnn.gru_forward(
                input, h0, weights, None, None, False, False, True
            )
            operands = (input, h0, weights, output, saved, None, False, False)
            *grads, by_weight = rnn.gru_backward(grad, h0, *operands, *needs)
        else:
            output, h_n = rnn.rnn_forward(input, h0, weights, None, None, "tanh", False, False)
            operands = (input, h0, weights, output, None, "tanh", False, False)
            *grads, by_weight = rnn.rnn_backward(grad, h0, *operands, *needs)
        return [output, h_n, *grads, *by_weight]

    assert_same(run(far(input, dim), far(grad, dim)), run(input, grad))


def test_the_input_of_a_single_step():
    """It is projected by the kernel itself."""
    input, state = (testing.normal(1, 2, 6, dtype=DTYPE) for _ in range(2))
    weights = [testing.normal(6, 6, dtype=DTYPE) for _ in range(2)]
    options = (state, weights, None, None, "tanh", False, False)
    assert_same(rnn.rnn_forward(far(input, 1), *options), rnn.rnn_forward(input, *options))
