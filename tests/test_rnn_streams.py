"""Recurrent layers fed in pieces, from many threads, into memory full of NaN, and compiled."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fmkernels
import fmkernels.nn as fnn
from fmkernels import testing
from fmkernels.ops.rnn.backends import LSTM

BACKENDS = testing.available_backends(LSTM, torch.zeros(1, 1, 1))
native = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native library")
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)

LAYERS = {
    "lstm": (fnn.LSTM, {}),
    "gru": (fnn.GRU, {}),
    "rnn": (fnn.RNN, {}),
    "projection": (fnn.LSTM, {"proj_size": 20}),
    "layer_norm": (fnn.LSTM, {"layer_norm": True, "peephole": True}),
    "zoneout": (fnn.LSTM, {"zoneout": 0.2, "activation": "relu"}),
}
layers = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make(case, features, hidden, dtype=torch.float32):
    torch.manual_seed(0)
    kind, options = case
    return kind(features, hidden, backend=BACKENDS[0], **options).to(dtype).eval()


def first_state(layer, batch, dtype):
    """A cell state in float32 beside half precisions, so that nothing is lost between pieces."""
    if not isinstance(layer, nn.LSTM):
        return torch.zeros(1, batch, layer.hidden_size, dtype=dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    h = torch.zeros(1, batch, layer.proj_size or layer.hidden_size, dtype=dtype)
    return h, torch.zeros(1, batch, layer.hidden_size, dtype=wide)


@dtypes
@layers
@pytest.mark.parametrize("batch", [1, 7, 18])
def test_pieces_equal_the_whole_bit_for_bit(case, batch, dtype, two_threads):
    # 24 units: one thread, or each a slice of the batch. 160: the threads share the units.
    hidden = 160 if batch in (1, 18) and dtype is torch.float32 else 24
    layer = make(case, 9, hidden, dtype)
    input = testing.normal(41, batch, 9, dtype=dtype)
    with torch.no_grad():
        whole, end = layer(input, first_state(layer, batch, dtype))
        state, pieces = first_state(layer, batch, dtype), []
        for piece in input.split([1, 1, 3, 20, 16]):
            output, state = layer(piece, state)
            pieces.append(output)
    assert torch.equal(torch.cat(pieces), whole)
    ends = zip(end, state, strict=True) if isinstance(end, tuple) else [(end, state)]
    for one, two in ends:
        assert one.dtype == two.dtype and torch.equal(one, two)


@layers
def test_a_row_does_not_depend_on_anothers_length(case):
    layer = make(case, 9, 24)
    input = testing.normal(12, 6, 9)
    with torch.no_grad():
        some = layer(input, lengths=torch.tensor([12, 3, 7, 1, 12, 5]))[0]
        alone = layer(input[:7, 2:3])[0]
    torch.testing.assert_close(some[:7, 2:3], alone)


@native
@pytest.mark.parametrize("batch", [1, 20])
def test_threads_do_not_change_bits(batch, two_threads):
    """Sharing the units changes who computes a number, not how."""
    layer = make(LAYERS["lstm"], 160, 160)
    input = testing.normal(30, batch, 160)
    with torch.no_grad():
        first, second = layer(input)[0], layer(input)[0]
    assert torch.equal(first, second)


@native
def test_many_python_threads_at_once(two_threads):
    layer = make(LAYERS["lstm"], 160, 160)
    inputs = [testing.normal(30, 1 + i % 3, 160) for i in range(12)]

    def run(input):
        with torch.no_grad():
            return layer(input)[0]

    wanted = [run(input) for input in inputs]
    with ThreadPoolExecutor(4) as pool:
        for result, expected in zip(pool.map(run, inputs), wanted, strict=True):
            torch.testing.assert_close(result, expected)


@pytest.fixture
def poisoned_memory():
    """Every fresh tensor starts as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@native
@layers
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.dtype_name)
def test_nothing_uninitialised_gets_out(case, with_lengths, dtype, poisoned_memory):
    for batch, hidden in ((5, 27), (3, 40)):
        kind, options = case
        bidirectional = kind(7, hidden, bidirectional=True, **options, backend="cpu").to(dtype)
        input = testing.normal(6, batch, 7, dtype=dtype).requires_grad_()
        lengths = torch.tensor([6, 0, 3, 6, 2][:batch]) if with_lengths else None
        output, state = bidirectional(input, lengths=lengths)
        state = state if isinstance(state, tuple) else (state,)
        loss = output.sum() + sum(s.sum() for s in state)
        grads = torch.autograd.grad(loss, [input, *bidirectional.parameters()])
        for tensor in (output, *state, *grads):
            assert tensor.isfinite().all()


@native
def test_memory_of_inference_does_not_grow_with_time():
    """Nothing is saved: no output but those that the user sees."""
    layer = make(LAYERS["lstm"], 8, 16)
    arguments = (None, None, None, None, *fmkernels.ops.rnn.schema.LSTMOptions(), False)
    with torch.no_grad():
        input = testing.normal(50, 2, 8)
        state = torch.zeros(1, 2, 16)
        results = torch.ops.fmkernels.lstm_forward(
            input, state, state, layer._weights(), None, *arguments, False, False
        )
    assert results[3].numel() == 0 and results[4] == []


@native
@layers
def test_frozen_layer(case):
    layer = make(case, 9, 24)
    input = testing.normal(5, 3, 9)
    with torch.no_grad():
        wanted = layer(input)
        fmkernels.freeze(layer)
        torch.testing.assert_close(layer(input), wanted)
        next(layer.parameters()).mul_(0.5)
        changed = layer(input)
        fmkernels.unfreeze(layer)
        torch.testing.assert_close(changed, layer(input))


@layers
def test_compiled_layer_is_one_graph(case):
    kind, options = case
    layer = kind(5, 24, num_layers=2, bidirectional=True, backend=BACKENDS[0], **options)
    model = nn.Sequential(nn.Linear(5, 5), layer)
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    input = testing.normal(2, 3, 5)
    torch.testing.assert_close(compiled(input)[0], model(input)[0])
    compiled(input)[0].sum().backward()
    assert layer.weight_ih_l0.grad is not None
