"""The everyday call, which skips the checks in Python: it is taken, and gives the same."""

import sys

import pytest
import torch

import fmkernels
from fmkernels import nn as fnn
from fmkernels.ops.rnn import quick

# The function of the same name hides the module.
functional = sys.modules["fmkernels.functional.rnn"]
KINDS = ("LSTM", "GRU", "RNN")


def _layer(kind, layers=1, bidirectional=False, **options):
    torch.manual_seed(0)
    return getattr(fnn, kind)(5, 7, layers, bidirectional=bidirectional, backend="cpu", **options)


def _run(layer, input, hx=None):
    results = layer(input, hx)
    flat = [results[0]]
    for states in results[1:]:
        flat += states if isinstance(states, tuple) else [states]
    return flat


def _states(kind, count):
    states = [torch.randn(count, 3, 7) for _ in range(2)]
    return tuple(states) if kind == "LSTM" else states[0]


@pytest.fixture
def no_closer_look(monkeypatch):
    def refuse(*_):
        raise AssertionError("took the checked way")

    monkeypatch.setattr(functional._Stack, "of", refuse)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_everyday_calls_take_the_quick_way(kind, graph, frozen, no_closer_look):
    layer = _layer(kind, 2, True)
    if frozen:
        fmkernels.freeze(layer)
    with torch.set_grad_enabled(graph):
        _run(layer, torch.randn(4, 3, 5))
        _run(layer, torch.randn(4, 3, 5), _states(kind, 4))


@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (1, True), (3, False), (2, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_quick_way_gives_what_the_checked_way_gives(
    kind, layers, bidirectional, batch_first, hx, monkeypatch
):
    layer = _layer(kind, layers, bidirectional, batch_first=batch_first)
    input = torch.randn(3, 4, 5) if batch_first else torch.randn(4, 3, 5)
    states = _states(kind, layers * (2 if bidirectional else 1)) if hx else None

    def results_and_gradients():
        own = input.clone().requires_grad_()
        results = _run(layer, own, states)
        loss = sum(result.square().sum() for result in results)
        return [*results, *torch.autograd.grad(loss, [own, *layer.parameters()])]

    ours = results_and_gradients()
    for name in ("lstm", "simple"):
        monkeypatch.setattr(quick, name, lambda *_: None)
    for a, b in zip(ours, results_and_gradients(), strict=True):
        assert torch.equal(a, b)


def test_cell_states_come_the_quick_way(no_closer_look):
    layer = _layer("LSTM", 2, return_cell_states=True)
    output, (_, c_n), cells = layer(torch.randn(4, 3, 5))
    assert cells.shape == output.shape
    assert torch.equal(cells[-1], c_n[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_is_recorded_once(kind):
    layer = getattr(fnn, kind)(5, 7, 2)
    before = fmkernels._dispatch.decision_count()
    layer(torch.randn(4, 3, 5))
    assert [d.chosen for d in fmkernels._dispatch.decisions_since(before)] == ["cpu"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "spoil, error, name",
    [
        (lambda w, x, h: (w, x[..., :0], h), ValueError, "weights\\[0\\]"),
        (lambda w, x, h: (w, x[:0], h), ValueError, "input"),
        (lambda w, x, h: (w, x.long(), h), TypeError, "input"),
        (lambda w, x, h: (w[:-1], x, h), ValueError, "weights"),
        (lambda w, x, h: (w, x, h[:, :2]), ValueError, "hx"),
        (lambda w, x, h: (w, x, h.double()), TypeError, "hx"),
        (lambda w, x, h: ([w[0].double(), *w[1:]], x, h), TypeError, "weights\\[0\\]"),
        (lambda w, x, h: ([w[0], w[1][:, :3], *w[2:]], x, h), ValueError, "weights"),
    ],
)
def test_bad_operands_are_named(kind, spoil, error, name):
    weights = [weight.detach() for weight in _layer(kind)._weights()]
    weights, input, h = spoil(weights, torch.randn(4, 3, 5), torch.zeros(1, 3, 7))
    hx = (h, h.clone()) if kind == "LSTM" else h
    with pytest.raises(error, match=name):
        getattr(fmkernels.functional, kind.lower())(input, hx, weights)


def test_hx_of_an_lstm_is_a_pair_not_a_tensor():
    weights = _layer("LSTM")._weights()
    with pytest.raises(TypeError, match="hx"):
        fmkernels.functional.lstm(torch.randn(4, 3, 5), torch.zeros(2, 1, 3, 7), weights)


def test_cells_without_features_are_refused():
    for kind, gates in (("lstm", 4), ("gru", 3)):
        h = torch.zeros(3, 7)
        hx = (h, h.clone()) if kind == "lstm" else h
        with pytest.raises(ValueError, match="w_ih"):
            getattr(fmkernels.functional, f"{kind}_cell")(
                torch.zeros(3, 0), hx, torch.zeros(gates * 7, 0), torch.zeros(gates * 7, 7)
            )
