"""LSTM variants, lengths and packed sequences against plain PyTorch loops that autograd
differentiates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fmkernels.functional as FF
import fmkernels.nn as fnn
from fmkernels import testing
from fmkernels._dispatch import select
from fmkernels.ops.rnn import autograd, schema
from fmkernels.ops.rnn.backends import LSTM

VARIANTS = {
    "relu": {"activation": "relu"},
    "keras": {"recurrent_activation": "hard_sigmoid"},
    "sigmoid_identity": {"activation": "sigmoid", "recurrent_activation": "identity"},
    "hard": {"activation": "hard_sigmoid", "recurrent_activation": "relu"},
    "identity_tanh": {"activation": "identity", "recurrent_activation": "tanh"},
    "peephole": {"peephole": True},
    "layer_norm": {"layer_norm": True},
    "zoneout": {"zoneout": 0.3},
    "projection": {"projection": True},
    "cells": {"return_cells": True},
    "masks": {"masks": True, "zoneout": 0.3},
    "recurrent_mask": {"recurrent_mask": True},
    "everything": {
        "activation": "sigmoid",
        "peephole": True,
        "layer_norm": True,
        "projection": True,
        "return_cells": True,
        "masks": True,
        "recurrent_mask": True,
        "zoneout": 0.3,
    },
}
LENGTHS = (4, 0, 5, 1, 3)


BACKENDS = testing.available_backends(LSTM, torch.zeros(1, 1, 1))
ALL = schema.LSTMOptions(activation="relu", layer_norm=True)
EXTRAS = (schema.LENGTHS, schema.PROJECTION, schema.MASKS, schema.CELL_STATES)
VARIANT_BACKENDS = testing.available_backends(LSTM, torch.zeros(1, 1, 1), EXTRAS, ALL)
backends = pytest.mark.parametrize("backend", VARIANT_BACKENDS)
dtypes = pytest.mark.parametrize("dtype", testing.DTYPES, ids=testing.dtype_name)
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


ACTIVATIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    # F.hardsigmoid's gradient in float64 carries a 1/6 rounded to float32.
    "hard_sigmoid": lambda x: F.relu6(x + 3) / 6,
    "identity": lambda x: x,
}


class Problem:
    """One LSTM layer with random arguments; sizes T, B, I, H, P, D."""

    def __init__(
        self,
        dtype,
        sizes=(5, 5, 7, 19),
        directions=2,
        biases=True,
        batch_first=False,
        lengths=None,
        *,
        activation="tanh",
        recurrent_activation="sigmoid",
        peephole=False,
        layer_norm=False,
        zoneout=0.0,
        projection=False,
        return_cells=False,
        masks=False,
        recurrent_mask=False,
    ):
        self.steps, self.batch, self.features, self.hidden = sizes
        self.directions, self.biases, self.batch_first = directions, biases, batch_first
        self.projected = self.hidden // 2 if projection else self.hidden
        self.lengths = None if lengths is None else torch.tensor(lengths)
        self.options = schema.LSTMOptions(
            biases, peephole, layer_norm, activation, recurrent_activation, zoneout, 1e-5
        )
        self.return_cells = return_cells
        leading = (self.batch, self.steps) if batch_first else (self.steps, self.batch)
        H, P, D = self.hidden, self.projected, directions
        self.arguments = {
            "input": testing.normal(*leading, self.features, dtype=dtype),
            "h0": testing.normal(D, self.batch, P, dtype=dtype),
            "c0": testing.normal(D, self.batch, H, dtype=dtype),
        }
        shapes = {"w_ih": (4 * H, self.features), "w_hh": (4 * H, P)}
        if biases:
            shapes |= {"b_ih": (4 * H,), "b_hh": (4 * H,)}
        if projection:
            shapes["w_hr"] = (P, H)
        if peephole:
            shapes["w_peephole"] = (3, H)
        if layer_norm:
            shapes |= {"norm_ih": (4 * H,), "norm_hh": (4 * H,), "norm_c": (H,)}
            if biases:
                shapes["bias_c"] = (H,)
        self.names = list(shapes)
        for d in range(D):
            for name, shape in shapes.items():
                self.arguments[f"{name}_{d}"] = testing.normal(*shape, dtype=dtype, std=H**-0.5)
            if activation == "relu" and biases:
                # Off the corner: 16 bits took a cell candidate of -7e-5 to the other side of it.
                sign = torch.randint(0, 2, (H,)) * 2 - 1
                self.arguments[f"b_ih_{d}"][2 * H : 3 * H] = 2 * sign
        self.masks = (None, None, None)
        if recurrent_mask:
            kept = (torch.rand(D, self.batch, P) < 0.7).to(torch.float64) / 0.7
            self.masks = (kept.to(torch.bfloat16), None, None)
        if masks:
            keep_h, keep_c = (
                torch.rand(D, self.steps, self.batch, width) < zoneout for width in (P, H)
            )
            self.masks = (self.masks[0], keep_h, keep_c)

    def ours(self, backend):
        # As the layers do it: a backend that does not take the problem says so.
        extras = (schema.PROJECTION,) if "w_hr" in self.names else ()
        select("lstm", LSTM, backend, self.arguments["input"], extras, self.options, self.hidden)

        def run(input, h0, c0, **weights):
            masks = [self.masks[0], *self.masks[1:]]
            if masks[0] is not None:
                masks[0] = masks[0].to(input.dtype)
            results = autograd.lstm_layer(
                backend,
                input,
                h0,
                c0,
                list(weights.values()),
                None,
                (self.lengths, *masks),
                self.options,
                self.batch_first,
                self.return_cells,
            )
            return results if self.return_cells else results[:3]

        return run

    def oracle(self, input, h0, c0, **weights):
        if self.batch_first:
            input = input.transpose(0, 1)
        results = []
        for d in range(self.directions):
            own = {name: weights[f"{name}_{d}"] for name in self.names}
            results.append(self._direction(d, input, h0[d], c0[d], own))
        outputs, cells = (torch.cat([r[k] for r in results], dim=-1) for k in (0, 3))
        if self.batch_first:
            outputs, cells = outputs.transpose(0, 1), cells.transpose(0, 1)
        h_n, c_n = (torch.stack([r[k] for r in results]) for k in (1, 2))
        return (outputs, h_n, c_n, cells)[: 4 if self.return_cells else 3]

    def _direction(self, d, input, h, c, w):
        o = self.options
        act, gate_act = ACTIVATIONS[o.activation], ACTIVATIONS[o.recurrent_activation]
        H, bias = self.hidden, w.get("b_ih")
        order = range(self.steps) if d == 0 else reversed(range(self.steps))
        outputs, cells = [None] * self.steps, [None] * self.steps
        for t in order:
            x = F.linear(input[t], w["w_ih"])
            masked = h if self.masks[0] is None else h * self.masks[0][d].to(h.dtype)
            r = F.linear(masked, w["w_hh"])
            if o.layer_norm:
                x = F.layer_norm(x, (4 * H,), w["norm_ih"], None, o.norm_eps)
                r = F.layer_norm(r, (4 * H,), w["norm_hh"], None, o.norm_eps)
            total = x + r if bias is None else x + bias + r + w["b_hh"]
            i, f, g, out = total.chunk(4, dim=-1)
            if o.peephole:
                i, f = i + w["w_peephole"][0] * c, f + w["w_peephole"][1] * c
            new_c = gate_act(f) * c + gate_act(i) * act(g)
            if o.peephole:
                out = out + w["w_peephole"][2] * new_c
            seen = new_c
            if o.layer_norm:
                seen = F.layer_norm(new_c, (H,), w["norm_c"], w.get("bias_c"), o.norm_eps)
            new_h = gate_act(out) * act(seen)
            if "w_hr" in w:
                new_h = F.linear(new_h, w["w_hr"])
            if self.masks[1] is not None:
                new_h = torch.where(self.masks[1][d, t], h, new_h)
                new_c = torch.where(self.masks[2][d, t], c, new_c)
            elif o.zoneout > 0:
                new_h = o.zoneout * h + (1 - o.zoneout) * new_h
                new_c = o.zoneout * c + (1 - o.zoneout) * new_c
            if self.lengths is None:
                h, c = new_h, new_c
                outputs[t], cells[t] = h, c
            else:
                on = (t < self.lengths)[:, None]
                h, c = torch.where(on, new_h, h), torch.where(on, new_c, c)
                zeros = torch.zeros_like
                outputs[t] = torch.where(on, h, zeros(h))
                cells[t] = torch.where(on, c, zeros(c))
        return torch.stack(outputs), h, c, torch.stack(cells)

    def check(self, backend, **options):
        testing.compare(self.ours(backend), self.oracle, self.arguments, **options)


@backends
@dtypes
@variants
def test_variant_matches_a_loop(backend, dtype, variant):
    Problem(dtype, **variant).check(backend)


@backends
@variants
def test_variant_without_gradients(backend, variant):
    Problem(torch.float32, **variant).check(backend, grad_layout=None)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=testing.dtype_name)
@variants
def test_variant_with_lengths(backend, dtype, variant):
    Problem(dtype, lengths=LENGTHS, **variant).check(backend)


@backends
@pytest.mark.parametrize("name", ["layer_norm", "everything", "peephole"])
@pytest.mark.parametrize(
    "sizes", [(1, 3, 5, 8), (3, 1, 4, 16), (2, 33, 6, 32), (2, 0, 3, 4)], ids=str
)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_variant_of_other_sizes(backend, name, sizes, biases, batch_first):
    Problem(torch.float32, sizes, 1, biases, batch_first, **VARIANTS[name]).check(backend)


@backends
@pytest.mark.parametrize("grad_layout", testing.GRADIENT_LAYOUTS)
@pytest.mark.parametrize("name", ["cells", "everything"])
def test_variant_with_gradients_of_any_strides(backend, name, grad_layout):
    Problem(torch.float32, **VARIANTS[name]).check(backend, grad_layout=grad_layout)


@backends
@variants
def test_variant_gradcheck(backend, variant):
    lengths = (2, 3)
    problem = Problem(torch.float64, (3, 2, 3, 4), lengths=lengths, **variant)
    names = list(problem.arguments)
    leaves = [tensor.requires_grad_() for tensor in problem.arguments.values()]
    ours = problem.ours(backend)
    assert torch.autograd.gradcheck(
        lambda *tensors: ours(**dict(zip(names, tensors, strict=True))), leaves
    )


# --- lengths

KINDS = {"lstm": (fnn.LSTM, nn.LSTM), "gru": (fnn.GRU, nn.GRU), "rnn": (fnn.RNN, nn.RNN)}
kinds = pytest.mark.parametrize("kind", KINDS)


def layers_of(kind, backend, dtype=torch.float64, **options):
    ours, theirs = KINDS[kind]
    theirs = theirs(7, 12, **options).to(dtype)
    return ours.from_torch(theirs, backend=backend), theirs


def final_states(state):
    return state if isinstance(state, tuple) else (state,)


@backends
@kinds
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_give_what_packing_gives(backend, kind, batch_first):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    ours, theirs = layers_of(kind, backend, **options)
    lengths = torch.tensor([4, 1, 6, 3])
    input = testing.normal(6, 4, 7, dtype=torch.float64)
    input[torch.arange(6)[:, None] >= lengths] = float("nan")
    if batch_first:
        input = input.transpose(0, 1)
    mine, other = input.clone().requires_grad_(), input.clone().requires_grad_()
    output, state = ours(mine, lengths=lengths)
    packed = pack_padded_sequence(other, lengths, batch_first, enforce_sorted=False)
    wanted, wanted_state = theirs(packed)
    wanted, _ = pad_packed_sequence(wanted, batch_first, total_length=6)
    torch.testing.assert_close(output, wanted)
    for one, two in zip(final_states(state), final_states(wanted_state), strict=True):
        torch.testing.assert_close(one, two)
    grads = []
    for out, end, leaf in ((output, state, mine), (wanted, wanted_state, other)):
        loss = (out * out.detach().cos()).sum() + sum((s * s).sum() for s in final_states(end))
        grads.append(torch.autograd.grad(loss, [leaf, *theirs.parameters()]))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


@backends
@kinds
def test_lengths_of_zero_and_of_all(backend, kind):
    ours, theirs = layers_of(kind, backend)
    input = testing.normal(4, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(input, lengths=torch.tensor([4, 4, 4])), theirs(input))
    output, state = ours(input, lengths=torch.tensor([0, 4, 0], dtype=torch.int32))
    assert (output[:, [0, 2]] == 0).all() and output[:, 1].abs().min() > 0
    assert all((s[:, [0, 2]] == 0).all() for s in final_states(state))


@pytest.mark.parametrize("backend", BACKENDS)
@kinds
def test_bad_lengths_are_refused(backend, kind):
    layer = KINDS[kind][0](7, 12)
    input = testing.normal(4, 3, 7)
    for lengths, error in (
        ([1, 2, 3], TypeError),
        (torch.tensor([1.0, 2.0, 3.0]), TypeError),
        (torch.tensor([1, 2]), ValueError),
        (torch.tensor([1, 2, 5]), ValueError),
        (torch.tensor([1, -1, 3]), ValueError),
    ):
        with pytest.raises(error, match="lengths must"):
            layer(input, lengths=lengths)
    with pytest.raises(ValueError, match="lengths must"):
        layer(input[:, 0], lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match="lengths must"):
        layer(pack_sequence([input[:, 0]]), lengths=torch.tensor([4]))


# --- packed sequences


@backends
@kinds
@pytest.mark.parametrize("enforce_sorted", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequence(backend, kind, enforce_sorted, with_state):
    options = {"num_layers": 2, "bidirectional": True}
    if kind == "lstm":
        options["proj_size"] = 5
    ours, theirs = layers_of(kind, backend, **options)
    sizes = (6, 3, 2) if enforce_sorted else (2, 6, 3)
    sequences = [testing.normal(size, 7, dtype=torch.float64) for size in sizes]
    packed = pack_sequence(sequences, enforce_sorted)
    packed.data.requires_grad_()
    hx = None
    if with_state:
        hx = testing.normal(4, 3, options.get("proj_size", 12), dtype=torch.float64)
        if kind == "lstm":
            hx = (hx, testing.normal(4, 3, 12, dtype=torch.float64))
    grads = []
    (output, state), (wanted, wanted_state) = ours(packed, hx), theirs(packed, hx)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices", "data"):
        one, two = getattr(output, name), getattr(wanted, name)
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two)
    for one, two in zip(final_states(state), final_states(wanted_state), strict=True):
        torch.testing.assert_close(one, two)
    for out, end in ((output, state), (wanted, wanted_state)):
        loss = out.data.square().sum() + sum(s.sum() for s in final_states(end))
        grads.append(torch.autograd.grad(loss, [packed.data, *theirs.parameters()]))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


# --- the layer


@backends
@variants
def test_layer_with_variants(backend, variant):
    named = ("activation", "recurrent_activation", "peephole", "layer_norm", "zoneout")
    options = {name: variant[name] for name in named if name in variant}
    layer = fnn.LSTM(
        7,
        12,
        num_layers=2,
        bidirectional=True,
        proj_size=5 if "projection" in variant else 0,
        return_cell_states="return_cells" in variant,
        recurrent_dropout=0.5 if "recurrent_mask" in variant else 0.0,
        backend=backend,
        **options,
    )
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(layer)
    input = testing.normal(4, 3, 7)
    # Twelve units and more leave no doubt that a mask has been drawn.
    for training in (False, True):
        layer.train(training)
        torch.manual_seed(0)
        results = layer(input)
        torch.manual_seed(0)
        again = layer(input)
        torch.testing.assert_close(results, again, rtol=0, atol=0)
        random = training and ("zoneout" in variant or "recurrent_mask" in variant)
        assert torch.equal(layer(input)[0], results[0]) != random
        assert len(results) == (3 if "return_cells" in variant else 2)
        sum(r.sum() for r in (results[0], *results[1])).backward()
    assert all(p.grad is not None for p in layer.parameters())
    fresh = fnn.LSTM(
        7,
        12,
        num_layers=2,
        bidirectional=True,
        proj_size=5 if "projection" in variant else 0,
        backend=backend,
        **options,
    )
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(fresh.eval()(input)[0], layer.eval()(input)[0])


@backends
def test_cell_states_end_in_the_final_cell(backend):
    layer = fnn.LSTM(7, 12, bidirectional=True, return_cell_states=True, backend=backend)
    output, (_, c_n), cells = layer(testing.normal(4, 3, 7))
    assert cells.shape == output.shape
    torch.testing.assert_close(cells[-1, :, :12], c_n[0])
    torch.testing.assert_close(cells[0, :, 12:], c_n[1])


@backends
def test_expected_masks_are_the_mean_of_drawn_ones(backend):
    """Zoneout and recurrent dropout in training scatter around what evaluation computes."""
    layer = fnn.LSTM(
        3, 8, activation="identity", recurrent_activation="identity", zoneout=0.25, backend=backend
    ).double()
    input = testing.normal(1, 4000, 3, dtype=torch.float64)[:, :1].expand(1, 4000, 3)
    hx = tuple(testing.normal(1, 1, 8, dtype=torch.float64).expand(1, 4000, 8) for _ in range(2))
    with torch.no_grad():
        drawn, exact = layer.train()(input, hx)[0].mean(dim=1), layer.eval()(input, hx)[0][:, 0]
    torch.testing.assert_close(drawn, exact, rtol=0.1, atol=0.05)


def test_bad_variants_are_refused():
    for options, name in (
        ({"activation": "gelu"}, "activation"),
        ({"recurrent_activation": None}, "recurrent_activation"),
        ({"zoneout": 1.5}, "zoneout"),
        ({"recurrent_dropout": -0.1}, "recurrent_dropout"),
        ({"peephole": 1}, "peephole"),
        ({"layer_norm": "yes"}, "layer_norm"),
    ):
        with pytest.raises((TypeError, ValueError), match=name):
            fnn.LSTM(3, 4, **options)
    with pytest.raises(ValueError, match="activation must be one of"):
        weights = [torch.zeros(16, 3), torch.zeros(16, 4)]
        FF.lstm(torch.zeros(2, 1, 3), None, weights, False, activation="gelu")
