"""GRU and RNN layers and all cells against PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fmkernels
import fmkernels.functional as FF
import fmkernels.nn as fnn
from fmkernels import testing
from fmkernels.ops.rnn import reference
from fmkernels.ops.rnn.backends import GRU

BACKENDS = testing.available_backends(GRU, torch.zeros(1, 1, 1))
backends = pytest.mark.parametrize("backend", BACKENDS)
native = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native library")
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)

# name: gates, torch's function, ours
KINDS = {
    "gru": (3, torch._VF.gru, FF.gru, {}),
    "rnn_tanh": (1, torch._VF.rnn_tanh, FF.rnn, {"nonlinearity": "tanh"}),
    "rnn_relu": (1, torch._VF.rnn_relu, FF.rnn, {"nonlinearity": "relu"}),
}
kinds = pytest.mark.parametrize("kind", KINDS)

# name: steps, batch, features, hidden, layers, bidirectional, batch_first, biases, hx
PROBLEMS = {
    "plain": (6, 4, 16, 32, 1, False, False, True, True),
    "odd_sizes": (5, 3, 7, 33, 1, False, False, True, True),
    "one_step": (1, 5, 8, 12, 1, False, False, True, True),
    "one_sequence": (9, 1, 10, 17, 1, False, False, True, True),
    "one_feature": (4, 2, 1, 1, 1, False, False, True, True),
    "bidirectional": (7, 3, 11, 13, 1, True, False, True, True),
    "no_bias": (5, 4, 8, 16, 1, True, False, False, True),
    "no_hx": (5, 4, 8, 16, 1, False, True, True, False),
    "stacked_bidirectional": (4, 17, 5, 9, 2, True, True, True, True),
    "wide": (3, 33, 40, 65, 1, False, False, True, True),
    "wider": (2, 20, 70, 130, 1, False, True, True, True),
    "empty_batch": (4, 0, 6, 8, 1, True, False, True, True),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def make_arguments(kind, problem, dtype):
    gates = KINDS[kind][0]
    steps, batch, features, hidden, layers, bidirectional, batch_first, biases, hx = problem
    directions = 2 if bidirectional else 1
    leading = (batch, steps) if batch_first else (steps, batch)
    arguments = {"input": testing.normal(*leading, features, dtype=dtype)}
    if hx:
        arguments["h0"] = testing.normal(layers * directions, batch, hidden, dtype=dtype)
    std = hidden**-0.5
    for layer in range(layers):
        width = features if layer == 0 else directions * hidden
        for d in range(directions):
            shapes = [(gates * hidden, width), (gates * hidden, hidden)]
            shapes += [(gates * hidden,)] * (2 if biases else 0)
            for name, shape in zip(("w_ih", "w_hh", "b_ih", "b_hh"), shapes, strict=False):
                arguments[f"{name}_{layer}_{d}"] = testing.normal(*shape, dtype=dtype, std=std)
    return arguments


def functions(kind, problem, backend, dropout=0.0, training=False):
    """This problem's layers by this package and by PyTorch."""
    _, theirs, ours, extra = KINDS[kind]
    _, batch, _, hidden, layers, bidirectional, batch_first, biases, _ = problem
    options = (biases, layers, dropout, training, bidirectional, batch_first)

    def run_ours(input, h0=None, **weights):
        return ours(input, h0, list(weights.values()), *options, **extra, backend=backend)

    def run_torchs(input, h0=None, **weights):
        if h0 is None:
            h0 = input.new_zeros(layers * (2 if bidirectional else 1), batch, hidden)
        return theirs(input, h0, list(weights.values()), *options)

    return run_ours, run_torchs


@backends
@dtypes
@kinds
@problems
def test_forward_and_gradients_match_torch(backend, kind, problem, dtype):
    if kind == "rnn_relu" and dtype.itemsize == 2 and problem[3] > 40:
        pytest.skip("among so many units rounding takes one across the kink of relu")
    testing.compare(*functions(kind, problem, backend), make_arguments(kind, problem, dtype))


@backends
@dtypes
@kinds
@pytest.mark.parametrize("name", ["odd_sizes", "one_sequence", "stacked_bidirectional", "wide"])
def test_forward_without_gradients(backend, kind, name, dtype):
    problem = PROBLEMS[name]
    arguments = make_arguments(kind, problem, dtype)
    testing.compare(*functions(kind, problem, backend), arguments, grad_layout=None)


@backends
@kinds
@pytest.mark.parametrize("grad_layout", testing.GRADIENT_LAYOUTS)
def test_incoming_gradients_of_any_strides(backend, kind, grad_layout):
    problem = PROBLEMS["stacked_bidirectional"]
    arguments = make_arguments(kind, problem, torch.float32)
    testing.compare(*functions(kind, problem, backend), arguments, grad_layout=grad_layout)


@backends
@kinds
@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided", "offset"])
def test_operands_of_any_strides(backend, kind, layout):
    problem = PROBLEMS["bidirectional"]
    arguments = {
        key: testing.in_layout(value, layout) if value.dim() > 1 else value
        for key, value in make_arguments(kind, problem, torch.float32).items()
    }
    testing.compare(*functions(kind, problem, backend), arguments)


@backends
@kinds
@pytest.mark.parametrize("name", ["odd_sizes", "bidirectional", "no_bias"])
def test_gradcheck(backend, kind, name):
    _, _, _, _, *options = PROBLEMS[name]
    problem = (3, 2, 3, 4, *options)
    ours, _ = functions(kind, problem, backend)
    arguments = make_arguments(kind, problem, torch.float64)
    names = list(arguments)
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    assert torch.autograd.gradcheck(
        lambda *tensors: ours(**dict(zip(names, tensors, strict=True))), leaves
    )


@backends
@kinds
def test_gradients_of_some_arguments(backend, kind):
    problem = PROBLEMS["stacked_bidirectional"]
    ours, torchs = functions(kind, problem, backend)
    arguments = make_arguments(kind, problem, torch.float64)
    everything = testing.run(torchs, arguments)
    for name in arguments:
        leaves = {k: v.clone().requires_grad_(k == name) for k, v in arguments.items()}
        outputs = ours(**leaves)
        (grad,) = torch.autograd.grad(
            outputs, [leaves[name]], [torch.ones_like(o) for o in outputs]
        )
        torch.testing.assert_close(grad, everything[f"grad_{name}"])


@backends
@kinds
def test_double_backward_is_refused(backend, kind):
    problem = PROBLEMS["plain"]
    ours, _ = functions(kind, problem, backend)
    arguments = make_arguments(kind, problem, torch.float64)
    arguments["input"].requires_grad_()
    (grad,) = torch.autograd.grad(
        ours(**arguments)[0].square().sum(), arguments["input"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@backends
@kinds
def test_nan_and_saturation(backend, kind):
    problem = PROBLEMS["plain"]
    ours, torchs = functions(kind, problem, backend)
    arguments = make_arguments(kind, problem, torch.float32)
    arguments["input"][:, 2] *= 1000
    arguments["input"][2, 1, 3] = float("nan")
    testing.compare(ours, torchs, arguments, grad_layout=None)
    output = ours(**arguments)[0]
    assert output[2:, 1].isnan().all() and not output[:2].isnan().any()


@backends
@kinds
@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_draws_the_mask_that_torch_draws(backend, kind, batch_first):
    problem = (5, 4, 6, 8, 3, True, batch_first, True, True)
    arguments = make_arguments(kind, problem, torch.float64)
    results = []
    for function in functions(kind, problem, backend, dropout=0.4, training=True):
        torch.manual_seed(3)
        results.append(testing.run(function, arguments))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])


# --- layers

LAYERS = {
    "gru": (fnn.GRU, nn.GRU, {}),
    "gru_all": (fnn.GRU, nn.GRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "rnn": (fnn.RNN, nn.RNN, {"nonlinearity": "relu", "bias": False}),
    "rnn_all": (fnn.RNN, nn.RNN, {"num_layers": 2, "bidirectional": True, "dropout": 0.3}),
    "lstm_proj": (fnn.LSTM, nn.LSTM, {"proj_size": 5, "num_layers": 2, "bidirectional": True}),
}
layers = pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())


@pytest.mark.parametrize("backend", [None, "reference"])
@layers
def test_layer_is_a_drop_in(backend, case):
    ours_class, torch_class, options = case
    torch.manual_seed(5)
    theirs = torch_class(7, 12, **options).eval()
    torch.manual_seed(5)
    ours = ours_class(7, 12, **options, backend=backend).eval()
    assert isinstance(ours, torch_class)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    input = testing.normal(4, 3, 7)
    torch.testing.assert_close(ours(input), theirs(input))
    torch.testing.assert_close(ours(input[0]), theirs(input[0]))
    shared = ours_class.from_torch(theirs, backend=backend)
    assert shared.weight_ih_l0 is theirs.weight_ih_l0 and not shared.training
    torch.testing.assert_close(copy.deepcopy(shared)(input), theirs(input))


@layers
def test_replace_exchanges_every_kind(case):
    _, torch_class, options = case
    model = nn.Sequential(torch_class(7, 12, **options)).eval()
    input = testing.normal(4, 3, 7)
    wanted = model(input)
    report = fmkernels.replace(model, example_inputs=input, freeze=True, strict=True)
    assert report.rows[0].status == "replaced" and report.error < 1e-6
    with torch.no_grad():
        torch.testing.assert_close(model(input), wanted)


@layers
def test_packed_sequence_in_a_replaced_model(case):
    _, torch_class, options = case
    model = nn.Sequential(torch_class(7, 12, **options)).eval()
    sequences = [testing.normal(size, 7) for size in (2, 5, 3)]
    packed = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    wanted, wanted_state = model(packed)
    fmkernels.replace(model)
    output, state = model(packed)
    torch.testing.assert_close(output.data, wanted.data)
    torch.testing.assert_close(state, wanted_state)


@backends
@pytest.mark.parametrize("kind", ["gru", "rnn"])
def test_autocast_of_a_sequence(backend, kind):
    ours_class, torch_class, _ = LAYERS[kind]
    theirs = torch_class(7, 12)
    ours = ours_class.from_torch(theirs, backend=backend)
    input = testing.normal(5, 3, 7)
    with torch.autocast("cpu", torch.bfloat16):
        (output, state), (wanted, wanted_state) = ours(input), theirs(input)
    assert output.dtype == wanted.dtype and state.dtype == wanted_state.dtype
    exact = copy.deepcopy(theirs).double()(input.double())[0]
    assert testing.max_error(output, exact) <= 2 * testing.max_error(wanted, exact) + 2**-8
    output.sum().backward()
    assert ours.weight_hh_l0.grad.dtype == torch.float32


# --- cells

CELLS = {
    "gru": (FF.gru_cell, torch._VF.gru_cell, 3),
    "rnn_tanh": (FF.rnn_tanh_cell, torch._VF.rnn_tanh_cell, 1),
    "rnn_relu": (FF.rnn_relu_cell, torch._VF.rnn_relu_cell, 1),
}
cells = pytest.mark.parametrize("kind", CELLS)


def cell_arguments(gates, dtype, batch=5, features=7, hidden=33, biases=("b_ih", "b_hh")):
    std = hidden**-0.5
    return {
        "input": testing.normal(batch, features, dtype=dtype),
        "hx": testing.normal(batch, hidden, dtype=dtype),
        "w_ih": testing.normal(gates * hidden, features, dtype=dtype, std=std),
        "w_hh": testing.normal(gates * hidden, hidden, dtype=dtype, std=std),
    } | {name: testing.normal(gates * hidden, dtype=dtype, std=std) for name in biases}


@backends
@dtypes
@cells
@pytest.mark.parametrize("biases", [("b_ih", "b_hh"), ()], ids=["biases", "none"])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_cell_matches_torch(backend, dtype, kind, biases, batch):
    ours, theirs, gates = CELLS[kind]

    def run(**arguments):
        return ours(**arguments, backend=backend)

    testing.compare(run, theirs, cell_arguments(gates, dtype, batch, biases=biases))


@backends
@cells
def test_cell_gradcheck(backend, kind):
    ours, _, gates = CELLS[kind]
    arguments = cell_arguments(gates, torch.float64, 2, 3, 4)
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    assert torch.autograd.gradcheck(lambda *tensors: ours(*tensors, backend=backend), leaves)


@cells
def test_cell_refuses(kind):
    ours, _, gates = CELLS[kind]
    arguments = cell_arguments(gates, torch.float32, 2, 3, 4)
    for change, error, message in (
        ({"input": torch.randn(1, 2, 3)}, ValueError, "input must have 1 or 2"),
        ({"hx": torch.randn(2, 5)}, ValueError, "hx must have shape"),
        ({"hx": (torch.randn(2, 4),)}, TypeError, "hx must be a Tensor"),
        ({"w_ih": torch.randn(5, 3)}, ValueError, "w_ih must have shape"),
        ({"w_hh": torch.randn(4, 16)}, ValueError, "w_hh must have shape"),
        ({"b_ih": torch.randn(2)}, ValueError, "b_ih must have shape"),
        ({"b_hh": torch.randn(gates * 4).double()}, TypeError, "b_hh must have the dtype"),
    ):
        with pytest.raises(error, match=message):
            ours(**arguments | change)


CELL_LAYERS = {
    "lstm": (fnn.LSTMCell, nn.LSTMCell, {}),
    "gru": (fnn.GRUCell, nn.GRUCell, {"bias": False}),
    "rnn_tanh": (fnn.RNNCell, nn.RNNCell, {}),
    "rnn_relu": (fnn.RNNCell, nn.RNNCell, {"nonlinearity": "relu"}),
}


@pytest.mark.parametrize("case", CELL_LAYERS.values(), ids=CELL_LAYERS.keys())
def test_cell_layer_is_a_drop_in(case):
    ours_class, torch_class, options = case
    torch.manual_seed(5)
    theirs = torch_class(7, 12, **options)
    torch.manual_seed(5)
    ours = ours_class(7, 12, **options)
    assert isinstance(ours, torch_class) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    input, hx = testing.normal(3, 7), testing.normal(3, 12)
    state, row = (hx, hx[0])
    if torch_class is nn.LSTMCell:
        state, row = (hx, hx.flip(0)), (hx[0], hx[1])
    for layer in (ours, ours_class.from_torch(theirs), fmkernels.replace(theirs).model):
        for _ in range(2):
            torch.testing.assert_close(layer(input), theirs(input))
            torch.testing.assert_close(layer(input, state), theirs(input, state))
            torch.testing.assert_close(layer(input[0], row), theirs(input[0], row))
            with torch.no_grad():
                torch.testing.assert_close(layer(input, state), theirs(input, state))
            fmkernels.freeze(layer)


@backends
def test_compiled_cell_layer_matches(backend):
    for kind in (fnn.GRUCell, fnn.RNNCell):
        layer = kind(5, 6, backend=backend)
        input = testing.normal(3, 5)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input), layer(input))


# --- the ops


@pytest.mark.parametrize("name", ["bidirectional", "no_bias", "wide"])
@pytest.mark.parametrize("kind", ["gru", "rnn_tanh"])
def test_fakes_agree_with_the_reference(kind, name):
    problem = PROBLEMS[name]
    arguments = make_arguments(kind, problem, torch.bfloat16)
    input, h0, *weights = arguments.values()
    base = kind.split("_")[0]
    flags = (problem[7], problem[6])
    extra = () if kind == "gru" else ("tanh",)
    save = (True,) if kind == "gru" else ()
    forward = (input, h0, weights, None, None, *extra, *flags, *save)
    results = getattr(reference, f"{base}_forward")(*forward)
    check_fake(f"{base}_forward", forward, results)
    gates = results[2:]
    for needed in ((True, True, True), (False, True, False)):
        backward = (*results[:2], input, h0, weights, results[0], *gates, None, *extra, *flags)
        backward += needed
        check_fake(f"{base}_backward", backward, getattr(reference, f"{base}_backward")(*backward))


def check_fake(op, arguments, results):
    def metadata(values):
        tensors = torch.utils._pytree.tree_leaves(values)
        return [(t.shape, t.stride(), t.dtype) for t in tensors]

    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        fake = getattr(torch.ops.fmkernels, op)(*fakes)
    assert metadata(fake) == metadata(results)
