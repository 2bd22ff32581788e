"""lstm, lstm_cell and their layers against PyTorch."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fmkernels.functional as FF
import fmkernels.nn as fnn
from fmkernels import testing
from fmkernels.ops.rnn import reference
from fmkernels.ops.rnn.backends import LSTM
from fmkernels.ops.rnn.schema import LSTMOptions

BACKENDS = testing.available_backends(LSTM, torch.zeros(1, 1, 1))
backends = pytest.mark.parametrize("backend", BACKENDS)
native = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native library")
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)

# name: steps, batch, features, hidden, layers, bidirectional, batch_first, biases, hx
PROBLEMS = {
    "plain": (6, 4, 16, 32, 1, False, False, True, True),
    "odd_sizes": (5, 3, 7, 33, 1, False, False, True, True),
    "one_step": (1, 5, 8, 12, 1, False, False, True, True),
    "one_sequence": (9, 1, 10, 17, 1, False, False, True, True),
    "one_feature": (4, 2, 1, 1, 1, False, False, True, True),
    "batch_first": (5, 6, 9, 20, 1, False, True, True, True),
    "bidirectional": (7, 3, 11, 13, 1, True, False, True, True),
    "bidirectional_batch_first": (4, 5, 6, 24, 1, True, True, True, True),
    "no_bias": (5, 4, 8, 16, 1, True, False, False, True),
    "no_hx": (5, 4, 8, 16, 1, False, True, True, False),
    "stacked": (5, 3, 7, 16, 3, False, False, True, True),
    "stacked_bidirectional": (4, 17, 5, 9, 2, True, True, True, True),
    "wide": (3, 33, 40, 65, 1, False, False, True, True),
    "empty_batch": (4, 0, 6, 8, 1, True, False, True, True),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def make_arguments(problem, dtype, layout="contiguous"):
    steps, batch, features, hidden, layers, bidirectional, batch_first, biases, hx = problem
    directions = 2 if bidirectional else 1
    leading = (batch, steps) if batch_first else (steps, batch)
    arguments = {"input": testing.normal(*leading, features, dtype=dtype, layout=layout)}
    if hx:
        arguments["h0"] = testing.normal(layers * directions, batch, hidden, dtype=dtype)
        arguments["c0"] = testing.normal(layers * directions, batch, hidden, dtype=dtype)
    std = hidden**-0.5
    for layer in range(layers):
        width = features if layer == 0 else directions * hidden
        for d in range(directions):
            shapes = [(4 * hidden, width), (4 * hidden, hidden)]
            shapes += [(4 * hidden,)] * (2 if biases else 0)
            for name, shape in zip(("w_ih", "w_hh", "b_ih", "b_hh"), shapes, strict=False):
                arguments[f"{name}_{layer}_{d}"] = testing.normal(*shape, dtype=dtype, std=std)
    return arguments


def functions(problem, backend, dropout=0.0, training=False):
    """``lstm`` on this problem's options, by this package and by PyTorch."""
    _, batch, _, hidden, layers, bidirectional, batch_first, biases, _ = problem
    options = (biases, layers, dropout, training, bidirectional, batch_first)

    def ours(input, h0=None, c0=None, **weights):
        hx = None if h0 is None else (h0, c0)
        return FF.lstm(input, hx, list(weights.values()), *options, backend=backend)

    def torchs(input, h0=None, c0=None, **weights):
        if h0 is None:
            stacked = layers * (2 if bidirectional else 1)
            h0 = c0 = input.new_zeros(stacked, batch, hidden)
        return torch._VF.lstm(input, (h0, c0), list(weights.values()), *options)

    return ours, torchs


# --- the function


@backends
@dtypes
@problems
def test_forward_and_gradients_match_torch(backend, problem, dtype):
    ours, torchs = functions(problem, backend)
    testing.compare(ours, torchs, make_arguments(problem, dtype))


@backends
@dtypes
@problems
def test_forward_without_gradients_matches_torch(backend, problem, dtype):
    ours, torchs = functions(problem, backend)
    testing.compare(ours, torchs, make_arguments(problem, dtype), grad_layout=None)


@backends
@pytest.mark.parametrize("grad_layout", testing.GRADIENT_LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "stacked_bidirectional"])
def test_incoming_gradients_of_any_strides(backend, name, grad_layout):
    ours, torchs = functions(PROBLEMS[name], backend)
    arguments = make_arguments(PROBLEMS[name], torch.float32)
    testing.compare(ours, torchs, arguments, grad_layout=grad_layout)


@backends
@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided", "offset"])
@pytest.mark.parametrize("name", ["plain", "bidirectional_batch_first"])
def test_inputs_of_any_strides(backend, name, layout):
    ours, torchs = functions(PROBLEMS[name], backend)
    arguments = make_arguments(PROBLEMS[name], torch.float32)
    strided = {
        key: testing.in_layout(value, layout) if value.dim() > 1 else value
        for key, value in arguments.items()
    }
    testing.compare(ours, torchs, strided)


@backends
def test_input_transposed_in_time_and_batch(backend):
    problem = PROBLEMS["plain"]
    ours, torchs = functions(problem, backend)
    arguments = make_arguments(problem, torch.float32)
    arguments["input"] = arguments["input"].transpose(0, 1).contiguous().transpose(0, 1)
    testing.compare(ours, torchs, arguments)


@backends
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradient_of_some_outputs(backend, used):
    """The other outputs' gradients arrive as None."""
    problem = PROBLEMS["bidirectional"]
    ours, torchs = functions(problem, backend)

    def some(function):
        return lambda **arguments: tuple(function(**arguments)[i] for i in used)

    testing.compare(some(ours), some(torchs), make_arguments(problem, torch.float32))


@backends
def test_gradients_of_some_arguments(backend):
    problem = PROBLEMS["stacked"]
    ours, torchs = functions(problem, backend)
    arguments = make_arguments(problem, torch.float64)
    everything = testing.run(torchs, arguments)
    for name in arguments:
        leaves = {k: v.clone().requires_grad_(k == name) for k, v in arguments.items()}
        outputs = ours(**leaves)
        (grad,) = torch.autograd.grad(
            outputs, [leaves[name]], [torch.ones_like(o) for o in outputs]
        )
        torch.testing.assert_close(grad, everything[f"grad_{name}"])


@backends
@pytest.mark.parametrize("name", ["odd_sizes", "bidirectional", "no_bias", "stacked"])
def test_gradcheck(backend, name):
    steps, batch, features, hidden, *options = PROBLEMS[name]
    problem = (min(steps, 3), min(batch, 2), 3, 4, *options)
    ours, _ = functions(problem, backend)
    arguments = make_arguments(problem, torch.float64)
    names = list(arguments)
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    assert torch.autograd.gradcheck(
        lambda *tensors: ours(**dict(zip(names, tensors, strict=True))), leaves
    )


@backends
def test_double_backward_is_refused(backend):
    problem = PROBLEMS["plain"]
    ours, _ = functions(problem, backend)
    arguments = make_arguments(problem, torch.float64)
    arguments["input"].requires_grad_()
    (grad,) = torch.autograd.grad(
        ours(**arguments)[0].square().sum(), arguments["input"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@backends
def test_same_inputs_same_bits(backend):
    problem = PROBLEMS["stacked_bidirectional"]
    ours, _ = functions(problem, backend)
    arguments = make_arguments(problem, torch.float32)
    first, second = (testing.run(ours, arguments) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@backends
@dtypes
def test_nan_stays_in_its_sequence(backend, dtype):
    problem = PROBLEMS["plain"]
    ours, torchs = functions(problem, backend)
    arguments = make_arguments(problem, dtype)
    arguments["input"][2, 1, 3] = float("nan")
    testing.compare(ours, torchs, arguments, grad_layout=None)
    output = ours(**arguments)[0]
    assert output[2:, 1].isnan().all() and not output[:2].isnan().any()
    assert not output[:, [0, 2, 3]].isnan().any()


@backends
def test_saturated_gates(backend):
    """Pre-activations of +-1000 must not overflow in exp."""
    problem = PROBLEMS["plain"]
    ours, torchs = functions(problem, backend)
    arguments = make_arguments(problem, torch.float32)
    arguments["input"] = arguments["input"] * 1000
    testing.compare(ours, torchs, arguments)


@backends
def test_long_sequence(backend):
    problem = (300, 2, 5, 8, 1, False, False, True, True)
    ours, torchs = functions(problem, backend)
    testing.compare(ours, torchs, make_arguments(problem, torch.float32))


@backends
@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_draws_the_mask_that_torch_draws(backend, batch_first):
    problem = (5, 4, 6, 8, 3, True, batch_first, True, True)
    ours, torchs = functions(problem, backend, dropout=0.4, training=True)
    arguments = make_arguments(problem, torch.float64)
    results = []
    for function in (ours, torchs):
        torch.manual_seed(3)
        results.append(testing.run(function, arguments))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name])


@backends
def test_unbatched(backend):
    arguments = make_arguments(PROBLEMS["stacked_bidirectional"], torch.float64)
    weights = [v for k, v in arguments.items() if k[0] in "wb"]
    input = arguments["input"][0]
    h0, c0 = arguments["h0"][:, 0], arguments["c0"][:, 0]
    options = (True, 2, 0.0, False, True, True)
    results = FF.lstm(input, (h0, c0), weights, *options, backend=backend)
    hx = (h0.unsqueeze(1), c0.unsqueeze(1))
    expected = torch._VF.lstm(input.unsqueeze(0), hx, weights, *options)
    for result, wanted, dim in zip(results, expected, (0, 1, 1), strict=True):
        torch.testing.assert_close(result, wanted.squeeze(dim))


# --- the cell


def cell_arguments(dtype, batch=5, features=7, hidden=33, biases=("b_ih", "b_hh")):
    std = hidden**-0.5
    return {
        "input": testing.normal(batch, features, dtype=dtype),
        "h": testing.normal(batch, hidden, dtype=dtype),
        "c": testing.normal(batch, hidden, dtype=dtype),
        "w_ih": testing.normal(4 * hidden, features, dtype=dtype, std=std),
        "w_hh": testing.normal(4 * hidden, hidden, dtype=dtype, std=std),
    } | {name: testing.normal(4 * hidden, dtype=dtype, std=std) for name in biases}


def cell_functions(backend):
    def ours(input, h, c, w_ih, w_hh, b_ih=None, b_hh=None):
        return FF.lstm_cell(input, (h, c), w_ih, w_hh, b_ih, b_hh, backend=backend)

    def torchs(input, h, c, w_ih, w_hh, b_ih=None, b_hh=None):
        return torch._VF.lstm_cell(input, (h, c), w_ih, w_hh, b_ih, b_hh)

    return ours, torchs


@backends
@dtypes
@pytest.mark.parametrize("biases", [("b_ih", "b_hh"), ()], ids=["biases", "none"])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_cell_matches_torch(backend, dtype, biases, batch):
    testing.compare(*cell_functions(backend), cell_arguments(dtype, batch, biases=biases))


@backends
@pytest.mark.parametrize("bias", ["b_ih", "b_hh"])
def test_cell_with_one_bias(backend, bias):
    ours, _ = cell_functions(backend)
    arguments = cell_arguments(torch.float64, biases=(bias,))
    both = arguments | {("b_hh" if bias == "b_ih" else "b_ih"): torch.zeros(4 * 33).double()}
    torch.testing.assert_close(ours(**arguments), ours(**both))


@backends
def test_cell_gradcheck(backend):
    ours, _ = cell_functions(backend)
    arguments = cell_arguments(torch.float64, 2, 3, 4)
    leaves = [tensor.requires_grad_() for tensor in arguments.values()]
    assert torch.autograd.gradcheck(ours, leaves)


@backends
@pytest.mark.parametrize("grad_layout", testing.GRADIENT_LAYOUTS)
def test_cell_gradients_of_any_strides(backend, grad_layout):
    arguments = cell_arguments(torch.float32)
    testing.compare(*cell_functions(backend), arguments, grad_layout=grad_layout)


# --- the ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.dtype_name)
@pytest.mark.parametrize("save", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["bidirectional", "batch_first", "no_bias"])
def test_fakes_agree_with_the_reference(name, save, dtype):
    problem = PROBLEMS[name]
    arguments = make_arguments(problem, dtype)
    input, h0, c0 = arguments["input"], arguments["h0"], arguments["c0"]
    weights = [v for k, v in arguments.items() if k[0] in "wb"]
    options = (None,) * 4 + LSTMOptions(problem[7]) + (problem[6],)
    forward = (input, h0, c0, weights, None, *options, False, save)
    real = reference.lstm_forward(*forward)
    assert_same_metadata(torch.ops.fmkernels.lstm_forward, forward, real)
    if not save:
        return
    output, h_n, c_n, _, saved = real
    states = (input, h0, c0, weights, output, saved, *options)
    for needed in ((True, True, True), (False, True, False)):
        backward = (output, h_n, c_n, None, *states, *needed)
        real = reference.lstm_backward(*backward)
        assert_same_metadata(torch.ops.fmkernels.lstm_backward, backward, real)


def assert_same_metadata(op, arguments, real):
    def metadata(values):
        tensors = torch.utils._pytree.tree_leaves(values)
        return [(t.shape, t.stride(), t.dtype) for t in tensors]

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        assert metadata(op(*fakes)) == metadata(real)


# Tracing through AOTAutograd takes a second per call and does not depend on the dtype.
QUICK_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL_CHECKS = (*QUICK_CHECKS, "test_aot_dispatch_dynamic")


@native
@dtypes
@pytest.mark.parametrize("name", ["bidirectional", "batch_first", "no_bias", "empty_batch"])
def test_opcheck(name, dtype):
    problem = PROBLEMS[name]
    arguments = make_arguments(problem, dtype)
    input, h0, c0 = arguments["input"], arguments["h0"], arguments["c0"]
    weights = [v for k, v in arguments.items() if k[0] in "wb"]
    batch_first, biases = problem[6], problem[7]
    thorough = dtype == torch.float32 and name == "bidirectional"
    checks = ALL_CHECKS if thorough else QUICK_CHECKS
    ops = torch.ops.fmkernels
    options = (None,) * 4 + LSTMOptions(biases) + (batch_first,)
    forward = (input, h0, c0, weights, None, *options, False)
    for save in (False, True):
        torch.library.opcheck(ops.lstm_forward.default, (*forward, save), test_utils=checks)
    output, h_n, c_n, _, saved = ops.lstm_forward(*forward, True)
    states = (input, h0, c0, weights, output, saved, *options)
    for needed in ((True, True, True), (False, True, False), (True, False, True)):
        backward = (output, h_n, c_n, None, *states, *needed)
        torch.library.opcheck(ops.lstm_backward.default, backward, test_utils=checks)
    # The size of a packed weight is known to the kernel alone: no static graph can hold it.
    pack = (weights, 2 if problem[5] else 1, biases, False)
    torch.library.opcheck(ops.lstm_pack_weight.default, pack, test_utils=QUICK_CHECKS)


@backends
@pytest.mark.parametrize("batch_first", [False, True])
def test_compiled_function_matches(backend, batch_first):
    # Two steps: tracing unrolls the reference's loop.
    problem = (2, 3, 4, 5, 2, True, batch_first, True, True)
    ours, _ = functions(problem, backend)
    arguments = make_arguments(problem, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    eager, traced = testing.run(ours, arguments), testing.run(compiled, arguments)
    for key in eager:
        torch.testing.assert_close(traced[key], eager[key])


@native
def test_compiled_graph_holds_one_op_per_layer():
    """The loop over time stays inside the kernel."""
    from torch._dynamo.backends.common import aot_autograd

    targets = []

    def count(graph_module, example_inputs):
        targets.extend(str(node.target) for node in graph_module.graph.nodes)
        return graph_module.forward

    problem = PROBLEMS["stacked"]
    ours, _ = functions(problem, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=aot_autograd(fw_compiler=count))
    testing.run(compiled, make_arguments(problem, torch.float32))
    assert sum("lstm_forward" in target for target in targets) == 3
    assert sum("lstm_backward" in target for target in targets) == 3


# --- autocast


@backends
@pytest.mark.parametrize("training", [False, True])
def test_autocast_of_a_sequence(backend, training):
    layer = nn.LSTM(7, 12, 2, bidirectional=True)
    ours = fnn.LSTM.from_torch(layer, backend=backend)
    input = testing.normal(5, 3, 7)
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        (output, state), (wanted, wanted_state) = ours(input), layer(input)
    results = (output, *state)
    for result, other in zip(results, (wanted, *wanted_state), strict=True):
        assert result.dtype == other.dtype == torch.bfloat16
    exact = copy.deepcopy(layer).double()(input.double())[0]
    assert testing.max_error(output, exact) <= 2 * testing.max_error(wanted, exact) + 2**-8
    if training:
        output.sum().backward()
        assert layer.weight_hh_l0.grad.dtype == torch.float32


@backends
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_dtype_of_a_cells_state(backend, state):
    cell = nn.LSTMCell(7, 12)
    ours = fnn.LSTMCell.from_torch(cell, backend=backend)
    input = testing.normal(3, 7, dtype=torch.bfloat16)
    hx = None if state is None else (testing.normal(3, 12, dtype=state),) * 2
    with torch.autocast("cpu", torch.bfloat16):
        results, wanted = ours(input, hx), cell(input, hx)
    for result, other in zip(results, wanted, strict=True):
        assert result.dtype == other.dtype
        torch.testing.assert_close(result, other, rtol=2**-6, atol=2**-6)


# --- the layers

LAYERS = {
    "plain": {},
    "no_bias": {"bias": False},
    "stacked": {"num_layers": 2, "dropout": 0.3},
    "bidirectional": {"bidirectional": True, "batch_first": True},
}
layers = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())


@backends
@layers
def test_layer_is_a_drop_in(backend, options):
    torch.manual_seed(5)
    theirs = nn.LSTM(7, 12, **options).eval()
    torch.manual_seed(5)
    ours = fnn.LSTM(7, 12, **options, backend=backend).eval()
    assert isinstance(ours, nn.LSTM)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    input = testing.normal(4, 3, 7)
    torch.testing.assert_close(ours(input), theirs(input))
    other = fnn.LSTM(7, 12, **options, backend=backend).eval()
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(other(input), theirs(input))
    torch.testing.assert_close(copy.deepcopy(ours)(input), theirs(input))


@backends
@layers
def test_from_torch_shares_parameters(backend, options):
    theirs = nn.LSTM(7, 12, **options).eval()
    ours = fnn.LSTM.from_torch(theirs, backend=backend)
    assert not ours.training
    for (name, mine), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert mine is other, name
    input = testing.normal(4, 3, 7)
    with torch.no_grad():
        theirs.weight_hh_l0.mul_(0.5)
    torch.testing.assert_close(ours(input), theirs(input))


@backends
@layers
def test_training_step_matches_torch(backend, options):
    theirs = nn.LSTM(7, 12, **options).double()
    ours = fnn.LSTM.from_torch(copy.deepcopy(theirs), backend=backend)
    input = testing.normal(4, 3, 7, dtype=torch.float64)
    states = []
    for layer in (theirs, ours):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            output, (h_n, c_n) = layer(input)
            (output.square().mean() + h_n.sum() * 0.1 + c_n.mean()).backward()
            optimizer.step()
        states.append(layer.state_dict())
    for key in states[0]:
        torch.testing.assert_close(states[1][key], states[0][key])


@backends
def test_training_and_evaluation_agree_without_dropout(backend):
    layer = fnn.LSTM(7, 12, 2, bidirectional=True, backend=backend)
    input = testing.normal(4, 3, 7)
    trained = layer.train()(input)[0].detach()
    with torch.no_grad():
        assert torch.equal(layer.eval()(input)[0], trained)


@backends
def test_functional_call_uses_the_given_weights(backend):
    layer = fnn.LSTM(5, 6, backend=backend)
    zeros = {name: torch.zeros_like(value) for name, value in layer.named_parameters()}
    output, _ = torch.func.functional_call(layer, zeros, (testing.normal(3, 2, 5),))
    assert torch.equal(output, torch.zeros_like(output))


@backends
def test_layer_without_batch(backend):
    theirs = nn.LSTM(7, 12, 2, bidirectional=True)
    ours = fnn.LSTM.from_torch(theirs, backend=backend)
    input = testing.normal(4, 7)
    torch.testing.assert_close(ours(input), theirs(input))


@backends
def test_compiled_layer_matches(backend):
    layer = fnn.LSTM(5, 6, bidirectional=True, backend=backend)
    input = testing.normal(2, 2, 5)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        output = compiled(input)[0]
    torch.testing.assert_close(output, layer(input)[0])
    output.sum().backward()
    assert layer.weight_ih_l0.grad is not None


@native
@layers
def test_frozen_layer_matches(options):
    layer = fnn.LSTM(7, 12, **options, backend="cpu").eval()
    input = testing.normal(4, 3, 7)
    with torch.no_grad():
        wanted = layer(input)
        layer._pack()
        torch.testing.assert_close(layer(input), wanted)
        layer.weight_hh_l0.mul_(2.0)
        changed = layer(input)
        layer._unpack()
        torch.testing.assert_close(changed, layer(input))


@backends
def test_cell_layer_is_a_drop_in(backend):
    torch.manual_seed(5)
    theirs = nn.LSTMCell(7, 12)
    torch.manual_seed(5)
    ours = fnn.LSTMCell(7, 12, backend=backend)
    assert isinstance(ours, nn.LSTMCell)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    shared = fnn.LSTMCell.from_torch(theirs, backend=backend)
    assert shared.weight_ih is theirs.weight_ih
    input = testing.normal(3, 7)
    hx = (testing.normal(3, 12), testing.normal(3, 12))
    for layer in (ours, shared):
        torch.testing.assert_close(layer(input), theirs(input))
        torch.testing.assert_close(layer(input, hx), theirs(input, hx))
        torch.testing.assert_close(
            layer(input[0], (hx[0][0], hx[1][0])), theirs(input[0], (hx[0][0], hx[1][0]))
        )


@backends
def test_compiled_cell_layer_matches(backend):
    layer = fnn.LSTMCell(5, 6, backend=backend)
    input = testing.normal(3, 5)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), layer(input))


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of"):
        fnn.LSTM(3, 4, backend="fast")
    with pytest.raises(ValueError, match="backend must be one of"):
        fnn.LSTMCell(3, 4, backend="fast")
