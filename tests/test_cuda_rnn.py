"""The persistent CUDA recurrence, executed on the CPU, against torch's LSTM and GRU in float64."""

from __future__ import annotations

import pytest
import torch

from fmkernels import testing
from fmkernels.ops.rnn import cuda as rnn
from fmkernels.ops.rnn.schema import Sizes

pytestmark = [pytest.mark.emu, pytest.mark.usefixtures("emulated_cuda")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=testing.dtype_name)
cells = pytest.mark.parametrize("cell", ["lstm", "gru"])


class _Recurrence(torch.autograd.Function):
    """The backend's functions behind autograd, without what the family's own Function adds."""

    @staticmethod
    def forward(ctx, cell, batch_first, lengths, input, h0, c0, *weights):
        biases = len(weights) == 4 * h0.size(0)
        if cell == "lstm":
            options = (lengths, None, None, None, biases, False, False, *rnn.PLAIN, 0.0, 1e-5)
            output, h_n, c_n, _, saved = rnn.lstm_forward(
                input, h0, c0, list(weights), None, *options, batch_first, False, True
            )
        else:
            options = (lengths, biases)
            output, h_n, gates = rnn.gru_forward(
                input, h0, list(weights), None, *options, batch_first, True
            )
            c_n, saved = h_n.new_zeros(()), [gates]
        ctx.save_for_backward(input, h0, c0, output, *saved, *weights)
        ctx.call = cell, batch_first, options, len(saved)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n):
        cell, batch_first, options, count = ctx.call
        input, h0, c0, output, *rest = ctx.saved_tensors
        saved, weights = rest[:count], rest[count:]
        needs = (True, True, True)
        if cell == "lstm":
            grad_input, grad_h0, grad_c0, grads = rnn.lstm_backward(
                grad_output, grad_h_n, grad_c_n, None, input, h0, c0, weights, output, saved,
                *options, batch_first, *needs,
            )  # fmt: skip
        else:
            lengths, biases = options
            grad_input, grad_h0, grads = rnn.gru_backward(
                grad_output, grad_h_n, input, h0, weights, output, *saved, lengths, biases,
                batch_first, *needs,
            )  # fmt: skip
            grad_c0 = None
        return (None, None, None, grad_input, grad_h0, grad_c0, *grads)


def run_ours(cell, batch_first, lengths, input, h0, c0, **weights):
    results = _Recurrence.apply(cell, batch_first, lengths, input, h0, c0, *weights.values())
    return results if cell == "lstm" else results[:2]


def run_torch(cell, batch_first, lengths, input, h0, c0, **weights):
    """torch's layer; with lengths each sequence alone, without what lies past its end."""
    directions = h0.size(0)
    biases = len(weights) == 4 * directions
    values = list(weights.values())
    if batch_first:
        input = input.transpose(0, 1)
    steps, batch, _ = input.shape
    lasts = [steps] * batch if lengths is None else lengths.tolist()
    outputs, h_ns, c_ns = [], [], []
    for b in range(batch) if lengths is not None else [slice(None)]:
        rows = slice(b, b + 1) if lengths is not None else b
        last = lasts[b] if lengths is not None else steps
        h, c = h0[:, rows].contiguous(), c0[:, rows].contiguous()
        own = input[:last, rows]
        output = own.new_zeros(steps, own.size(1), directions * h0.size(2))
        if last > 0:
            state = (h, c) if cell == "lstm" else h
            function = torch.lstm if cell == "lstm" else torch.gru
            found, *states = function(
                own, state, values, biases, 1, 0.0, True, directions == 2, False
            )
            padding = output[last:]
            output, h = torch.cat([found, padding]), states[0]
            c = states[1] if cell == "lstm" else c
        outputs.append(output)
        h_ns.append(h)
        c_ns.append(c)
    output = torch.cat(outputs, dim=1)
    results = (output.transpose(0, 1) if batch_first else output, torch.cat(h_ns, dim=1))
    return (*results, torch.cat(c_ns, dim=1)) if cell == "lstm" else results


def problem(cell, dtype, steps, batch, features, hidden, directions=1, biases=True,
            batch_first=False):  # fmt: skip
    gates = (4 if cell == "lstm" else 3) * hidden
    std = hidden**-0.5
    leading = (batch, steps) if batch_first else (steps, batch)
    arguments = {
        "input": testing.normal(*leading, features, dtype=dtype),
        "h0": testing.normal(directions, batch, hidden, dtype=dtype),
        "c0": testing.normal(directions, batch, hidden, dtype=dtype),
    }
    for d in range(directions):
        arguments[f"w_ih{d}"] = testing.normal(gates, features, dtype=dtype, std=std)
        arguments[f"w_hh{d}"] = testing.normal(gates, hidden, dtype=dtype, std=std)
        if biases:
            arguments[f"b_ih{d}"] = testing.normal(gates, 1, dtype=dtype, std=std).flatten()
            arguments[f"b_hh{d}"] = testing.normal(gates, 1, dtype=dtype, std=std).flatten()
    return arguments


def check(cell, dtype, *sizes, lengths=None, batch_first=False, **options):
    arguments = problem(cell, dtype, *sizes, batch_first=batch_first, **options)
    fixed = (cell, batch_first, lengths)
    testing.compare(
        lambda **tensors: run_ours(*fixed, **tensors),
        lambda **tensors: run_torch(*fixed, **tensors),
        arguments,
    )


@dtypes
@cells
@pytest.mark.parametrize("directions", [1, 2])
def test_matches_torch(cell, dtype, directions):
    check(cell, dtype, 4, 3, 5, 16, directions=directions)


@cells
@pytest.mark.parametrize("hidden", [8, 24, 64, 136])
def test_hidden_sizes(cell, hidden):
    """One group, tails of the last chunk, all warps at work."""
    check(cell, torch.bfloat16, 3, 2, 4, hidden)
    check(cell, torch.float32, 2, 2, 4, hidden)


@dtypes
@cells
def test_batch_of_several_tiles(cell, dtype, monkeypatch):
    """More columns than one pass holds, and a last tile that is not full."""
    monkeypatch.setenv("FMK_EMU_MULTIPROCESSORS", "2")  # no second block for the second half
    check(cell, dtype, 3, 37, 4, 16)


@dtypes
def test_batch_spread_over_blocks(dtype, monkeypatch):
    monkeypatch.setenv("FMK_EMU_MULTIPROCESSORS", "7")
    check("lstm", dtype, 3, 21, 4, 16)


@dtypes
@cells
@pytest.mark.parametrize("multiprocessors", [2, 4])
def test_several_groups_per_block(cell, dtype, multiprocessors, monkeypatch):
    """Few multiprocessors: part of the half types' weights, too, lies in shared memory."""
    monkeypatch.setenv("FMK_EMU_MULTIPROCESSORS", str(multiprocessors))
    hidden = 32 if dtype != torch.float32 else 24
    check(cell, dtype, 3, 10, 4, hidden if multiprocessors == 4 or dtype != torch.float32 else 32)


@cells
@pytest.mark.parametrize("hidden", [512, 1032])
def test_large_hidden_sizes(cell, hidden):
    check(cell, torch.bfloat16, 2, 2, 4, hidden)


def test_weights_beyond_the_registers():
    """Past 1536 features the first group's last chunks lie in shared memory."""
    check("lstm", torch.float16, 2, 1, 2, 1544, biases=False)


@cells
def test_without_biases_and_batch_first(cell):
    check(cell, torch.float32, 4, 3, 5, 16, biases=False, batch_first=True, directions=2)


@cells
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.dtype_name)
def test_lengths(cell, dtype, batch_first):
    lengths = torch.tensor([5, 1, 3, 4, 0])
    check(cell, dtype, 5, 5, 4, 16, lengths=lengths, directions=2, batch_first=batch_first)


@cells
def test_lengths_past_the_sequence_are_cut_off(cell):
    arguments = problem(cell, torch.float32, 4, 3, 5, 8, directions=2)
    given, fitting = torch.tensor([9, -1, 2]), torch.tensor([4, 0, 2])
    ours = testing.run(lambda **a: run_ours(cell, False, given, **a), arguments)
    expected = testing.run(lambda **a: run_ours(cell, False, fitting, **a), arguments)
    outputs = [name for name in ours if name.startswith("output")]
    assert all(torch.equal(ours[name], expected[name]) for name in outputs)


@cells
def test_unaligned_weights_and_states(cell):
    arguments = problem(cell, torch.float32, 3, 2, 5, 8)
    for name, value in arguments.items():
        arguments[name] = testing.in_layout(value, "offset")
    testing.compare(
        lambda **tensors: run_ours(cell, False, None, **tensors),
        lambda **tensors: run_torch(cell, False, None, **tensors),
        arguments,
    )


@cells
def test_one_step_and_empty_batch(cell):
    check(cell, torch.float32, 1, 2, 3, 8)
    check(cell, torch.float32, 3, 0, 3, 8)


def test_results_do_not_depend_on_the_order_of_threads(monkeypatch):
    arguments = problem("lstm", torch.bfloat16, 4, 9, 5, 32, directions=2)
    results = []
    for seed in "012":
        monkeypatch.setenv("FMK_EMU_SEED", seed)
        results.append(testing.run(lambda **a: run_ours("lstm", False, None, **a), arguments))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


# Multiprocessors, bytes of shared memory of a block, and the widest layers of 64 sequences: in 16
# bits with one and two directions, in float32 with one and two.
CHIPS = {
    "A100": (108, 166912, (1536, 864, 864, 432)),
    "H100": (132, 232448, (2048, 1056, 1056, 640)),
    "B200": (148, 232448, (2048, 1184, 1184, 640)),
}


@cells
@pytest.mark.parametrize("chip", CHIPS)
def test_hidden_sizes_that_fit_a_chip(cell, chip, monkeypatch):
    multiprocessors, shared, widest = CHIPS[chip]
    monkeypatch.setenv("FMK_EMU_MULTIPROCESSORS", str(multiprocessors))
    monkeypatch.setenv("FMK_EMU_SHARED", str(shared))
    problem = torch.ops.fmkernels.rnn_recurrence_problem
    kinds = [(dtype, directions) for dtype in ("bfloat16", "float32") for directions in (1, 2)]
    for (dtype, directions), most in zip(kinds, widest, strict=True):
        sizes = range(64, 2049 + 8, 8)
        fitting = [n for n in sizes if not problem(0, dtype, cell, 100, 64, n, directions)]
        assert fitting == list(range(64, most + 1, 8)), (dtype, directions)


def test_what_does_not_fit_is_refused(monkeypatch):
    like = torch.zeros(4, 2, 3, dtype=torch.bfloat16)

    def reason(hidden, directions=1):
        return rnn.recurrence_supports(like, "lstm", Sizes(4, 2, hidden, directions)).reason

    assert reason(1024) == ""
    assert reason(2048) == ""
    assert "multiples of 8, got 100" in reason(100)
    assert "up to 2048 on chip, got 4096" in reason(4096)
    assert "do not fit" in reason(2048, directions=2)
    monkeypatch.setenv("FMK_EMU_MULTIPROCESSORS", "108")
    monkeypatch.setenv("FMK_EMU_SHARED", "166912")
    assert reason(1536) == ""
    assert "108 multiprocessors" in reason(2048)
    with pytest.raises(RuntimeError, match="do not fit"):
        arguments = problem("lstm", torch.bfloat16, 1, 1, 1, 2048)
        run_ours("lstm", False, None, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_hh0": torch.zeros(64, 24)}, "w_hh"),
        ({"c0": torch.zeros(1, 2, 16)}, "c0"),
        ({"h0": torch.zeros(1, 3, 16, dtype=torch.float16)}, "h0: expected the input's dtype"),
    ],
    ids=["w_hh", "c0", "dtype"],
)
def test_bad_operands_are_named(change, message):
    arguments = {**problem("lstm", torch.float32, 2, 3, 4, 16), **change}
    with pytest.raises(RuntimeError, match=message):
        run_ours("lstm", False, None, **arguments)
