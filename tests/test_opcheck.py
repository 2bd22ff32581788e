"""torch.library.opcheck of the ops: schema, fakes, registration."""

from __future__ import annotations

import pytest
import torch

from fmkernels import _native, testing
from fmkernels.ops._activations import opmath_dtype
from fmkernels.ops.conv.geometry import ConvOptions
from fmkernels.ops.conv.schema import options_text
from fmkernels.ops.rnn.schema import PLAIN_LSTM

ops = torch.ops.fmkernels
pytestmark = pytest.mark.skipif(
    not _native.HAS_NATIVE, reason="without the native library the ops have no kernel to check"
)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
# The size of a packed weight is known to the kernel alone, so no static graph can hold it.
PACK_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")


def check_inference(op, arguments, expected):
    """The op that returns an output alone; ``expected`` is what the one for training returns."""
    torch.library.opcheck(op.default, arguments)
    assert torch.equal(op(*arguments), expected[0])


@dtypes
@layouts
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("pool", [None, "max"])
def test_conv(dtype, layout, activation, pool):
    input = testing.normal(2, 4, 8, 7, dtype=dtype, layout=layout)
    weight = testing.normal(6, 2, 3, 3, dtype=dtype)
    bias = testing.normal(6, 1, dtype=dtype).flatten()
    scale, shift = (testing.normal(6, 1, dtype=opmath_dtype(dtype)).flatten() for _ in range(2))
    window = (2, 2, 2, 2, 0, 0) if pool else ()
    options = ((1, 1), (1, 1, 1, 1), (1, 1), 2, False, "zeros", activation, pool, window)
    residual = testing.normal(2, 6, 8, 7, dtype=dtype, layout=layout)
    bare = (input, weight, None, None, None, None, None, *options)
    full = (input, weight, bias, scale, shift, residual, None, *options)
    torch.library.opcheck(ops.conv_forward.default, (*bare, False))
    torch.library.opcheck(ops.conv_forward.default, (*full, True))
    text = options_text(ConvOptions(*options))
    check_inference(ops.conv_inference, (*full[:7], text), ops.conv_forward(*full, False))
    output, saved, argmax = ops.conv_forward(*full, True)
    grad = testing.normal(*output.shape, dtype=dtype, layout=layout)
    tensors = (grad, input, weight, bias, scale, output, saved, argmax)
    for needs in (
        (True,) * 6,
        (True, False, False, False, False, False),
        (False, True, True, False, False, True),
    ):
        torch.library.opcheck(ops.conv_backward.default, (*tensors, *options, *needs))


CONV_FORMS = {
    "1d": ((2, 4, 9), (6, 2, 3), ((2,), (1, 2), (1,), 2, False, "reflect", "relu", None, ())),
    "3d": (
        (1, 4, 5, 6, 4),
        (6, 4, 3, 3, 3),
        ((1, 1, 1), (1,) * 6, (1, 1, 1), 1, False, "zeros", "silu", None, ()),
    ),
    "transposed": (
        (2, 4, 5, 6),
        (4, 6, 3, 3),
        ((1, 1), (1, 1, 1, 1), (1, 1), 1, True, "zeros", "relu", "avg", (2, 2, 2, 2, 0, 0)),
    ),
}


@pytest.mark.parametrize(("shape", "weight", "options"), CONV_FORMS.values(), ids=CONV_FORMS)
def test_conv_forms(shape, weight, options):
    input, weight = testing.normal(*shape), testing.normal(*weight)
    bias, scale, shift = (testing.normal(6, 1).flatten() for _ in range(3))
    full = (input, weight, bias, scale, shift, None, None, *options)
    torch.library.opcheck(ops.conv_forward.default, (*full, True))
    text = options_text(ConvOptions(*options))
    check_inference(ops.conv_inference, (*full[:7], text), ops.conv_forward(*full, False))
    output, saved, argmax = ops.conv_forward(*full, True)
    tensors = (torch.randn_like(output), input, weight, bias, scale, output, saved, argmax)
    torch.library.opcheck(ops.conv_backward.default, (*tensors, *options, *(True,) * 6))


@dtypes
@layouts
@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("pool", [None, "max", "avg"])
def test_channel_norm(dtype, layout, groups, pool):
    input = testing.normal(2, 4, 6, 7, dtype=dtype, layout=layout)
    residual = testing.normal(2, 4, 6, 7, dtype=dtype, layout=layout)
    weight, bias = (testing.normal(4, 1, dtype=opmath_dtype(dtype)).flatten() for _ in range(2))
    options = (groups, 1e-5, "relu", pool, (2, 2, 2, 2, 0, 0) if pool else ())
    tensors = (input, weight, bias, residual)
    torch.library.opcheck(ops.channel_norm_forward.default, (*tensors, *options, True))
    output, mean, variance, argmax = ops.channel_norm_forward(*tensors, *options, True)
    grad = testing.normal(*output.shape, dtype=dtype, layout=layout)
    saved = (grad, *tensors, mean, variance, argmax)
    torch.library.opcheck(ops.channel_norm_backward.default, (*saved, *options, *(True,) * 4))


@dtypes
@layouts
def test_conv_statistics(dtype, layout):
    input = testing.normal(2, 4, 8, 7, dtype=dtype, layout=layout)
    weight = testing.normal(6, 2, 3, 3, dtype=dtype)
    bias = testing.normal(6, 1, dtype=dtype).flatten()
    options = ((1, 1), (1, 1, 1, 1), (1, 1), 2, "zeros")
    torch.library.opcheck(ops.conv_statistics.default, (input, weight, bias, None, *options))
    output, mean, variance = ops.conv_statistics(input, weight, None, None, *options)
    norm = (output, None, None, None, 0, 1e-5, "relu", None, (), True, mean, variance)
    torch.library.opcheck(ops.channel_norm_forward.default, norm)


@dtypes
def test_conv_pack_weight(dtype):
    weight = testing.normal(6, 2, 3, 3, dtype=dtype)
    arguments = (weight, (1, 1), (1, 1, 1, 1), (1, 1), 2, False, "zeros")
    torch.library.opcheck(ops.conv_pack_weight.default, arguments, test_utils=PACK_TESTS)


@dtypes
@layouts
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pool2d(dtype, layout, ceil_mode):
    input = testing.normal(2, 5, 9, 8, dtype=dtype, layout=layout)
    options = ((3, 2), (2, 2), (1, 1), (1, 2))
    torch.library.opcheck(ops.max_pool_forward.default, (input, *options, ceil_mode))
    output, argmax = ops.max_pool_forward(input, *options, ceil_mode)
    grad = testing.normal(*output.shape, dtype=dtype, layout=layout)
    arguments = (grad, argmax, input.shape, *options)
    torch.library.opcheck(ops.max_pool_backward.default, arguments)


@dtypes
@layouts
def test_avg_pool(dtype, layout):
    input = testing.normal(2, 5, 9, 8, dtype=dtype, layout=layout)
    options = ((3, 2), (2, 2), (1, 1))
    torch.library.opcheck(ops.avg_pool_forward.default, (input, *options, True, False, None))
    output = ops.avg_pool_forward(input, *options, True, False, None)
    grad = testing.normal(*output.shape, dtype=dtype, layout=layout)
    arguments = (grad, input.shape, *options, False, None)
    torch.library.opcheck(ops.avg_pool_backward.default, arguments)


@dtypes
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_linear(dtype, activation):
    input, weight = testing.normal(2, 3, 7, dtype=dtype), testing.normal(5, 7, dtype=dtype)
    bias, residual = (
        testing.normal(5, 1, dtype=dtype).flatten(),
        testing.normal(2, 3, 5, dtype=dtype),
    )
    full = (input, weight, bias, residual, None, activation)
    torch.library.opcheck(
        ops.linear_forward.default, (input, weight, None, None, None, activation, False)
    )
    torch.library.opcheck(ops.linear_forward.default, (*full, True))
    output, saved = ops.linear_forward(*full, True)
    check_inference(ops.linear_inference, full, (output,))
    tensors = (testing.normal(2, 3, 5, dtype=dtype), input, weight, output, saved, activation)
    for needs in ((True,) * 4, (True, False, False, False), (False, True, True, False)):
        torch.library.opcheck(ops.linear_backward.default, (*tensors, *needs))


@dtypes
def test_linear_pack_weight(dtype):
    arguments = (testing.normal(5, 7, dtype=dtype),)
    torch.library.opcheck(ops.linear_pack_weight.default, arguments, test_utils=PACK_TESTS)


@dtypes
@pytest.mark.parametrize("rms", [False, True])
def test_norm(dtype, rms):
    input, residual, grad, grad_sum = (testing.normal(2, 3, 7, dtype=dtype) for _ in range(4))
    weight, bias = testing.normal(7, dtype=dtype), testing.normal(7, dtype=dtype)
    seed = torch.tensor([3])
    bare = (input, None, None, None, rms, 1e-5, 0.0, None)
    full = (input, residual, weight, bias, rms, 1e-5, 0.5, seed)
    torch.library.opcheck(ops.norm_forward.default, (*bare, False, False))
    torch.library.opcheck(ops.norm_forward.default, (*bare, True, True))
    torch.library.opcheck(ops.norm_forward.default, (*full, False, True))
    torch.library.opcheck(ops.norm_forward.default, (*full, True, False))
    for tensors in (full, bare):
        expected = ops.norm_forward(*tensors[:6], 0.0, None, False, False)
        check_inference(ops.norm_inference, tensors[:6], expected)
    _, total, mean, rstd = ops.norm_forward(*full, True, True)
    tensors = (grad, grad_sum, total, weight, mean, rstd, rms, 0.5, seed)
    for needs in ((True,) * 4, (True, False, False, False), (False, True, True, False)):
        torch.library.opcheck(ops.norm_backward.default, (*tensors, *needs))


@dtypes
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_feed_forward(dtype, gated, activation):
    input, weight1 = testing.normal(2, 3, 7, dtype=dtype), testing.normal(9, 7, dtype=dtype)
    bias1, weight2 = testing.normal(9, dtype=dtype), testing.normal(5, 9, dtype=dtype)
    bias2, residual = testing.normal(5, dtype=dtype), testing.normal(2, 3, 5, dtype=dtype)
    gate = testing.normal(9, 7, dtype=dtype) if gated else None
    gate_bias = testing.normal(9, dtype=dtype) if gated else None
    seed = torch.tensor([3])
    forward = ops.feed_forward_forward.default
    bare = (input, weight1, None, gate, None, weight2, None, None, None, None, activation)
    full = (
        *(input, weight1, bias1, gate, gate_bias, weight2, bias2, residual, None, None),
        *(activation, 0.5, seed),
    )
    torch.library.opcheck(forward, (*bare, 0.0, None, False))
    torch.library.opcheck(forward, (*full, True))
    for tensors in (full, bare):
        expected = forward(*tensors[:11], 0.0, None, False)
        check_inference(ops.feed_forward_inference, tensors[:11], expected)
    output, *saved = forward(*full, True)
    grad = testing.normal(*output.shape, dtype=dtype)
    tensors = (grad, input, weight1, gate, weight2, *saved, activation, 0.5, seed)
    alone = (False,) * 6
    for needs in (
        (True, True, True, gated, gated, True, True),
        (True, *alone),
        (*alone, True),
    ):
        torch.library.opcheck(ops.feed_forward_backward.default, (*tensors, *needs))


@dtypes
def test_feed_forward_pack_weight(dtype):
    weight, gate = testing.normal(5, 7, dtype=dtype), testing.normal(5, 7, dtype=dtype)
    for arguments in ((weight, None), (weight, gate)):
        torch.library.opcheck(
            ops.feed_forward_pack_weight.default, arguments, test_utils=PACK_TESTS
        )


def _recurrent_operands(gates, dtype, directions, batch_first):
    """input of T = 3, B = 2, I = 5; h0 of H = 6; the weights of all directions."""
    input = testing.normal(*((2, 3) if batch_first else (3, 2)), 5, dtype=dtype)
    weights = []
    for _ in range(directions):
        weights += [testing.normal(gates * 6, width, dtype=dtype) for width in (5, 6)]
        weights += [testing.normal(gates * 6, 1, dtype=dtype).flatten() for _ in range(2)]
    return input, testing.normal(directions, 2, 6, dtype=dtype), weights


NEEDS = ((True,) * 3, (True, False, False), (False, True, True))
ALL_TESTS = (*PACK_TESTS, "test_aot_dispatch_dynamic")
# What is saved for padded steps is whatever was there: AOTAutograd would compare it.
WITHOUT_VALUES = PACK_TESTS
recurrent_forms = pytest.mark.parametrize(
    ("directions", "batch_first", "lengths"),
    [(1, False, None), (2, True, None), (2, False, torch.tensor([3, 1]))],
    ids=["one way", "two ways, batch first", "lengths"],
)


# tests/test_rnn.py checks the LSTM's ops.
@dtypes
@recurrent_forms
def test_gru(dtype, directions, batch_first, lengths):
    input, h0, weights = _recurrent_operands(3, dtype, directions, batch_first)
    options = (lengths, True, batch_first)
    for save in (False, True):
        arguments = (input, h0, weights, None, *options, save)
        checks = WITHOUT_VALUES if save and lengths is not None else ALL_TESTS
        torch.library.opcheck(ops.gru_forward.default, arguments, test_utils=checks)
    output, h_n, gates = ops.gru_forward(input, h0, weights, None, *options, True)
    grads = [torch.randn_like(result) for result in (output, h_n)]
    backward = (*grads, input, h0, weights, output, gates, *options)
    for needs in NEEDS:
        torch.library.opcheck(ops.gru_backward.default, (*backward, *needs))


@dtypes
@recurrent_forms
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rnn(dtype, directions, batch_first, lengths, nonlinearity):
    input, h0, weights = _recurrent_operands(1, dtype, directions, batch_first)
    options = (lengths, nonlinearity, True, batch_first)
    torch.library.opcheck(ops.rnn_forward.default, (input, h0, weights, None, *options))
    output, h_n = ops.rnn_forward(input, h0, weights, None, *options)
    grads = [torch.randn_like(result) for result in (output, h_n)]
    backward = (*grads, input, h0, weights, output, *options)
    for needs in NEEDS:
        torch.library.opcheck(ops.rnn_backward.default, (*backward, *needs))


@dtypes
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_cells(dtype, kind):
    """One step, without the dimensions of time and direction."""
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[kind]
    input, h0, weights = _recurrent_operands(gates, dtype, 1, False)
    input, h0 = input[0], h0[0]
    states = (h0, torch.randn_like(h0)) if kind == "lstm" else (h0,)
    lstm = (None,) * 4 + (True, *PLAIN_LSTM[1:], False)
    options = {"lstm": lstm, "gru": (None, True, False), "rnn": (None, "tanh", True, False)}[kind]
    saves = {"lstm": (False, True), "gru": (True,), "rnn": ()}[kind]
    forward = getattr(ops, f"{kind}_forward").default
    arguments = (input, *states, weights, None, *options, *saves)
    torch.library.opcheck(forward, arguments)
    output, *results = forward(*arguments)
    finals = results[: len(states)]
    saved = {"lstm": results[-1:], "gru": results[-1:], "rnn": ()}[kind]
    grads = [torch.randn_like(result) for result in (output, *finals)]
    no_cells = (None,) if kind == "lstm" else ()
    backward = (*grads, *no_cells, input, *states, weights, output, *saved, *options)
    for needs in NEEDS:
        torch.library.opcheck(getattr(ops, f"{kind}_backward").default, (*backward, *needs))


@dtypes
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh", "relu"])
def test_steps(dtype, kind, has_state):
    """A cell without a graph."""
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    input, h0, weights = _recurrent_operands(gates, dtype, 1, False)
    h0 = h0[0] if has_state else None
    c0 = torch.randn_like(h0) if has_state and kind == "lstm" else None
    arguments = (input[0], h0, c0, [weight.detach() for weight in weights], None, kind)
    torch.library.opcheck(ops.rnn_step.default, arguments)


@dtypes
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh", "relu"])
def test_recurrent_inference(dtype, kind, has_state, batch_first, directions):
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    input, h0, weights = _recurrent_operands(gates, dtype, directions, batch_first)
    h0 = h0 if has_state else None
    c0 = torch.randn_like(h0) if has_state and kind == "lstm" else None
    weights = [weight.detach() for weight in weights]
    arguments = (input, h0, c0, weights, None, kind, directions, batch_first)
    torch.library.opcheck(ops.rnn_inference.default, arguments)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x, h, c, w, kind: (x, h, None, w, kind), "both or none"),
        (lambda x, h, c, w, kind: (x, h, c, w, "gru"), "only an LSTM"),
        (lambda x, h, c, w, kind: (x, h, c, w, "sru"), "unknown name"),
        (lambda x, h, c, w, kind: (x, h[:1], c, w, kind), "h0"),
        (lambda x, h, c, w, kind: (x, h, c[:, :2], w, kind), "."),
        (lambda x, h, c, w, kind: (x, h, c.double(), w, kind), "c0"),
        (lambda x, h, c, w, kind: (x, h, c, w[:3], kind), "2 or 4"),
        (lambda x, h, c, w, kind: (x, h, c, [w[0][:-1], *w[1:]], kind), "weights"),
        (lambda x, h, c, w, kind: (x, None, None, [w[0], w[1].t(), *w[2:]], kind), "weights"),
        (lambda x, h, c, w, kind: (x[None], h, c, w, kind), "two dimensions"),
    ],
)
def test_a_step_checks_its_operands(spoil, message):
    input, h0, weights = _recurrent_operands(4, torch.float32, 1, False)
    operands = spoil(input[0], h0[0], h0[0].clone(), [w.detach() for w in weights], "lstm")
    with pytest.raises(RuntimeError, match=message):
        ops.rnn_step(*operands[:4], None, operands[4])


@dtypes
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_pack_weights(dtype, directions):
    for gates, op, flags in ((4, "lstm", (False,)), (3, "gru", ()), (1, "rnn", ())):
        _, _, weights = _recurrent_operands(gates, dtype, directions, False)
        torch.library.opcheck(
            getattr(ops, f"{op}_pack_weight").default,
            (weights, directions, True, *flags),
            test_utils=PACK_TESTS,
        )
