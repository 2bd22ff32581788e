"""Single steps on weights that are not packed; backward passes whose threads share the units."""

from __future__ import annotations

import pytest
import torch

import fmkernels.functional as FF
import fmkernels.nn as fnn
from fmkernels import _native, testing

pytestmark = pytest.mark.skipif(
    not _native.HAS_NATIVE,
    reason=f"tests native kernels alone, and there is no native library: {_native.NATIVE_ERROR}",
)

CELLS = {
    "lstm": (FF.lstm_cell, torch._VF.lstm_cell, 4),
    "gru": (FF.gru_cell, torch._VF.gru_cell, 3),
    "rnn_tanh": (FF.rnn_tanh_cell, torch._VF.rnn_tanh_cell, 1),
    "rnn_relu": (FF.rnn_relu_cell, torch._VF.rnn_relu_cell, 1),
}
LAYERS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}
threads = pytest.mark.parametrize("threads", [1, 2])


@pytest.fixture
def use_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Up to 4 or 16 rows, as the instruction set has it, are dot products in groups of 1 to 4; more are
# columns of a tile: one vector of them, two, a second panel. Units: within a vector, and a second
# one that is not full.
@threads
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=testing.dtype_name)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 11, 16, 17, 33, 70])
@pytest.mark.parametrize(("features", "hidden"), [(7, 3), (33, 16), (19, 40), (300, 200)])
def test_cell(kind, dtype, batch, features, hidden, threads, use_threads):
    use_threads(threads)
    ours, theirs, gates = CELLS[kind]
    std = hidden**-0.5

    def make(*shape, **options):
        if kind == "rnn_relu":  # sums of integers are exact: no rounding crosses its corner
            return testing.integers(*shape, dtype=dtype, low=-1, high=1)
        return testing.normal(*shape, dtype=dtype, **options)

    arguments = {
        "input": make(batch, features + 2)[:, 1:-1],
        "h": make(batch, hidden),
        "c": make(batch, hidden),
        "w_ih": make(gates * hidden, features, std=std),
        "w_hh": make(gates * hidden, hidden, std=std),
        "b_ih": make(gates * hidden, std=std),
        "b_hh": make(gates * hidden, std=std),
    }
    if kind != "lstm":
        del arguments["c"]

    def run(cell, **options):
        def call(input, h, c=None, **weights):
            state = h if c is None else (h, c)
            return cell(input, state, *weights.values(), **options)

        return call

    testing.compare(run(ours, backend="cpu"), run(theirs), arguments)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
@pytest.mark.parametrize("batch", [0, 1, 7, 20])
@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
def test_cell_without_a_graph(kind, dtype, batch, state, biases):
    """An op of its own, which leaves out the products with a state that is not there."""
    ours, theirs, gates = CELLS[kind]
    features, hidden = 19, 40
    states = [
        testing.normal(batch, hidden, dtype=dtype) for _ in range(2 if kind == "lstm" else 1)
    ]
    arguments = [
        testing.normal(batch, features, dtype=dtype),
        *(states if state else [torch.zeros_like(state) for state in states]),
        testing.normal(gates * hidden, features, dtype=dtype, std=hidden**-0.5),
        testing.normal(gates * hidden, hidden, dtype=dtype, std=hidden**-0.5),
        *(testing.normal(gates * hidden, dtype=dtype, std=hidden**-0.5) for _ in range(2)),
    ]

    def run(cell, absent, input, *operands, **options):
        *hx, w_ih, w_hh, b_ih, b_hh = operands
        hx = None if absent else tuple(hx) if len(hx) == 2 else hx[0]
        results = cell(input, hx, w_ih, w_hh, *((b_ih, b_hh) if biases else ()), **options)
        return results if isinstance(results, tuple) else (results,)

    with torch.no_grad():
        results = run(ours, not state, *arguments, backend="cpu")
        expected = run(theirs, False, *(tensor.double() for tensor in arguments))
        eager = run(theirs, False, *arguments)
    for index, (result, oracle, other) in enumerate(zip(results, expected, eager, strict=True)):
        assert result.dtype == dtype
        testing.assert_within_policy(f"state {index}", result, other, oracle)


@pytest.mark.parametrize("kind", LAYERS)
def test_one_step_of_a_layer(kind):
    """Its backward is a cell's, with every gradient that a layer can receive."""
    torch.manual_seed(0)
    theirs = LAYERS[kind](13, 37)
    ours = getattr(fnn, type(theirs).__name__).from_torch(theirs, backend="cpu")
    arguments = {"input": testing.normal(1, 6, 13), "h": testing.normal(1, 6, 37)}
    if kind == "lstm":
        arguments["c"] = testing.normal(1, 6, 37)
    parameters = dict(theirs.named_parameters())

    def run(layer):
        def call(input, h, c=None, **weights):
            state = h if c is None else (h, c)
            output, final = torch.func.functional_call(layer, weights, (input, state))
            return (output, *final) if isinstance(final, tuple) else (output, final)

        return call

    testing.compare(run(ours), run(theirs), arguments | parameters)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch", [1, 3, 12])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_threads_that_share_units_agree_with_one(kind, batch, with_lengths, use_threads):
    # So many steps and units that even one sequence of a plain RNN is worth sharing.
    layer = getattr(fnn, type(LAYERS[kind](1, 1)).__name__)(50, 264, backend="cpu")
    lengths = (29 + 7 * torch.arange(batch)) % 30 + 1 if with_lengths else None
    input = testing.normal(30, batch, 50)

    def gradients(count):
        use_threads(count)
        leaf = input.clone().requires_grad_()
        output, final = layer(leaf, lengths=lengths)
        finals = final if isinstance(final, tuple) else (final,)
        loss = sum((value * value).sum() for value in (output, *finals))
        return output, *torch.autograd.grad(loss, [leaf, *layer.parameters()])

    for one, two in zip(gradients(1), gradients(2), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5 * one.abs().max().item())


@pytest.mark.parametrize("kind", LAYERS)
def test_bias_gradients_of_many_rows(kind):
    """16384 summands of one sign: in one chain of float32 sums they would be off by some 1e-5."""
    torch.manual_seed(0)
    layer = LAYERS[kind](8, 16).float()
    ours = getattr(fnn, kind.upper()).from_torch(layer)
    x = testing.normal(512, 32, 8, dtype=torch.float32, std=0.1)
    exact = LAYERS[kind](8, 16).double()
    exact.load_state_dict(layer.state_dict())
    for module, values in ((ours, x), (exact, x.double())):
        module(values)[0].sum().backward()
    for name in ("bias_ih_l0", "bias_hh_l0"):
        actual, wanted = getattr(ours, name).grad, getattr(exact, name).grad
        assert (actual - wanted).abs().max() <= 2e-6 * wanted.abs().max()
